#pragma once

// The executor's state while a launch runs; the functions of simt.hpp act on the one Machine.
#include <csetjmp>
#include <exception>
#include <map>
#include <random>

#include "fiber.hpp"
#include "simt.hpp"

namespace simt {

struct PendingCopy {
  char* destination;
  const char* source;
  int bytes;
  int source_bytes;
  uint64_t group;
};

std::string name_of(const Where& where);
void install_fault_handler();

// --- sm_90
// ----------------------------------------------------------------------------------------
// Where the dynamic part of shared memory begins on the hardware.
constexpr uint32_t kFirstAddress = 1024;
constexpr uint32_t kRowBytes = 128;  // of the swizzle
constexpr int kWarpgroup = 128;

struct PendingProduct {
  Product product;
  uint32_t a[4];
  uint64_t group;
  uint64_t checksum;  // of its operands when it was issued, in the warpgroup's first thread
};

// What a thread's d holds while products on it are under way.
struct Accumulator {
  float* d;
  std::vector<float> value;
  int num_products;
};

struct EngineCopy {
  char* destination;
  const char* source;  // null: a box of `map`
  uint32_t bytes;
  TensorMap map;
  std::array<int32_t, 4> begin;
  const void* barrier;
};

struct Fiber;

struct PhaseBarrier {
  uint32_t arrivals;  // of every phase
  uint32_t missing;   // of this phase
  int64_t bytes = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiters;
};

struct NamedBarrier {
  int threads = 0;
  int arrived = 0;
  std::vector<Fiber*> waiters;
};

struct WarpgroupWait {
  int arrived = 0;
  int pending = 0;
};

struct Fiber {
  enum class State { kReady, kWaiting, kDone };

  Context context;
  State state = State::kReady;
  uint3 thread;
  unsigned warp = 0;
  unsigned lane = 0;
  const char* waits_in = nullptr;  // what it waits in, and where
  Where waits_at;
  uint64_t open_group = 0;  // copies issued now belong to this group
  std::vector<PendingCopy> copies;
  uint64_t open_products = 0;  // the group of products issued now
  bool is_fenced = false;
  std::vector<PendingProduct> products;
  std::vector<Accumulator> accumulators;
  void* tsan = nullptr;
};

// A rendezvous that not all lanes of its mask have reached.
struct Meeting {
  const char* operation;
  Where where;
  uint32_t mask;
  uint32_t arrived = 0;
  void* arguments[32] = {};
  Complete complete = nullptr;
};

struct Warp {
  uint32_t ready = 0;
  uint32_t done = 0;
  uint32_t lanes = 0;
  std::vector<Meeting> meetings;
};

class Machine {
 public:
  static Machine& get();

  void run(const Launch& launch, const std::function<void()>& kernel);
  bool running() const { return current_ != nullptr; }
  Fiber& current() { return *current_; }

  void meet(const char* operation, uint32_t mask, void* argument, Complete, const Where&);
  void barrier(const Where& where);
  void yield();
  // Takes the running fiber off until wake(): for loops that test a condition.
  void block(const char* operation, const Where& where);
  void wake(Fiber& fiber);
  Fiber& fiber(size_t index) { return fibers_[index]; }
  size_t num_fibers() const { return fibers_.size(); }
  const Schedule& schedule() const { return schedule_; }
  std::mt19937_64& random() { return random_; }
  void check_smem(const void* address, size_t num_bytes, size_t alignment, const Where&) const;
  unsigned char* smem() { return smem_.data() + smem_.size() - smem_bytes_; }
  // "block (0, 0, 0), thread (3, 0, 0): " for the start of a message.
  std::string here() const;
  [[noreturn]] void fault(void* address);

  size_t smem_bytes() const { return smem_bytes_; }

  std::map<const char*, Region*> regions;  // by begin

  // sm90.cpp, wgmma.cpp
  void start_block_sm90();
  bool end_something();
  void end_products(size_t warpgroup);
  void publish_fenced();
  void end_block_sm90() const;
  std::map<const void*, PhaseBarrier> phase_barriers;
  std::array<NamedBarrier, 16> named_barriers;
  std::vector<WarpgroupWait> warpgroup_waits;
  std::vector<EngineCopy> engine_copies;
  std::vector<size_t> ready_products;     // warpgroups of which all threads wait for products
  std::vector<unsigned char> async_view;  // shared memory as wgmma sees it
  bool is_fence_pending = false;

 private:
  void run_block();
  void prepare_fibers();
  Fiber* pick();
  Fiber& lane_of(unsigned warp, uint32_t ready);
  void wait(const char* operation, const Where& where);
  void make_ready(unsigned warp, uint32_t mask);
  [[noreturn]] void report_deadlock() const;
  static void fiber_main();

  const std::function<void()>* kernel_ = nullptr;
  Schedule schedule_;
  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> smem_;
  size_t smem_bytes_ = 0;
  Context scheduler_;
  Fiber* current_ = nullptr;
  unsigned last_warp_ = 0;
  size_t num_done_ = 0;
  size_t num_at_barrier_ = 0;
  Where barrier_at_;
  std::exception_ptr error_;
  sigjmp_buf fault_exit_;
  std::string fault_;
  void* tsan_scheduler_ = nullptr;
};

[[noreturn]] inline void refuse(const std::string& why) {
  throw Error(Machine::get().here() + why);
}

}  // namespace simt
