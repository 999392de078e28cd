// redknot._memory: the allocator as a Python object. Index arrays move to numpy without a copy, the
// GIL is released while the allocator works. Documented in python/redknot/_memory.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "numpy_arrays.h"
#include "page_storage.h"
#include "redknot/huge_pages.h"
#include "redknot/segment_allocator.h"

namespace py = pybind11;

namespace redknot::binding {
namespace {

py::handle out_of_pages_type;  // redknot._memory.OutOfPages, alive as long as the module

void raise_unless_ok(const AllocResult& result, const char* caller) {
  if (result.status == AllocStatus::kOk) return;
  const std::string message = std::string(caller) + ": needs " +
                              std::to_string(result.pages_needed) + " pages, " +
                              std::to_string(result.pages_free) + " are free";
  const py::object error = out_of_pages_type(message);
  error.attr("pages_needed") = result.pages_needed;
  error.attr("pages_free") = result.pages_free;
  PyErr_SetObject(out_of_pages_type.ptr(), error.ptr());
  throw py::error_already_set();
}

// Another thread may hold the allocator's lock: nobody waits for it with the GIL in hand.
template <typename Call>
auto unlocked(const Call& call) {
  const py::gil_scoped_release release;
  return call();
}

class Allocator {
 public:
  Allocator(int32_t num_layers,
            int32_t num_kv_heads,
            int32_t num_pages,
            int32_t page_size,
            int64_t bytes_per_page,
            const std::vector<RegionTuple>& storage,
            std::optional<bool> poison)
      : num_layers_(num_layers),
        num_kv_heads_(num_kv_heads),
        poisons_(poison.value_or(poisons_freed_pages_by_default() && !storage.empty())),
        core_({.num_layers = num_layers,
               .num_kv_heads = num_kv_heads,
               .num_pages = num_pages,
               .page_size = page_size,
               .bytes_per_page = bytes_per_page,
               .poison = poison_hook(
                   checked_regions(storage, "SegmentAllocator"), poisons_, "SegmentAllocator")}) {}

  SegmentAllocator& core() { return core_; }
  bool poisons() const { return poisons_; }

  SegmentId create_segment(int64_t num_tokens, int64_t first_position, const py::object& present) {
    std::vector<uint8_t> pages;
    if (!present.is_none()) pages = page_mask(present, "create_segment: present");
    SegmentId segment = 0;
    const AllocResult result =
        unlocked([&] { return core_.create_segment(num_tokens, first_position, &segment, pages); });
    raise_unless_ok(result, "create_segment");
    return segment;
  }

  int64_t drop_segment_pages(SegmentId segment, const py::object& pages) {
    const auto mask = page_mask(pages, "drop_segment_pages: pages");
    return unlocked([&] { return core_.drop_segment_pages(segment, mask); });
  }

  void restore_segment_pages(SegmentId segment, const py::object& pages) {
    const auto mask = page_mask(pages, "restore_segment_pages: pages");
    const AllocResult result = unlocked([&] { return core_.restore_segment_pages(segment, mask); });
    raise_unless_ok(result, "restore_segment_pages");
  }

  py::array segment_slots(SegmentId segment, int64_t layer) {
    return per_head(unlocked([&] { return core_.segment_slots(segment, layer); }));
  }

  SessionId create_session(const py::object& windows, const py::object& sinks) {
    const std::vector<HeadRule> rules = head_rules(windows, sinks, "create_session");
    return unlocked([&] { return core_.create_session(rules); });
  }

  int64_t change_rules(SessionId session, const py::object& windows, const py::object& sinks) {
    const std::vector<HeadRule> rules = head_rules(windows, sinks, "change_rules");
    int64_t num_freed = 0;
    const int64_t row = unlocked([&] { return core_.change_rules(session, rules, &num_freed); });
    if (row >= 0) {
      throw py::value_error("change_rules: layer " + std::to_string(row / num_kv_heads_) +
                            ", head " + std::to_string(row % num_kv_heads_) +
                            " has expired tokens that window " + std::to_string(rules[row].window) +
                            ", sink " + std::to_string(rules[row].sink) + " would see");
    }
    return num_freed;
  }

  int64_t growth_pages(const py::object& sessions, const py::object& num_tokens) {
    const auto ids = integer_list(sessions, "growth_pages: sessions");
    const auto counts = integer_list(num_tokens, "growth_pages: num_tokens");
    return unlocked([&] { return core_.growth_pages(ids, counts); });
  }

  py::array exclusive_pages(const py::object& sessions) {
    const auto ids = integer_list(sessions, "exclusive_pages: sessions");
    return index_list(unlocked([&] { return core_.exclusive_pages(ids); }));
  }

  py::array swap_out(const py::object& sessions, const py::object& pages) {
    const auto ids = integer_list(sessions, "swap_out: sessions");
    const auto given = integers<int32_t>(pages, "swap_out: pages", "a list of integers", {-1});
    return index_list(unlocked([&] { return core_.swap_out(ids, given); }));
  }

  py::array swap_in(SessionId session) {
    std::vector<SlotMove> moves;
    const AllocResult result = unlocked([&] { return core_.swap_in(session, &moves); });
    raise_unless_ok(result, "swap_in");
    static_assert(sizeof(SlotMove) == 2 * sizeof(int32_t));
    const auto count = static_cast<py::ssize_t>(moves.size());
    return to_numpy<int32_t>(std::move(moves), {count, 2});
  }

  void grow(int32_t num_pages, const std::vector<RegionTuple>& storage) {
    auto poison = poison_hook(checked_regions(storage, "grow"), poisons_, "grow");
    unlocked([&] { core_.grow(num_pages, std::move(poison)); });
  }

  py::array append_tokens(const py::object& sessions,
                          const py::object& num_tokens,
                          bool expire_first) {
    const auto ids = integer_list(sessions, "append_tokens: sessions");
    const auto counts = integer_list(num_tokens, "append_tokens: num_tokens");
    std::vector<PageCopy> copies;
    const AllocResult result =
        unlocked([&] { return core_.append_tokens(ids, counts, expire_first, &copies); });
    raise_unless_ok(result, "append_tokens");
    return copies_to_numpy(std::move(copies));
  }

  void append_layer(const py::object& sessions, const py::object& num_tokens, int64_t layer) {
    const auto ids = integer_list(sessions, "append_layer: sessions");
    const auto counts = integer_list(num_tokens, "append_layer: num_tokens");
    const AllocResult result = unlocked([&] { return core_.append_layer(ids, counts, layer); });
    raise_unless_ok(result, "append_layer");
  }

  int64_t layerwise_pages(const py::object& sessions, const py::object& num_tokens) {
    const auto ids = integer_list(sessions, "layerwise_pages: sessions");
    const auto counts = integer_list(num_tokens, "layerwise_pages: num_tokens");
    return unlocked([&] { return core_.layerwise_pages(ids, counts); });
  }

  py::array make_writable(SessionId session,
                          const std::vector<std::pair<py::object, py::object>>& requests,
                          bool keep_contents) {
    std::vector<WriteRequest> converted;
    for (const auto& [head_mask, positions] : requests) {
      converted.push_back({.head_mask = head_matrix<uint8_t>(head_mask, "make_writable: head_mask"),
                           .positions = integer_list(positions, "make_writable: positions")});
    }
    std::vector<PageCopy> copies;
    const AllocResult result =
        unlocked([&] { return core_.make_writable(session, converted, &copies, keep_contents); });
    raise_unless_ok(result, "make_writable");
    return copies_to_numpy(std::move(copies));
  }

  py::array tail_slots(SessionId session, int64_t layer, int64_t num_tokens) {
    return per_head(unlocked([&] { return core_.tail_slots(session, layer, num_tokens); }));
  }

  py::array position_slots(SessionId session, int64_t layer, const py::object& positions) {
    const auto wanted = integer_list(positions, "position_slots: positions");
    return per_head(unlocked([&] { return core_.position_slots(session, layer, wanted); }));
  }

  std::pair<py::array, py::array> rows(const py::object& sessions, int64_t layer) {
    const auto ids = integer_list(sessions, "rows: sessions");
    RowTable table = unlocked([&] { return core_.rows(ids, layer); });
    const auto num_rows = static_cast<py::ssize_t>(table.row_indptr.size());
    const auto num_refs = static_cast<py::ssize_t>(table.page_refs.size());
    return {to_numpy<int32_t>(std::move(table.row_indptr), {num_rows}),
            to_numpy<int32_t>(std::move(table.page_refs), {num_refs, 4})};
  }

  py::dict stats() {
    const AllocatorStats stats = unlocked([&] { return core_.stats(); });
    return py::dict(py::arg("num_pages") = stats.num_pages,
                    py::arg("num_free_pages") = stats.num_free_pages,
                    py::arg("segment_pages") = stats.segment_pages,
                    py::arg("session_global_pages") = stats.session_global_pages,
                    py::arg("session_local_pages") = stats.session_local_pages,
                    py::arg("shared_pages") = stats.shared_pages,
                    py::arg("swapped_pages") = stats.swapped_pages,
                    py::arg("num_segments") = stats.num_segments,
                    py::arg("num_sessions") = stats.num_sessions,
                    py::arg("bytes_per_page") = stats.bytes_per_page);
  }

 private:
  template <typename T>
  std::vector<T> head_matrix(const py::object& given, const std::string& what) const {
    return integers<T>(given,
                       what,
                       "integers [num_layers, num_kv_heads] = [" + std::to_string(num_layers_) +
                           ", " + std::to_string(num_kv_heads_) + "]",
                       {num_layers_, num_kv_heads_});
  }

  std::vector<uint8_t> page_mask(const py::object& given, const std::string& what) const {
    return integers<uint8_t>(given,
                             what,
                             "booleans [num_layers, num_kv_heads, pages] = [" +
                                 std::to_string(num_layers_) + ", " +
                                 std::to_string(num_kv_heads_) + ", ...]",
                             {num_layers_, num_kv_heads_, -1});
  }

  std::vector<HeadRule> head_rules(const py::object& windows,
                                   const py::object& sinks,
                                   const std::string& caller) const {
    const std::vector<int32_t> window = head_matrix<int32_t>(windows, caller + ": windows");
    const std::vector<int32_t> sink = head_matrix<int32_t>(sinks, caller + ": sinks");
    std::vector<HeadRule> rules(window.size());
    for (size_t row = 0; row < rules.size(); ++row) {
      rules[row] = {.window = window[row], .sink = sink[row]};
    }
    return rules;
  }

  py::array index_list(std::vector<int32_t>&& values) const {
    const auto count = static_cast<py::ssize_t>(values.size());
    return to_numpy<int32_t>(std::move(values), {count});
  }

  py::array per_head(std::vector<int64_t>&& slots) const {
    const auto num_tokens = static_cast<py::ssize_t>(slots.size()) / num_kv_heads_;
    return to_numpy<int64_t>(std::move(slots), {num_tokens, num_kv_heads_});
  }

  py::ssize_t num_layers_;
  py::ssize_t num_kv_heads_;
  bool poisons_;
  SegmentAllocator core_;
};

// A method of the core that needs no conversion.
template <typename Result, typename... Args>
auto direct(Result (SegmentAllocator::*method)(Args...)) {
  return [method](Allocator& self, Args... args) {
    return unlocked([&] { return (self.core().*method)(args...); });
  };
}

template <typename Result, typename... Args>
auto direct(Result (SegmentAllocator::*method)(Args...) const) {
  return [method](Allocator& self, Args... args) {
    return unlocked([&] { return (self.core().*method)(args...); });
  };
}

}  // namespace

PYBIND11_MODULE(_memory, module) {
  module.doc() = "Pages, head segments and session rows of one device.";
  module.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("num_bytes"));

  // A plain Python exception, so that the attributes travel with it (pickle included).
  py::object out_of_pages = py::reinterpret_steal<py::object>(
      PyErr_NewExceptionWithDoc("redknot._memory.OutOfPages",
                                "A call needs more pages than are free; it changed nothing.",
                                PyExc_RuntimeError,
                                nullptr));
  if (!out_of_pages) throw py::error_already_set();
  module.attr("OutOfPages") = out_of_pages;
  out_of_pages_type = out_of_pages.release();

  using py::arg;
  py::class_<Allocator>(module, "SegmentAllocator")
      .def(py::init<int32_t,
                    int32_t,
                    int32_t,
                    int32_t,
                    int64_t,
                    const std::vector<RegionTuple>&,
                    std::optional<bool>>(),
           arg("num_layers"),
           arg("num_kv_heads"),
           arg("num_pages"),
           arg("page_size"),
           arg("bytes_per_page"),
           arg("storage") = std::vector<RegionTuple>(),
           arg("poison") = py::none())
      .def_property_readonly("poisons_freed_pages", &Allocator::poisons)
      .def("create_segment",
           &Allocator::create_segment,
           arg("num_tokens"),
           arg("first_position"),
           arg("present") = py::none())
      .def("drop_segment_pages", &Allocator::drop_segment_pages, arg("segment"), arg("pages"))
      .def("restore_segment_pages", &Allocator::restore_segment_pages, arg("segment"), arg("pages"))
      .def_property_readonly("hole_page", [](Allocator& self) { return self.core().hole_page(); })
      .def("release_segment", direct(&SegmentAllocator::release_segment), arg("segment"))
      .def("segment_slots", &Allocator::segment_slots, arg("segment"), arg("layer"))
      .def("create_session", &Allocator::create_session, arg("windows"), arg("sinks"))
      .def("release_session", direct(&SegmentAllocator::release_session), arg("session"))
      .def("fork_session", direct(&SegmentAllocator::fork_session), arg("session"))
      .def("session_length", direct(&SegmentAllocator::session_length), arg("session"))
      .def("append_segment",
           direct(&SegmentAllocator::append_segment),
           arg("session"),
           arg("segment"))
      .def("append_tokens",
           &Allocator::append_tokens,
           arg("sessions"),
           arg("num_tokens"),
           arg("expire_first") = false)
      .def("append_layer",
           &Allocator::append_layer,
           arg("sessions"),
           arg("num_tokens"),
           arg("layer"))
      .def("expire_layer", direct(&SegmentAllocator::expire_layer), arg("session"), arg("layer"))
      .def("layerwise_pages", &Allocator::layerwise_pages, arg("sessions"), arg("num_tokens"))
      .def("tail_slots", &Allocator::tail_slots, arg("session"), arg("layer"), arg("num_tokens"))
      .def("make_writable",
           &Allocator::make_writable,
           arg("session"),
           arg("requests"),
           arg("keep_contents") = false)
      .def("position_slots",
           &Allocator::position_slots,
           arg("session"),
           arg("layer"),
           arg("positions"))
      .def("expire", direct(&SegmentAllocator::expire), arg("session"))
      .def("truncate", direct(&SegmentAllocator::truncate), arg("session"), arg("length"))
      .def("change_rules", &Allocator::change_rules, arg("session"), arg("windows"), arg("sinks"))
      .def("growth_pages", &Allocator::growth_pages, arg("sessions"), arg("num_tokens"))
      .def("exclusive_pages", &Allocator::exclusive_pages, arg("sessions"))
      .def("swap_out", &Allocator::swap_out, arg("sessions"), arg("pages"))
      .def("swap_in", &Allocator::swap_in, arg("session"))
      .def("grow", &Allocator::grow, arg("num_pages"), arg("storage") = std::vector<RegionTuple>())
      .def("rows", &Allocator::rows, arg("sessions"), arg("layer"))
      .def("session_pages", direct(&SegmentAllocator::session_pages), arg("session"))
      .def(
          "session_private_pages", direct(&SegmentAllocator::session_private_pages), arg("session"))
      .def(
          "session_swapped_pages", direct(&SegmentAllocator::session_swapped_pages), arg("session"))
      .def("free_pages", direct(&SegmentAllocator::free_pages))
      .def("stats", &Allocator::stats);
}

}  // namespace redknot::binding
