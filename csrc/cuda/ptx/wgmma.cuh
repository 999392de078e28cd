#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/matrix_descriptor.h"

// Products of a warpgroup (four warps, the first a multiple of four) that run beside it (sm_90a).
//
//   d [64, N] (+)= a [64, 16] b [16, N], fp32 sums of 16-bit elements
//
// Warp w of the four has rows 16 w .. 16 w + 15 of d and a; its lanes hold them as the fragments of
// mma.m16n8k16 (matrix.cuh): d[n / 8] is a C fragment, a an A fragment. Order of use: fence, then
// products, commit, wait; in between neither d nor the registers of a may be touched. Products run
// in the order of their issue.
namespace redknot::gpu::ptx {

// Registers that products read, written before, are seen by them.
__device__ __forceinline__ void wgmma_fence() {
#ifdef RK_SIMT
  ::simt::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// Closes the group of products issued so far.
__device__ __forceinline__ void wgmma_commit() {
#ifdef RK_SIMT
  ::simt::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

// Waits for all but the newest kPending groups.
template <int kPending>
__device__ __forceinline__ void wgmma_wait(
#ifdef RK_SIMT
    const ::simt::Where& where = ::simt::Where::current()) {
  ::simt::wgmma_wait(kPending, where);
#else
) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#endif
}

// d is not moved or copied across this: to stand before the products that begin with it and behind
// the wait that ends them.
template <int kTiles>
__device__ __forceinline__ void hold(float (&d)[kTiles][4]) {
#ifdef RK_SIMT
  static_cast<void>(d);
#else
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[tile][i])::"memory");
  }
#endif
}

#ifndef RK_SIMT
// Names of 4, 8, ... registers in PTX, and the operands they stand for.
#define RK_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define RK_NAMES_4 "%0,%1,%2,%3"
#define RK_NAMES_8 RK_NAMES_4 ",%4,%5,%6,%7"
#define RK_NAMES_16 RK_TEN() "%10,%11,%12,%13,%14,%15"
#define RK_NAMES_32 RK_TEN() RK_TEN(1) RK_TEN(2) "%30,%31"
#define RK_NAMES_48 RK_TEN() RK_TEN(1) RK_TEN(2) RK_TEN(3) "%40,%41,%42,%43,%44,%45,%46,%47"
#define RK_NAMES_64 RK_TEN() RK_TEN(1) RK_TEN(2) RK_TEN(3) RK_TEN(4) RK_TEN(5) "%60,%61,%62,%63"
// clang-format off
#define RK_NAMES_96                                                                        \
  RK_TEN() RK_TEN(1) RK_TEN(2) RK_TEN(3) RK_TEN(4) RK_TEN(5) RK_TEN(6) RK_TEN(7) RK_TEN(8) \
  "%90,%91,%92,%93,%94,%95"
#define RK_NAMES_128                                                                       \
  RK_TEN() RK_TEN(1) RK_TEN(2) RK_TEN(3) RK_TEN(4) RK_TEN(5) RK_TEN(6) RK_TEN(7) RK_TEN(8) \
  RK_TEN(9) RK_TEN(10) RK_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127"
// clang-format on
#define RK_TILES_1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define RK_TILES_2(n) RK_TILES_1(n), RK_TILES_1(n + 1)
#define RK_TILES_4(n) RK_TILES_2(n), RK_TILES_2(n + 2)
#define RK_TILES_8(n) RK_TILES_4(n), RK_TILES_4(n + 4)
#define RK_TILES_16(n) RK_TILES_8(n), RK_TILES_8(n + 8)
// clang-format off
// N, registers of d, operands of d, and the numbers of the operands behind them.
#define RK_EACH_N(f)                                                                  \
  f(8, RK_NAMES_4, (RK_TILES_1(0)), 4, 5, 6, 7, 8, 9, 10)                             \
  f(16, RK_NAMES_8, (RK_TILES_2(0)), 8, 9, 10, 11, 12, 13, 14)                        \
  f(32, RK_NAMES_16, (RK_TILES_4(0)), 16, 17, 18, 19, 20, 21, 22)                     \
  f(64, RK_NAMES_32, (RK_TILES_8(0)), 32, 33, 34, 35, 36, 37, 38)                     \
  f(96, RK_NAMES_48, (RK_TILES_8(0), RK_TILES_4(8)), 48, 49, 50, 51, 52, 53, 54)      \
  f(128, RK_NAMES_64, (RK_TILES_16(0)), 64, 65, 66, 67, 68, 69, 70)                   \
  f(192, RK_NAMES_96, (RK_TILES_16(0), RK_TILES_8(16)), 96, 97, 98, 99, 100, 101, 102) \
  f(256, RK_NAMES_128, (RK_TILES_16(0), RK_TILES_16(16)), 128, 129, 130, 131, 132, 133, 134)
// clang-format on
#define RK_UNPACK(...) __VA_ARGS__

#define RK_ISSUE_SHARED(n, type, names, tiles, p0, p1, p2, p3)                            \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" #p2                             \
               ", 0;\n"                                                                   \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names \
               "}, %" #p0 ", %" #p1 ", adds, 1, 1, 0, %" #p3 ";\n}\n"                     \
               : RK_UNPACK tiles                                                          \
               : "l"(a), "l"(b), "r"(static_cast<int32_t>(adds)), "n"(kIsMnMajor ? 1 : 0))
#define RK_ISSUE_REGISTERS(n, type, names, tiles, p0, p1, p2, p3, p4, p5, p6)                   \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" #p5                                   \
               ", 0;\n"                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names       \
               "}, {%" #p0 ",%" #p1 ",%" #p2 ",%" #p3 "}, %" #p4 ", adds, 1, 1, %" #p6 ";\n}\n" \
               : RK_UNPACK tiles                                                                \
               : "r"(a[0]),                                                                     \
                 "r"(a[1]),                                                                     \
                 "r"(a[2]),                                                                     \
                 "r"(a[3]),                                                                     \
                 "l"(b),                                                                        \
                 "r"(static_cast<int32_t>(adds)),                                               \
                 "n"(kIsMnMajor ? 1 : 0))
#endif

enum class Major { kK, kMN };

constexpr bool is_wgmma_n(int n) {
  return n == 8 || n == 16 || n == 32 || n == 64 || n == 96 || n == 128 || n == 192 || n == 256;
}

// a and b in shared memory, a K-major, b as kMajorOfB says. adds: d is added to, else overwritten.
template <typename T, Major kMajorOfB, int kTiles>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4],
                                      uint64_t a,
                                      uint64_t b,
                                      bool adds RK_WHERE) {
  static_assert(is_wgmma_n(kTiles * 8));
  constexpr bool kIsBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr bool kIsMnMajor = kMajorOfB == Major::kMN;
#ifdef RK_SIMT
  ::simt::wgmma({&d[0][0], kTiles * 8, a, nullptr, b, kIsMnMajor, adds, kIsBFloat16}, where);
#else
#define RK_CASE(n, names, tiles, p0, p1, p2, p3, p4, p5, p6)    \
  if constexpr (kTiles * 8 == n) {                              \
    if constexpr (kIsBFloat16) {                                \
      RK_ISSUE_SHARED(n, "bf16", names, tiles, p0, p1, p2, p3); \
    } else {                                                    \
      RK_ISSUE_SHARED(n, "f16", names, tiles, p0, p1, p2, p3);  \
    }                                                           \
  }
  RK_EACH_N(RK_CASE)
#undef RK_CASE
#endif
}

// The same with a in registers.
template <typename T, Major kMajorOfB, int kTiles>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4],
                                      const uint32_t (&a)[4],
                                      uint64_t b,
                                      bool adds RK_WHERE) {
  static_assert(is_wgmma_n(kTiles * 8));
  constexpr bool kIsBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr bool kIsMnMajor = kMajorOfB == Major::kMN;
#ifdef RK_SIMT
  ::simt::wgmma({&d[0][0], kTiles * 8, 0, a, b, kIsMnMajor, adds, kIsBFloat16}, where);
#else
#define RK_CASE(n, names, tiles, p0, p1, p2, p3, p4, p5, p6)                   \
  if constexpr (kTiles * 8 == n) {                                             \
    if constexpr (kIsBFloat16) {                                               \
      RK_ISSUE_REGISTERS(n, "bf16", names, tiles, p0, p1, p2, p3, p4, p5, p6); \
    } else {                                                                   \
      RK_ISSUE_REGISTERS(n, "f16", names, tiles, p0, p1, p2, p3, p4, p5, p6);  \
    }                                                                          \
  }
  RK_EACH_N(RK_CASE)
#undef RK_CASE
#endif
}

#ifndef RK_SIMT
#undef RK_TEN
#undef RK_EACH_N
#undef RK_ISSUE_SHARED
#undef RK_ISSUE_REGISTERS
#endif

}  // namespace redknot::gpu::ptx
