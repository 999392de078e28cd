// Refreshing a session's keys and values in place: pages that others see too are replaced first.
#include <algorithm>

#include "allocator_impl.h"
#include "redknot/segment_allocator.h"

namespace redknot {

using memory::end_position;
using memory::PageExchange;
using memory::require;
using memory::Row;
using memory::Session;

namespace {

// Calls use(ref, count) for each page of the row that holds `count` >= 1 of the positions. Both
// sides rise, so each step searches only what is left.
template <typename Use>
void for_each_touched(Row& row, const std::vector<int64_t>& positions, const Use& use) {
  const std::span<PageRef> refs = row.refs();
  auto ref = refs.begin();
  auto position = positions.begin();
  while (position != positions.end()) {
    ref = std::partition_point(
        ref, refs.end(), [&](const PageRef& r) { return end_position(r) <= *position; });
    if (ref == refs.end()) return;
    const auto first = std::lower_bound(position, positions.end(), ref->first_position);
    position = std::lower_bound(first, positions.end(), end_position(*ref));
    if (position != first) use(*ref, position - first);
  }
}

}  // namespace

AllocResult SegmentAllocator::make_writable(SessionId session,
                                            const std::vector<WriteRequest>& requests,
                                            std::vector<PageCopy>* copies,
                                            bool keep_contents) {
  copies->clear();
  const std::lock_guard lock(impl_->mutex);
  Session& found = impl_->find_session("make_writable", session);
  impl_->require_whole("make_writable", session, found);
  const size_t num_rows = found.rows.size();
  std::vector<uint8_t> requested(num_rows, 0);
  for (size_t i = 0; i < requests.size(); ++i) {
    const std::vector<uint8_t>& mask = requests[i].head_mask;
    require(mask.size() == num_rows,
            "make_writable: requests[",
            i,
            "].head_mask must be [num_layers * num_kv_heads] = [",
            num_rows,
            "], got [",
            mask.size(),
            "]");
    memory::require_positions("make_writable", requests[i].positions, found.length);
    for (size_t row = 0; row < num_rows; ++row) {
      require(!mask[row] || !requested[row],
              "make_writable: requests[",
              i,
              "].head_mask names layer ",
              row / impl_->config.num_kv_heads,
              ", head ",
              row % impl_->config.num_kv_heads,
              ", which an earlier request names too");
      requested[row] |= mask[row];
    }
  }

  struct Replacement {
    PageRef* ref;
    bool copy;
  };
  std::vector<Replacement> replacements;
  PageExchange exchange(impl_->pool);
  for (const WriteRequest& request : requests) {
    for (size_t row = 0; row < num_rows; ++row) {
      if (!request.head_mask[row]) continue;
      for_each_touched(found.rows[row], request.positions, [&](PageRef& ref, int64_t count) {
        if (impl_->pool.ref_count(ref.page) == 1) return;
        replacements.push_back({.ref = &ref, .copy = keep_contents || count < ref.num_valid});
        exchange.drop(ref.page);
        exchange.need(1);
      });
    }
  }
  copies->reserve(replacements.size());
  const AllocResult result = exchange.settle();
  if (result.status != AllocStatus::kOk) return result;
  for (const Replacement& replacement : replacements) {
    const int32_t page = impl_->pool.take();
    if (replacement.copy) {
      copies->push_back({.source = replacement.ref->page, .destination = page});
    }
    replacement.ref->page = page;
  }
  return result;
}

}  // namespace redknot
