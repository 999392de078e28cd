// What sm_90 adds: barriers with phases, named barriers, the copy engine; wgmma.cpp has products.
#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace simt {
namespace {

// --- barriers
// -------------------------------------------------------------------------------------
PhaseBarrier& barrier_at(const void* address) {
  auto& barriers = Machine::get().phase_barriers;
  const auto found = barriers.find(address);
  if (found == barriers.end()) refuse("use of an mbarrier that nobody initialised");
  return found->second;
}

void end_phase_if_over(PhaseBarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  Machine::get().publish_fenced();
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  for (Fiber* fiber : barrier.waiters) Machine::get().wake(*fiber);
  barrier.waiters.clear();
}

}  // namespace

void init_barrier(void* barrier, uint32_t arrivals, const Where& where) {
  Machine& machine = Machine::get();
  machine.check_smem(barrier, 8, 8, where);
  if (arrivals == 0) refuse("an mbarrier of no arrivals");
  machine.phase_barriers[barrier] = {.arrivals = arrivals, .missing = arrivals, .waiters = {}};
}

void arrive(void* address, uint32_t bytes, const Where&) {
  if (has_fault(Fault::kNoArrival)) return;
  if (has_fault(Fault::kTooFewBytes) && bytes > 0) bytes -= 16;
  PhaseBarrier& barrier = barrier_at(address);
  if (barrier.missing == 0) refuse("more arrivals at an mbarrier than its count");
  barrier.bytes += bytes;
  --barrier.missing;
  end_phase_if_over(barrier);
}

void wait_barrier(void* address, uint32_t parity, const Where& where) {
  Machine& machine = Machine::get();
  if (parity > 1) refuse("a parity is 0 or 1");
  if (has_fault(Fault::kNoPhaseWait)) return;
  if (has_fault(Fault::kWrongParity)) parity ^= 1;
  // Asked anew whenever this thread gets to run: who comes two phases late waits, as on the device.
  while (true) {
    PhaseBarrier& barrier = barrier_at(address);
    if (barrier.phase % 2 != parity) return;
    barrier.waiters.push_back(&machine.current());
    machine.block("mbarrier wait", where);
  }
}

void named_barrier(int number, int threads, bool waits, const Where& where) {
  Machine& machine = Machine::get();
  if (has_fault(Fault::kNoNamedBarrier)) return;
  if (number < 1 || number > 15) refuse("named barriers are 1 to 15");
  if (threads <= 0 || threads % 32 != 0) refuse("a named barrier counts whole warps");
  NamedBarrier& barrier = machine.named_barriers[number];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    refuse("threads disagree on how many meet at a named barrier");
  }
  barrier.threads = threads;
  if (++barrier.arrived == threads) {
    machine.publish_fenced();
    for (Fiber* fiber : barrier.waiters) machine.wake(*fiber);
    barrier = {};
    if (waits) machine.yield();  // else the last one would always be the first to go on
  } else if (waits) {
    barrier.waiters.push_back(&machine.current());
    machine.block("named barrier", where);
  }
}

// --- the copy engine
// ------------------------------------------------------------------------------
namespace {

void write_both(char* destination, const char* source, size_t bytes) {
  Machine& machine = Machine::get();
  std::memcpy(destination, source, bytes);
  const size_t offset = reinterpret_cast<unsigned char*>(destination) - machine.smem();
  std::memcpy(machine.async_view.data() + offset, source, bytes);
}

void issue(EngineCopy copy) {
  static const std::vector<char> poison(256 << 10, '\xff');
  barrier_at(copy.barrier);
  write_both(copy.destination, poison.data(), copy.bytes);
  Machine::get().engine_copies.push_back(copy);
}

void land_row(char* destination, const EngineCopy& copy, const std::array<int64_t, 4>& at) {
  const TensorMap& map = copy.map;
  bool is_inside = true;
  int64_t offset = 0;
  for (int i = 1; i < map.rank; ++i) {
    is_inside = is_inside && at[i] >= 0 && at[i] < static_cast<int64_t>(map.size[i]);
    offset += at[i] * static_cast<int64_t>(map.stride_bytes[i]);
  }
  char row[kRowBytes] = {};
  for (int64_t i = 0; is_inside && i < kRowBytes / 2; ++i) {
    const int64_t column = at[0] + i;
    if (column < 0 || column >= static_cast<int64_t>(map.size[0])) continue;
    check_global(map.base + offset + 2 * column, 2, Where::current());
    std::memcpy(row + 2 * i, map.base + offset + 2 * column, 2);
  }
  const uint32_t turn =
      sabotage.fault == Fault::kNoSwizzle ? 0 : shared_address(destination) / kRowBytes % 8;
  for (uint32_t v = 0; v < 8; ++v) write_both(destination + 16 * (v ^ turn), row + 16 * v, 16);
}

void land(const EngineCopy& copy) {
  if (copy.source != nullptr) {
    write_both(copy.destination, copy.source, copy.bytes);
  } else {
    const auto& box = copy.map.box;
    char* destination = copy.destination;
    std::array<int64_t, 4> at = {copy.begin[0], 0, 0, 0};
    for (uint32_t w = 0; w < box[3]; ++w) {
      at[3] = int64_t{copy.begin[3]} + w;
      for (uint32_t z = 0; z < box[2]; ++z) {
        at[2] = int64_t{copy.begin[2]} + z;
        for (uint32_t y = 0; y < box[1]; ++y, destination += kRowBytes) {
          at[1] = int64_t{copy.begin[1]} + y;
          land_row(destination, copy, at);
        }
      }
    }
  }
  PhaseBarrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= copy.bytes;
  end_phase_if_over(barrier);
}

}  // namespace

uint32_t shared_address(const void* smem) {
  const auto* at = static_cast<const unsigned char*>(smem);
  return static_cast<uint32_t>(at - Machine::get().smem()) + kFirstAddress;
}

void bulk_load(void* smem, const void* source, uint32_t bytes, void* barrier, const Where& where) {
  Machine::get().check_smem(smem, bytes, 16, where);
  check_global(source, bytes, where);
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    refuse("a bulk copy is of multiples of 16 bytes");
  }
  issue({static_cast<char*>(smem), static_cast<const char*>(source), bytes, {}, {}, barrier});
}

void load_box(void* smem,
              const TensorMap& map,
              void* barrier,
              const std::array<int32_t, 4>& begin,
              int rank,
              const Where& where) {
  if (map.rank != rank) refuse("coordinates of another rank than the tensor map's");
  const uint32_t bytes = kRowBytes * map.box[1] * map.box[2] * map.box[3];
  Machine::get().check_smem(smem, bytes, kRowBytes, where);
  check_global(map.base, 1, where);
  std::array<int32_t, 4> at = begin;
  if (has_fault(Fault::kWrongColumn)) at[0] += 8;
  if (has_fault(Fault::kWrongSlot)) at[1] += 1;
  if (has_fault(Fault::kWrongPage)) at[2] += 1;
  issue({static_cast<char*>(smem), nullptr, bytes, map, at, barrier});
}

// One copy, or the products that a warpgroup waits for: from the front, from the back or any.
bool Machine::end_something() {
  const size_t num_copies = engine_copies.size();
  const size_t count = num_copies + ready_products.size();
  if (count == 0) return false;
  size_t next = 0;
  if (schedule_.order == Order::kDescending) next = count - 1;
  if (schedule_.order == Order::kRandom) next = random_() % count;
  if (next < num_copies) {
    const EngineCopy copy = engine_copies[next];
    engine_copies.erase(engine_copies.begin() + static_cast<ptrdiff_t>(next));
    land(copy);
  } else {
    const size_t warpgroup = ready_products[next - num_copies];
    ready_products.erase(ready_products.begin() + static_cast<ptrdiff_t>(next - num_copies));
    end_products(warpgroup);
  }
  return true;
}

void Machine::start_block_sm90() {
  phase_barriers.clear();
  named_barriers = {};
  warpgroup_waits.assign(fibers_.size() / kWarpgroup, {});
  engine_copies.clear();
  ready_products.clear();
  is_fence_pending = false;
  async_view.assign(smem_bytes_, 0xff);
}

void Machine::end_block_sm90() const {
  if (!engine_copies.empty()) throw Error("a block exits while the engine copies for it");
}

void fence_async_proxy() {
  if (!has_fault(Fault::kNoProxyFence)) Machine::get().is_fence_pending = true;
}

// A fence of each of many threads would be as many copies of shared memory: there is one, where
// threads meet next or a product reads. What is written in between without a fence of its own is
// taken along.
void Machine::publish_fenced() {
  if (!is_fence_pending) return;
  is_fence_pending = false;
  std::memcpy(async_view.data(), smem(), smem_bytes_);
}

}  // namespace simt
