// A small pipelined kernel in which one thing at a time is wrong. Every planted bug must show in
// every schedule it says, and the kernel without one in none.
//
// C [64, 32] = sum over pages p of A_p [64, 32] B_p^T, B_p [32, 32]. One warp owns 16 rows of C; a
// page's A and B are one of two stages of shared memory, rows of 64 bytes without swizzle.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/matrix.cuh"

namespace {

using namespace redknot::gpu;
using simt::Buffer;
using T = __nv_bfloat16;

enum class Bug {
  kNone,
  kMissingWait,
  kCommitOnlyWhileThereAreMorePages,
  kMissingBarrierBeforeReading,
  kMissingBarrierBeforeRefilling,
  kWrongFragment,
  kWrongMatrixRow,
  kDivergentBarrier,
  kWildPage,
  kAccumulatorNotZeroed,
};

constexpr int kRows = 64, kKeys = 32, kDim = 32, kThreads = 128, kPages = 5;
constexpr int kStageElements = (kRows + kKeys) * kDim;

struct Params {
  const T* a;          // [pages of the pool, kRows, kDim]
  const T* b;          // [pages of the pool, kKeys, kDim]
  const int* page_of;  // [kPages]
  float* c;            // [kRows, kKeys]
};

template <Bug kBug>
void issue_page(const Params& params, int number, T* stage) {
  int page = __ldg(params.page_of + number);
  if (kBug == Bug::kWildPage && number == 3) page += 1000;
  for (int i = threadIdx.x; i < kStageElements / 8; i += kThreads) {
    const bool is_a = i < kRows * kDim / 8;
    const T* source = is_a ? params.a + page * kRows * kDim + i * 8
                           : params.b + page * kKeys * kDim + i * 8 - kRows * kDim;
    ptx::copy_async_16(stage + i * 8, source, true);
  }
}

template <Bug kBug>
void multiply_page(const T* stage, float (&sums)[kKeys / 8][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* a = stage + warp * 16 * kDim;
  const T* b = stage + kRows * kDim;
  for (int k = 0; k < kDim; k += 16) {
    uint32_t a_regs[4];
    ptx::load_matrix_x4(a_regs, a + lane % 16 * kDim + k + lane / 16 * 8);
    for (int n = 0; n < kKeys; n += 16) {
      const int row = kBug == Bug::kWrongMatrixRow ? (lane % 8) ^ 1 : lane % 8;
      uint32_t b_regs[4];  // keys n.. by k.., k + 8..; keys n + 8.. by the same
      ptx::load_matrix_x4(b_regs, b + (n + lane / 16 * 8 + row) * kDim + k + lane / 8 % 2 * 8);
      const bool wrong = kBug == Bug::kWrongFragment;
      const uint32_t first[2] = {b_regs[0], b_regs[wrong ? 2 : 1]};
      const uint32_t second[2] = {b_regs[wrong ? 1 : 2], b_regs[3]};
      ptx::mma_16816<T>(sums[n / 8], a_regs, first);
      ptx::mma_16816<T>(sums[n / 8 + 1], a_regs, second);
    }
  }
}

template <Bug kBug>
void paged_product(Params params) {
  RK_DYNAMIC_SMEM(smem);
  T* stages = reinterpret_cast<T*>(smem);
  float sums[kKeys / 8][4];
  if (kBug != Bug::kAccumulatorNotZeroed) {
    for (auto& tile : sums) std::fill_n(tile, 4, 0.0f);
  }
  issue_page<kBug>(params, 0, stages);
  ptx::copy_commit();
  for (int page = 0; page < kPages; ++page) {
    if (page + 1 < kPages) {
      issue_page<kBug>(params, page + 1, stages + (page + 1) % 2 * kStageElements);
      if (kBug == Bug::kCommitOnlyWhileThereAreMorePages) ptx::copy_commit();
    }
    if (kBug != Bug::kCommitOnlyWhileThereAreMorePages) ptx::copy_commit();
    if (kBug != Bug::kMissingWait) ptx::copy_wait<1>();
    if (kBug == Bug::kDivergentBarrier) {
      if (threadIdx.x % 32 < 16) __syncthreads();
    } else if (kBug != Bug::kMissingBarrierBeforeReading) {
      __syncthreads();
    }
    multiply_page<kBug>(stages + page % 2 * kStageElements, sums);
    if (kBug != Bug::kMissingBarrierBeforeRefilling) __syncthreads();
  }
  ptx::copy_wait<0>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int n = 0; n < kKeys / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + i / 2 * 8;
      params.c[row * kKeys + n * 8 + lane % 4 * 2 + i % 2] = sums[n][i];
    }
  }
}

// Largest error against fp64; infinite where the result is not finite.
template <Bug kBug>
double error(const simt::Schedule& schedule) {
  constexpr int kPoolPages = 7;
  Buffer<T> a("a", kPoolPages * kRows * kDim), b("b", kPoolPages * kKeys * kDim);
  Buffer<int> page_of("page_of", std::vector<int>{4, 0, 6, 1, 3});
  Buffer<float> c("c", kRows * kKeys);
  uint32_t state = 1;
  const auto random = [&] {
    state = state * 1664525u + 1013904223u;
    return __float2bfloat16_rn(static_cast<float>(state >> 16) / 65536.0f - 0.5f);
  };
  std::generate(a.begin(), a.end(), random);
  std::generate(b.begin(), b.end(), random);
  simt::launch({{1}, {kThreads}, 2 * kStageElements * sizeof(T), schedule},
               [&] { paged_product<kBug>({a.data(), b.data(), page_of.data(), c.data()}); });
  double worst = 0;
  for (int row = 0; row < kRows; ++row) {
    for (int key = 0; key < kKeys; ++key) {
      double sum = 0;
      for (const int page : page_of) {
        for (int d = 0; d < kDim; ++d) {
          sum += double{__bfloat162float(a[(page * kRows + row) * kDim + d])} *
                 __bfloat162float(b[(page * kKeys + key) * kDim + d]);
        }
      }
      const double difference = std::abs(c[row * kKeys + key] - sum);
      worst = std::isfinite(difference) ? std::max(worst, difference) : INFINITY;
    }
  }
  return worst;
}

template <Bug kBug>
void expect_nan_in_every_schedule() {
  for (const simt::Schedule& schedule : simt::kSchedules) CHECK(std::isinf(error<kBug>(schedule)));
}

TEST(without_a_bug_every_schedule_is_right) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK(error<Bug::kNone>(schedule) < 1e-4);
  }
}

TEST(a_missing_wait_reads_nan) { expect_nan_in_every_schedule<Bug::kMissingWait>(); }
TEST(a_commit_that_is_sometimes_left_out_reads_nan) {
  expect_nan_in_every_schedule<Bug::kCommitOnlyWhileThereAreMorePages>();
}
TEST(a_missing_barrier_before_reading_reads_nan) {
  expect_nan_in_every_schedule<Bug::kMissingBarrierBeforeReading>();
}
TEST(a_stage_refilled_too_early_reads_nan) {
  expect_nan_in_every_schedule<Bug::kMissingBarrierBeforeRefilling>();
}
TEST(an_accumulator_that_is_not_zeroed_is_nan) {
  expect_nan_in_every_schedule<Bug::kAccumulatorNotZeroed>();
}

TEST(wrong_fragments_and_matrix_rows_are_far_off) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK(error<Bug::kWrongFragment>(schedule) > 0.02);
    CHECK(error<Bug::kWrongMatrixRow>(schedule) > 0.02);
  }
}

TEST(a_barrier_in_half_a_warp_is_a_deadlock) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK_THROWS(error<Bug::kDivergentBarrier>(schedule), "planted_bugs_test.cpp");
  }
}

TEST(a_wild_page_is_an_error_with_its_line) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK_THROWS(error<Bug::kWildPage>(schedule),
                 "global access outside every buffer at planted_bugs_test.cpp");
  }
}

}  // namespace
