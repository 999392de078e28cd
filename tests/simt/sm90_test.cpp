// A warp-specialised kernel of sm_90 in which one thing at a time is wrong. Every planted bug must
// show in every schedule, and the kernel without one in none.
//
// O [64, 128] = sum over pages p of bf16(Q [64, 64] K_p^T) V_p, K_p [64, 64], V_p [64, 128]. Warp 4
// has the copy engine load pages into two stages; the warpgroup before it multiplies. All numbers
// are small integers, so that the result is exact.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace redknot::gpu;
using simt::Buffer;

enum class Bug {
  kNone,
  kMissingFullWait,
  kMissingEmptyWait,
  kWrongConsumerParity,
  kWrongProducerParity,
  kTooFewBytes,
  kTooManyBytes,
  kMissingProductWait,
  kMissingProductFence,
  kSumsTouchedUnderWay,
  kSumsScaledUnderWay,
  kReleasedBeforeProducts,
  kMissingProxyFence,
  kQueriesNotSwizzled,
  kWrongStep,
  kWrongPanelBytes,
  kOneWarpIssuesOthers,
  kNobodyInitialises,
};

constexpr int kRows = 64, kKeys = 64, kDim = 64, kValueDim = 128, kPages = 5, kPoolPages = 7;
constexpr int kConsumers = 128, kThreads = kConsumers + 32;
constexpr uint32_t kPanelBytes = kKeys * 128;
constexpr uint32_t kStageBytes = 3 * kPanelBytes;  // K, two panels of V

template <typename T>
struct Params {
  TensorMap k, v;
  const T* q;          // [kRows, kDim]
  const int* page_of;  // [kPages]
  float* out;          // [kRows, kValueDim]
};

template <typename T>
struct alignas(1024) Shared {
  T queries[kRows * kDim];
  unsigned char stages[2][kStageBytes];
  uint64_t full[2], empty[2];
};

template <typename T, Bug kBug>
void produce(const Params<T>& params, Shared<T>& shared) {
  if (threadIdx.x % 32 != 0) return;
  for (int page = 0; page < kPages; ++page) {
    const int stage = page % 2;
    const int wrong = kBug == Bug::kWrongProducerParity;
    if (kBug != Bug::kMissingEmptyWait) {
      ptx::wait(&shared.empty[stage], (page / 2 + 1 + wrong) % 2);
    }
    const int other = kBug == Bug::kTooFewBytes ? -16 : (kBug == Bug::kTooManyBytes ? 16 : 0);
    ptx::arrive_expecting(&shared.full[stage], kStageBytes + other);
    unsigned char* to = shared.stages[stage];
    const int from = __ldg(params.page_of + page);
    ptx::load_box(to, params.k, &shared.full[stage], 0, 0, from);
    ptx::load_box(to + kPanelBytes, params.v, &shared.full[stage], 0, 0, from);
    ptx::load_box(to + 2 * kPanelBytes, params.v, &shared.full[stage], 64, 0, from);
  }
}

template <typename T, Bug kBug>
void consume(const Params<T>& params, Shared<T>& shared) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  for (int i = thread; i < kRows * kDim / 8; i += kConsumers) {
    const int row = i / 8, vector = i % 8;
    const uint32_t offset = kBug == Bug::kQueriesNotSwizzled ? 128 * row + 16 * vector
                                                             : ptx::swizzled_offset(row, vector);
    std::copy_n(params.q + row * kDim + vector * 8, 8, shared.queries + offset / 2);
  }
  if (kBug != Bug::kMissingProxyFence) ptx::fence_async_proxy();
  ptx::sync_named(1, kConsumers);

  float out[kValueDim / 8][4] = {};
  for (int page = 0; page < kPages; ++page) {
    const int stage = page % 2;
    const int wrong = kBug == Bug::kWrongConsumerParity;
    if (kBug != Bug::kMissingFullWait) ptx::wait(&shared.full[stage], (page / 2 + wrong) % 2);
    const uint32_t keys = ptx::shared_address(shared.stages[stage]), values = keys + kPanelBytes;
    float scores[kKeys / 8][4];
    if (kBug != Bug::kMissingProductFence) ptx::wgmma_fence();
    for (int step = 0; step < kDim / 16; ++step) {
      const bool skips = kBug == Bug::kOneWarpIssuesOthers && warp == 1 && page == 1 && step == 2;
      const int b_step = kBug == Bug::kWrongStep || skips ? 0 : step;
      ptx::wgmma<T, ptx::Major::kK>(scores,
                                    ptx::k_major(ptx::shared_address(shared.queries), step),
                                    ptx::k_major(keys, b_step),
                                    step > 0);
    }
    ptx::wgmma_commit();
    if (kBug == Bug::kSumsTouchedUnderWay) scores[3][1] = 0.0f;
    if (kBug == Bug::kSumsScaledUnderWay) scores[3][1] *= 0.5f;
    if (kBug != Bug::kMissingProductWait) ptx::wgmma_wait<0>();
    uint32_t a[kKeys / 16][4];
    for (int step = 0; step < kKeys / 16; ++step) {
      for (int i = 0; i < 4; ++i) {
        const float* pair = &scores[step * 2 + i / 2][i % 2 * 2];
        a[step][i] = ptx::pack<T>(pair[0], pair[1]);
      }
    }
    if (kBug != Bug::kMissingProductFence) ptx::wgmma_fence();
    for (int step = 0; step < kKeys / 16; ++step) {
      const uint32_t panel_bytes = kBug == Bug::kWrongPanelBytes ? kPanelBytes / 2 : kPanelBytes;
      ptx::wgmma<T, ptx::Major::kMN>(out, a[step], ptx::mn_major(values, panel_bytes, step), true);
    }
    ptx::wgmma_commit();
    if (kBug == Bug::kReleasedBeforeProducts) ptx::arrive(&shared.empty[stage]);
    ptx::wgmma_wait<0>();
    if (kBug != Bug::kReleasedBeforeProducts) ptx::arrive(&shared.empty[stage]);
  }
  for (int tile = 0; tile < kValueDim / 8; ++tile) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + i / 2 * 8;
      params.out[row * kValueDim + tile * 8 + lane % 4 * 2 + i % 2] = out[tile][i];
    }
  }
}

template <typename T, Bug kBug>
void paged_products(const __grid_constant__ Params<T> params) {
  RK_DYNAMIC_SMEM(smem);
  auto& shared = *reinterpret_cast<Shared<T>*>(smem);
  if (threadIdx.x == 0 && kBug != Bug::kNobodyInitialises) {
    for (int stage = 0; stage < 2; ++stage) {
      ptx::init_barrier(&shared.full[stage], 1);
      ptx::init_barrier(&shared.empty[stage], kConsumers);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    produce<T, kBug>(params, shared);
  } else {
    consume<T, kBug>(params, shared);
  }
}

template <typename T>
T element(int value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else {
    return __float2bfloat16_rn(static_cast<float>(value));
  }
}
float number(__nv_bfloat16 x) { return __bfloat162float(x); }
float number(__half x) { return __half2float(x); }

// Largest error against exact sums; infinite where the result is not finite.
template <typename T, Bug kBug>
double error(const simt::Schedule& schedule) {
  // Pages are views: keys and values of a slot lie side by side.
  constexpr int kSlot = kDim + kValueDim;
  Buffer<T> q("q", kRows * kDim), pool("pool", kPoolPages * kKeys * kSlot);
  Buffer<int> page_of("page_of", std::vector<int>{4, 0, 6, 1, 3});
  Buffer<float> out("out", kRows * kValueDim);
  uint32_t state = 1;
  const auto random = [&] {
    state = state * 1664525u + 1013904223u;
    return element<T>(static_cast<int>(state >> 16) % 3 - 1);
  };
  std::generate(q.begin(), q.end(), random);
  std::generate(pool.begin(), pool.end(), random);
  Params<T> params{{}, {}, q.data(), page_of.data(), out.data()};
  TensorLayout layout{.base = pool.data(),
                      .rank = 3,
                      .size = {kDim, kKeys, kPoolPages, 1},
                      .stride = {1, kSlot, kSlot * kKeys, 1},
                      .box = {64, kKeys, 1, 1}};
  CHECK(encode_tensor_map(layout, &params.k));
  layout.base = pool.data() + kDim;
  layout.size[0] = kValueDim;
  CHECK(encode_tensor_map(layout, &params.v));
  simt::launch({{1}, {kThreads}, sizeof(Shared<T>), schedule},
               [&] { paged_products<T, kBug>(params); });

  double worst = 0;
  for (int row = 0; row < kRows; ++row) {
    std::vector<double> expected(kValueDim);
    for (const int page : page_of) {
      for (int key = 0; key < kKeys; ++key) {
        const T* slot = pool.data() + (page * kKeys + key) * kSlot;
        double score = 0;
        for (int d = 0; d < kDim; ++d) score += number(q[row * kDim + d]) * number(slot[d]);
        for (int d = 0; d < kValueDim; ++d) expected[d] += score * number(slot[kDim + d]);
      }
    }
    for (int d = 0; d < kValueDim; ++d) {
      const double difference = std::abs(out[row * kValueDim + d] - expected[d]);
      worst = std::isfinite(difference) ? std::max(worst, difference) : INFINITY;
    }
  }
  return worst;
}

using BF16 = __nv_bfloat16;

TEST(without_a_bug_every_schedule_is_exact) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK_EQ((error<BF16, Bug::kNone>(schedule)), 0.0);
    CHECK_EQ((error<__half, Bug::kNone>(schedule)), 0.0);
  }
}

template <Bug kBug>
void expect_nan() {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK(std::isinf(error<BF16, kBug>(schedule)));
  }
}
template <Bug kBug>
void expect_error(const char* words) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK_THROWS((error<BF16, kBug>(schedule)), words);
  }
}
// One of several ends, which one depends on the schedule.
template <Bug kBug>
void expect_nan_or_error() {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    bool is_caught = true;
    try {
      is_caught = std::isinf(error<BF16, kBug>(schedule));
    } catch (const simt::Error&) {
    }
    CHECK(is_caught);
  }
}

TEST(a_missing_full_wait_shows) { expect_nan_or_error<Bug::kMissingFullWait>(); }
TEST(a_missing_empty_wait_shows) { expect_nan_or_error<Bug::kMissingEmptyWait>(); }
TEST(a_consumer_that_waits_for_the_wrong_parity_shows) {
  expect_nan_or_error<Bug::kWrongConsumerParity>();
}
TEST(a_producer_that_waits_for_the_wrong_parity_is_a_deadlock) {
  expect_error<Bug::kWrongProducerParity>("deadlock");
}
TEST(too_few_or_too_many_expected_bytes_are_a_deadlock) {
  expect_error<Bug::kTooFewBytes>("deadlock");
  expect_error<Bug::kTooManyBytes>("deadlock");
}
TEST(a_missing_wait_for_products_reads_nan) { expect_nan<Bug::kMissingProductWait>(); }
TEST(a_missing_fence_before_products_is_an_error) {
  expect_error<Bug::kMissingProductFence>("without wgmma_fence");
}
TEST(sums_that_are_touched_too_early_are_an_error) {
  expect_error<Bug::kSumsTouchedUnderWay>("written while it was under way");
  expect_error<Bug::kSumsScaledUnderWay>("written while it was under way");
}
TEST(a_stage_released_before_its_products_is_an_error) {
  expect_error<Bug::kReleasedBeforeProducts>("changed while a product read it");
}
TEST(a_missing_proxy_fence_reads_nan) { expect_nan<Bug::kMissingProxyFence>(); }
TEST(warps_that_issue_different_products_are_an_error) {
  expect_error<Bug::kOneWarpIssuesOthers>("different products");
}
TEST(a_barrier_that_nobody_initialised_is_an_error) {
  expect_error<Bug::kNobodyInitialises>("nobody initialised");
}
TEST(wrong_swizzles_and_descriptors_are_far_off) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK((error<BF16, Bug::kQueriesNotSwizzled>(schedule) > 1));
    CHECK((error<BF16, Bug::kWrongStep>(schedule) > 1));
    CHECK((error<BF16, Bug::kWrongPanelBytes>(schedule) > 1));
  }
}

}  // namespace
