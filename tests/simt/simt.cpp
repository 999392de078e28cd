// Blocks, warps, barriers and the schedule.
#include "simt.hpp"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "machine.hpp"
#include "tsan.hpp"

namespace simt {
namespace {

// Shared memory that a block of an H100 can have at most.
constexpr size_t kMaxSmemBytes = 227 << 10;
constexpr uintptr_t kSmemAlignment = 1024;
constexpr uint64_t kPreemptionInterval = 64;
// Of a block; tests need a tenth of it.
constexpr uint64_t kMostSwitches = 5'000'000;

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

// "0-3,8" for bits of a mask.
std::string lanes_in(uint32_t mask) {
  std::string text;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    int last = lane;
    while (last < 31 && (mask >> (last + 1) & 1)) ++last;
    text += (text.empty() ? "" : ",") + std::to_string(lane);
    if (last > lane) text += "-" + std::to_string(last);
    lane = last;
  }
  return text;
}

}  // namespace

std::string name_of(const Where& where) {
  const std::string path = where.file_name();
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

Machine& Machine::get() {
  static Machine machine;
  return machine;
}

std::string Machine::here() const {
  std::ostringstream text;
  text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << "), thread ("
       << threadIdx.x << ", " << threadIdx.y << ", " << threadIdx.z << "): ";
  return text.str();
}

// --- launch and block
// -----------------------------------------------------------------------------
void Machine::run(const Launch& launch, const std::function<void()>& kernel) {
  install_fault_handler();
  kernel_ = &kernel;
  schedule_ = launch.schedule;
  random_.seed(launch.schedule.seed);
  blockDim = launch.block;
  gridDim = launch.grid;
  smem_bytes_ = (launch.smem_bytes + 127) & ~size_t{127};
  if (smem_bytes_ > kMaxSmemBytes) throw Error("more shared memory than a block can have");
  smem_.reserve(kMaxSmemBytes + kSmemAlignment);
  // Ends at the end of the vector and begins where RK_DYNAMIC_SMEM promises.
  const auto base = reinterpret_cast<uintptr_t>(smem_.data());
  smem_.resize(((base + kSmemAlignment - 1) & ~(kSmemAlignment - 1)) - base + smem_bytes_);
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block();
      }
    }
  }
}

void Machine::prepare_fibers() {
  const size_t count = size_t{blockDim.x} * blockDim.y * blockDim.z;
  if (count == 0 || count > 1024) throw Error("a block has 1 to 1024 threads");
  fibers_.resize(count);
  warps_.assign((count + 31) / 32, Warp{});
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.state = Fiber::State::kReady;
    fiber.thread = {static_cast<unsigned>(i % blockDim.x),
                    static_cast<unsigned>(i / blockDim.x % blockDim.y),
                    static_cast<unsigned>(i / blockDim.x / blockDim.y)};
    fiber.warp = static_cast<unsigned>(i / 32);
    fiber.lane = static_cast<unsigned>(i % 32);
    fiber.open_group = 0;
    fiber.copies.clear();
    fiber.copies.reserve(256);
    fiber.open_products = 0;
    fiber.is_fenced = false;
    fiber.products.clear();
    fiber.accumulators.clear();
    char* end = stack_end(i);
    std::memset(end - kPoisonedStackBytes, 0xff, kPoisonedStackBytes);
    fiber.context.prepare(end, &fiber_main);
    tsan::destroy_fiber(&fiber.tsan);  // of an earlier block, however that ended
    tsan::create_fiber(&fiber.tsan);
    warps_[fiber.warp].ready |= 1u << fiber.lane;
    warps_[fiber.warp].lanes |= 1u << fiber.lane;
    warps_[fiber.warp].meetings.reserve(4);
  }
}

void Machine::run_block() {
  prepare_fibers();
  if (smem_bytes_ > 0) std::memset(smem(), 0xff, smem_bytes_);
  start_block_sm90();
  num_done_ = 0;
  num_at_barrier_ = 0;
  last_warp_ = schedule_.order == Order::kDescending ? warps_.size() - 1 : 0;
  error_ = nullptr;
  tsan::current_fiber(&tsan_scheduler_);
  tsan::release(&num_done_);
  if (sigsetjmp(fault_exit_, 1) != 0) {
    current_ = nullptr;
    tsan::switch_to(tsan_scheduler_);
    throw Error(fault_);
  }
  const uint64_t most_switches = counters.switches + kMostSwitches;
  while (num_done_ < fibers_.size()) {
    Fiber* next = pick();
    while (next == nullptr && end_something()) next = pick();
    if (next == nullptr) report_deadlock();
    current_ = next;
    threadIdx = next->thread;
    if (++counters.switches > most_switches) throw Error(here() + "its block does not end");
    tsan::switch_to(next->tsan);
    scheduler_.switch_to(next->context);
    current_ = nullptr;
    if (error_) std::rethrow_exception(error_);  // the other fibers are left where they are
  }
  tsan::acquire(&num_at_barrier_);
  end_block_sm90();
}

// Runs on the fiber's own stack and never returns.
void Machine::fiber_main() {
  Machine& machine = get();
  Fiber& self = *machine.current_;
  tsan::acquire(&machine.num_done_);
  try {
    (*machine.kernel_)();
    if (!self.copies.empty()) {
      throw Error(machine.here() + "exits with copies that it has not waited for");
    }
    if (!self.products.empty()) {
      throw Error(machine.here() + "exits with products that it has not waited for");
    }
  } catch (...) {
    machine.error_ = std::current_exception();
  }
  // Not the object of the launch's start: an exit must not order a later thread behind it.
  tsan::release(&machine.num_at_barrier_);
  self.state = Fiber::State::kDone;
  Warp& warp = machine.warps_[self.warp];
  warp.done |= 1u << self.lane;
  warp.ready &= ~(1u << self.lane);
  ++machine.num_done_;
  tsan::switch_to(machine.tsan_scheduler_);
  self.context.switch_to(machine.scheduler_);
}

// --- the schedule -----------------------------------------------------------------------------
Fiber& Machine::lane_of(unsigned warp, uint32_t ready) {
  unsigned lane = 0;
  if (schedule_.order == Order::kAscending) lane = __builtin_ctz(ready);
  if (schedule_.order == Order::kDescending) lane = 31 - __builtin_clz(ready);
  if (schedule_.order == Order::kRandom) {
    for (auto skip = random_() % __builtin_popcount(ready); skip > 0; --skip) ready &= ready - 1;
    lane = __builtin_ctz(ready);
  }
  return fibers_[warp * 32 + lane];
}

// nullptr: every thread waits or is done.
Fiber* Machine::pick() {
  const bool is_random = schedule_.order == Order::kRandom;
  const bool stays = !is_random || random_() % kPreemptionInterval != 0;
  if (!stays || warps_[last_warp_].ready == 0) {
    std::vector<unsigned> ready;
    for (unsigned w = 0; w < warps_.size(); ++w) {
      if (warps_[w].ready != 0) ready.push_back(w);
    }
    if (ready.empty()) return nullptr;
    last_warp_ = is_random ? ready[random_() % ready.size()]
                           : (schedule_.order == Order::kAscending ? ready.front() : ready.back());
  }
  return &lane_of(last_warp_, warps_[last_warp_].ready);
}

void Machine::make_ready(unsigned warp, uint32_t mask) {
  warps_[warp].ready |= mask;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) fibers_[warp * 32 + lane].state = Fiber::State::kReady;
  }
}

// Back to the scheduler until somebody makes this fiber ready; it may be so already.
void Machine::wait(const char* operation, const Where& where) {
  Fiber& self = *current_;
  self.waits_in = operation;
  self.waits_at = where;
  tsan::switch_to(tsan_scheduler_);
  self.context.switch_to(scheduler_);
}

void Machine::yield() { wait("yield", Where::current()); }

void Machine::block(const char* operation, const Where& where) {
  Fiber& self = *current_;
  self.state = Fiber::State::kWaiting;
  warps_[self.warp].ready &= ~(1u << self.lane);
  wait(operation, where);
}

void Machine::wake(Fiber& fiber) { make_ready(fiber.warp, 1u << fiber.lane); }

// --- where threads meet
// ---------------------------------------------------------------------------
void Machine::meet(
    const char* operation, uint32_t mask, void* argument, Complete complete, const Where& where) {
  Fiber& self = *current_;
  Warp& warp = warps_[self.warp];
  const uint32_t bit = 1u << self.lane;
  const auto refuse = [&](const std::string& why) {
    throw Error(here() + operation + " at " + name_of(where) + ": " + why);
  };
  mask &= warp.lanes;  // a last warp that is not full
  if (!(mask & bit)) refuse("the calling lane is not in its mask");
  if (mask & warp.done) refuse("lanes " + lanes_in(mask & warp.done) + " of its mask have exited");

  const bool orders_memory = std::strcmp(operation, "__syncwarp") == 0;
  if (orders_memory) tsan::release(&warp);
  auto found = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](const Meeting& m) {
    return (m.mask & mask) != 0;
  });
  if (found == warp.meetings.end()) {
    warp.meetings.push_back({operation, where, mask, 0, {}, complete});
    found = warp.meetings.end() - 1;
  } else if (found->mask != mask || !same_place(found->where, where) ||
             std::strcmp(found->operation, operation) != 0) {
    refuse("lanes " + lanes_in(found->arrived) + " of the warp wait in " + found->operation +
           " at " + name_of(found->where) + " for lanes " + lanes_in(found->mask));
  }
  found->arrived |= bit;
  found->arguments[self.lane] = argument;
  if (found->arrived == mask) {
    publish_fenced();
    const Meeting meeting = *found;
    warp.meetings.erase(found);
    if (meeting.complete != nullptr) meeting.complete(meeting.arguments, mask);
    make_ready(self.warp, mask);  // this lane too: else it would always be the first to go on
  } else {
    self.state = Fiber::State::kWaiting;
    warp.ready &= ~bit;
  }
  wait(operation, where);
  if (orders_memory) tsan::acquire(&warp);
}

void Machine::barrier(const Where& where) {
  Fiber& self = *current_;
  if (num_at_barrier_ == 0) {
    barrier_at_ = where;
  } else if (!same_place(barrier_at_, where)) {
    throw Error(here() + "__syncthreads at " + name_of(where) + ", others wait in that at " +
                name_of(barrier_at_));
  }
  tsan::release(&barrier_at_);
  self.state = Fiber::State::kWaiting;
  warps_[self.warp].ready &= ~(1u << self.lane);
  if (++num_at_barrier_ == fibers_.size()) {
    publish_fenced();
    num_at_barrier_ = 0;
    for (unsigned w = 0; w < warps_.size(); ++w) make_ready(w, warps_[w].lanes);
  }
  wait("__syncthreads", where);
  tsan::acquire(&barrier_at_);
}

void Machine::report_deadlock() const {
  std::ostringstream text;
  text << "deadlock in block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ")";
  for (size_t w = 0; w < warps_.size(); ++w) {
    std::map<std::string, uint32_t> groups;
    for (unsigned lane = 0; lane < 32 && w * 32 + lane < fibers_.size(); ++lane) {
      const Fiber& fiber = fibers_[w * 32 + lane];
      const bool done = fiber.state == Fiber::State::kDone;
      groups[done ? std::string("have exited")
                  : std::string("wait in ") + fiber.waits_in + " at " + name_of(fiber.waits_at)] |=
          1u << lane;
    }
    for (const auto& [what, lanes] : groups) {
      text << "\n  warp " << w << ": lanes " << lanes_in(lanes) << " " << what;
    }
  }
  throw Error(text.str());
}

// --- simt.hpp
// -------------------------------------------------------------------------------------
std::string name_of(const Schedule& schedule) {
  if (schedule.order == Order::kAscending) return "ascending";
  if (schedule.order == Order::kDescending) return "descending";
  return "random " + std::to_string(schedule.seed);
}

void launch(const Launch& launch, const std::function<void()>& kernel) {
  Machine::get().run(launch, kernel);
}
unsigned char* dynamic_smem() { return Machine::get().smem(); }
void yield() { Machine::get().yield(); }
void block_barrier(const Where& where) { Machine::get().barrier(where); }
void rendezvous(
    const char* operation, uint32_t mask, void* argument, Complete complete, const Where& where) {
  Machine::get().meet(operation, mask, argument, complete, where);
}

}  // namespace simt
