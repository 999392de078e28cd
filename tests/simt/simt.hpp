#pragma once

// Runs CUDA kernels on the CPU: one fiber per CUDA thread, blocks one after another, no GPU and no
// CUDA toolkit. The kernel source is what nvcc compiles; -DRK_SIMT replaces the PTX of its wrappers
// (csrc/cuda/ptx) by the functions below, include/ the few CUDA headers.
//
// It is made to find mistakes, not to be fast: what nobody wrote reads as NaN (shared memory,
// stacks, buffers), an asynchronous copy poisons its destination when issued and lands only at the
// wait that needs it, warps interleave as a schedule says, and whatever the hardware leaves
// undefined ends in an Error with file, line, block and thread.
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// --- what CUDA provides in every source file ----------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Rewritten whenever another fiber runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

using Where = std::source_location;

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Which of the warps that could run does: one keeps running until all its lanes wait. Ascending and
// descending give every two warps both orders between two barriers; random also takes a warp off in
// between.
enum class Order { kAscending, kDescending, kRandom };
struct Schedule {
  Order order = Order::kAscending;
  uint64_t seed = 0;
};
inline constexpr Schedule kSchedules[] = {{Order::kAscending},
                                          {Order::kDescending},
                                          {Order::kRandom, 1},
                                          {Order::kRandom, 2},
                                          {Order::kRandom, 3}};
std::string name_of(const Schedule& schedule);

struct Launch {
  dim3 grid;
  dim3 block;
  size_t smem_bytes = 0;
  Schedule schedule = {};
};

// Runs `kernel` once per thread of the grid. Throws the first Error of any of them.
void launch(const Launch& launch, const std::function<void()>& kernel);

// A fault of kernels that are right, for tests of who would notice it: what it names goes wrong in
// the warps first_warp to last_warp of every block.
enum class Fault {
  kNone,
  kNoPhaseWait,     // wait_barrier returns at once,
  kWrongParity,     // or waits for the other phase
  kTooFewBytes,     // 16 less are announced
  kNoArrival,       // at barriers with phases
  kNoNamedBarrier,  // returns at once
  kNoProxyFence,
  kNoWarpBarrier,  // __syncwarp returns at once
  kWrongColumn,    // boxes begin 8 columns,
  kWrongSlot,      // one row
  kWrongPage,      // or one page further on
  kNoSwizzle,      // of boxes
};
struct Sabotage {
  Fault fault = Fault::kNone;
  unsigned first_warp = 0;
  unsigned last_warp = 31;
};
inline Sabotage sabotage;
// Whether the calling thread goes wrong in this way.
inline bool has_fault(Fault fault) {
  if (sabotage.fault != fault) return false;
  const unsigned warp = threadIdx.x / 32;
  return sabotage.first_warp <= warp && warp <= sabotage.last_warp;
}

// What launches did since the start of the process.
struct Counters {
  uint64_t switches = 0;
  uint64_t mmas = 0;
  uint64_t wgmmas = 0;
};
inline Counters counters;

// Memory of the device: NaN until written, known to checked accesses, an inaccessible page behind
// its end and before its beginning.
class Region {
 public:
  Region(std::string name, size_t num_bytes);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::string name;
  char* begin = nullptr;  // 16-byte aligned
  size_t num_bytes = 0;
  char* mapping = nullptr;
  size_t mapping_bytes = 0;
};

template <typename T>
class Buffer {
 public:
  Buffer(std::string name, size_t count) : region_(std::move(name), count * sizeof(T)) {
    count_ = count;
  }
  Buffer(std::string name, const std::vector<T>& values) : Buffer(std::move(name), values.size()) {
    for (size_t i = 0; i < count_; ++i) data()[i] = values[i];
  }
  T* data() { return reinterpret_cast<T*>(region_.begin); }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data()[i]; }
  T* begin() { return data(); }
  T* end() { return data() + count_; }

 private:
  Region region_;
  size_t count_ = 0;
};

// --- twins of what csrc/cuda/ptx wraps ----------------------------------------------------------
unsigned char* dynamic_smem();
// bytes from `source`, zeros behind source_bytes of them.
void copy_async(void* smem, const void* source, int bytes, int source_bytes, const Where& where);
void copy_commit();
// Lands all but the newest `pending` groups of this thread.
void copy_wait(int pending);
// Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
void load_matrix_x4(uint32_t (&registers)[4], const void* row, bool transposed, const Where& where);
enum class Half { kBFloat16, kFloat16 };
// d[16x8] += a[16x16] b[16x8], fp32 sums.
void mma_16816(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half type, const Where& where);
// Ends the launch unless a registered buffer holds the bytes.
void check_global(const void* address, size_t num_bytes, const Where& where);
// Ends the launch with `message` unless the condition holds.
void check(bool condition, const char* message, const Where& where = Where::current());

// --- sm_90 (sm90.cpp) ---------------------------------------------------------------------------
uint32_t shared_address(const void* smem);
void init_barrier(void* barrier, uint32_t arrivals, const Where& where);
// Announces the bytes of copies, then arrives.
void arrive(void* barrier, uint32_t bytes, const Where& where);
void wait_barrier(void* barrier, uint32_t parity, const Where& where);
void named_barrier(int number, int threads, bool waits, const Where& where);
// Until this, wgmma does not see what the thread wrote to shared memory.
void fence_async_proxy();

// Stands for CUtensorMap: 16-bit elements, boxes of 64 columns, 128-byte swizzle.
struct TensorMap {
  const char* base;
  int rank;
  uint64_t size[4];
  uint64_t stride_bytes[4];
  uint32_t box[4];
};
// Copies of the engine. Their destination is poisoned when they are issued, and they land when no
// thread can run, in the order that the schedule says.
void bulk_load(void* smem, const void* source, uint32_t bytes, void* barrier, const Where& where);
void load_box(void* smem,
              const TensorMap& map,
              void* barrier,
              const std::array<int32_t, 4>& begin,
              int rank,
              const Where& where);

// d [64, n] (+)= a [64, 16] b [16, n] of a warpgroup. d is poisoned when the product is issued; it
// is computed when all threads of the warpgroup wait for it and no other thread can run.
struct Product {
  float* d;  // of this thread, n / 2
  int n;
  uint64_t a;               // a descriptor, or
  const uint32_t* maybe_a;  // the thread's four registers
  uint64_t b;
  bool b_is_mn_major;
  bool adds;
  bool is_bfloat16;
};
void wgmma_fence();
void wgmma(const Product& product, const Where& where);
void wgmma_commit();
void wgmma_wait(int pending, const Where& where);

// --- collectives --------------------------------------------------------------------------------
// All lanes of `mask` meet; the last one runs complete(arguments of the lanes, mask), then all go
// on. A lane that comes by another operation, line or mask ends the launch.
using Complete = void (*)(void* const* lanes, uint32_t mask);
void rendezvous(
    const char* operation, uint32_t mask, void* argument, Complete complete, const Where& where);
void block_barrier(const Where& where);
// Lets other threads run: for loops that wait for a value in memory.
void yield();

namespace detail {
template <typename T>
struct Exchange {
  T value;
  T result;
  int lane;
  int operand;  // source lane, lane mask or delta
};

template <typename T, typename SourceLane>
T shuffle(const char* operation, uint32_t mask, T value, int operand, SourceLane, const Where& at) {
  Exchange<T> exchange{value, value, static_cast<int>(threadIdx.x), operand};
  rendezvous(
      operation,
      mask,
      &exchange,
      // Registers, which no thread races for, in memory of the lanes' stacks.
      [](void* const* lanes, uint32_t) __attribute__((no_sanitize_thread)) {
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes[lane] == nullptr) continue;
          auto& self = *static_cast<Exchange<T>*>(lanes[lane]);
          const int source = SourceLane{}(lane, self.operand);
          if (source < 0 || source > 31) continue;
          if (lanes[source] == nullptr) throw Error("shuffle from a lane that is not in the mask");
          self.result = static_cast<Exchange<T>*>(lanes[source])->value;
        }
      },
      at);
  return exchange.result;
}
uint32_t vote(uint32_t mask, bool predicate, const char* operation, const Where& where);
uint32_t match(uint32_t mask, uint64_t value, const Where& where);
}  // namespace detail
}  // namespace simt

// --- the intrinsics that kernels use ------------------------------------------------------------
inline void __syncthreads(const simt::Where& where = simt::Where::current()) {
  simt::block_barrier(where);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu,
                       const simt::Where& where = simt::Where::current()) {
  if (simt::has_fault(simt::Fault::kNoWarpBarrier)) return;
  simt::rendezvous("__syncwarp", mask, nullptr, nullptr, where);
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, const simt::Where& at = simt::Where::current()) {
  const auto source = [](int, int from) { return from & 31; };
  return simt::detail::shuffle("__shfl_sync", mask, value, lane, source, at);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int x, const simt::Where& at = simt::Where::current()) {
  const auto source = [](int lane, int bits) { return lane ^ bits; };
  return simt::detail::shuffle("__shfl_xor_sync", mask, value, x, source, at);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int by, const simt::Where& at = simt::Where::current()) {
  const auto source = [](int lane, int delta) { return lane - delta; };
  return simt::detail::shuffle("__shfl_up_sync", mask, value, by, source, at);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int by, const simt::Where& at = simt::Where::current()) {
  const auto source = [](int lane, int delta) { return lane + delta; };
  return simt::detail::shuffle("__shfl_down_sync", mask, value, by, source, at);
}
inline uint32_t __ballot_sync(uint32_t mask,
                              bool predicate,
                              const simt::Where& where = simt::Where::current()) {
  return simt::detail::vote(mask, predicate, "__ballot_sync", where);
}
inline bool __any_sync(uint32_t mask,
                       bool predicate,
                       const simt::Where& where = simt::Where::current()) {
  return simt::detail::vote(mask, predicate, "__any_sync", where) != 0;
}
inline bool __all_sync(uint32_t mask,
                       bool predicate,
                       const simt::Where& where = simt::Where::current()) {
  return simt::detail::vote(mask, predicate, "__all_sync", where) == mask;
}
inline uint32_t __match_any_sync(uint32_t mask,
                                 uint32_t value,
                                 const simt::Where& where = simt::Where::current()) {
  return simt::detail::match(mask, value, where);
}
template <typename T>
T __ldg(const T* address, const simt::Where& where = simt::Where::current()) {
  simt::check_global(address, sizeof(T), where);
  return *address;
}
template <typename T>
T __ldcg(const T* address, const simt::Where& where = simt::Where::current()) {
  return __ldg(address, where);
}
// Blocks run one after another: every write is seen by those that follow.
inline void __threadfence() {}
template <typename T>
T atomicAdd(T* address, T value) {  // nobody else runs meanwhile
  const T before = *address;
  *address = before + value;
  return before;
}
inline void sincospif(float x, float* sine, float* cosine) {
  constexpr double kPi = 3.14159265358979323846;
  *sine = static_cast<float>(std::sin(kPi * x));
  *cosine = static_cast<float>(std::cos(kPi * x));
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
