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

// --- the engine ---------------------------------------------------------------------------------
// Boxes at `begin`, and a bulk copy behind them, into shared memory and from there to `out`.
struct CopyParams {
  TensorMap map;
  int begin[4];
  int rank;
  const uint16_t* source;
  uint16_t* out;
};
constexpr int kBoxRows = 24, kBulkBytes = 48;

void copy_kernel(const __grid_constant__ CopyParams params) {
  RK_DYNAMIC_SMEM(smem);
  auto* barrier = reinterpret_cast<uint64_t*>(smem + kBoxRows * 128 + kBulkBytes);
  if (threadIdx.x == 0) ptx::init_barrier(barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto& at = params.begin;
    ptx::arrive_expecting(barrier, kBoxRows * 128 + kBulkBytes);
    if (params.rank == 2) ptx::load_box(smem, params.map, barrier, at[0], at[1]);
    if (params.rank == 3) ptx::load_box(smem, params.map, barrier, at[0], at[1], at[2]);
    if (params.rank == 4) ptx::load_box(smem, params.map, barrier, at[0], at[1], at[2], at[3]);
    ptx::bulk_load(smem + kBoxRows * 128, params.source, kBulkBytes, barrier);
  }
  ptx::wait(barrier, 0);
  for (uint32_t i = threadIdx.x; i < kBoxRows * 64; i += 32) {
    const uint32_t offset = ptx::swizzled_offset(i / 64, i % 64 / 8) + i % 8 * 2;
    params.out[i] = *reinterpret_cast<const uint16_t*>(smem + offset);
  }
  for (uint32_t i = threadIdx.x; i < kBulkBytes / 2; i += 32) {
    params.out[kBoxRows * 64 + i] = reinterpret_cast<const uint16_t*>(smem + kBoxRows * 128)[i];
  }
}

void expect_box(TensorLayout layout, const std::array<int, 4>& begin) {
  constexpr int kElements = 1 << 14;
  Buffer<uint16_t> source("source", kElements), out("out", kBoxRows * 64 + kBulkBytes / 2);
  for (int i = 0; i < kElements; ++i) source[i] = static_cast<uint16_t>(i + 1);
  layout.base = source.data();
  CopyParams params{{}, {}, layout.rank, source.data() + 8, out.data()};
  std::copy_n(begin.data(), 4, params.begin);
  CHECK(encode_tensor_map(layout, &params.map));
  simt::launch({{1}, {32}, kBoxRows * 128 + kBulkBytes + 8}, [&] { copy_kernel(params); });
  for (int i = 0; i < kBoxRows * 64; ++i) {
    int64_t at[4] = {begin[0] + i % 64, 0, 0, 0}, rest = i / 64, offset = 0;
    bool is_inside = true;
    for (int dim = 0; dim < layout.rank; ++dim) {
      if (dim > 0) {
        at[dim] = begin[dim] + rest % layout.box[dim];
        rest /= layout.box[dim];
      }
      is_inside = is_inside && at[dim] >= 0 && at[dim] < static_cast<int64_t>(layout.size[dim]);
      offset += at[dim] * static_cast<int64_t>(layout.stride[dim]);
    }
    CHECK_EQ(out[i], is_inside ? source[offset] : 0);
  }
  for (int i = 0; i < kBulkBytes / 2; ++i) CHECK_EQ(out[kBoxRows * 64 + i], source[8 + i]);
}

TEST(boxes_of_two_three_and_four_dimensions) {
  expect_box({.rank = 2, .size = {100, 80, 1, 1}, .stride = {1, 104, 1, 1}, .box = {64, 24, 1, 1}},
             {8, 40, 0, 0});
  expect_box({.rank = 3, .size = {64, 16, 5, 1}, .stride = {1, 64, 1024, 1}, .box = {64, 12, 2, 1}},
             {0, 3, 2, 0});
  expect_box(
      {.rank = 4, .size = {64, 8, 4, 3}, .stride = {1, 64, 1024, 4096}, .box = {64, 4, 3, 2}},
      {0, 2, 1, 1});
}
TEST(what_lies_outside_a_tensor_becomes_zeros) {
  const TensorLayout layout{
      .rank = 3, .size = {72, 16, 5, 1}, .stride = {1, 72, 1152, 1}, .box = {64, 24, 1, 1}};
  expect_box(layout, {32, 4, 1, 0});
  expect_box(layout, {-8, -5, 0, 0});
  expect_box(layout, {0, 0, 5, 0});
}

TEST(a_copy_that_nobody_waits_for_is_an_error) {
  Buffer<uint16_t> source("source", 64);
  const auto kernel = [&] {
    RK_DYNAMIC_SMEM(smem);
    auto* barrier = reinterpret_cast<uint64_t*>(smem + 128);
    ptx::init_barrier(barrier, 1);
    ptx::arrive_expecting(barrier, 128);
    ptx::bulk_load(smem, source.data(), 128, barrier);
  };
  CHECK_THROWS(simt::launch({{1}, {1}, 136}, kernel), "exits while the engine copies");
}

TEST(rules_of_tensor_maps) {
  const auto encodable = [](auto&& change) {
    TensorLayout layout{
        .rank = 3, .size = {128, 16, 9, 1}, .stride = {1, 256, 4096, 1}, .box = {64, 16, 1, 1}};
    change(layout);
    return is_encodable(layout);
  };
  CHECK(encodable([](TensorLayout&) {}));
  CHECK(!encodable([](TensorLayout& t) { t.stride[1] = 260; }));   // not 16 bytes
  CHECK(!encodable([](TensorLayout& t) { t.stride[1] = 64; }));    // rows overlap
  CHECK(!encodable([](TensorLayout& t) { t.stride[2] = 4104; }));  // no multiple of the one before
  CHECK(!encodable([](TensorLayout& t) { t.stride[2] = 256; }));   // pages overlap
  CHECK(!encodable([](TensorLayout& t) { t.box[1] = 257; }));
  CHECK(!encodable([](TensorLayout& t) { t.size[2] = 0; }));
  CHECK(!encodable([](TensorLayout& t) { t.dtype = redknot::DType::kFloat32; }));
}

TEST(descriptors_have_the_fields_of_the_ptx_isa) {
  const auto field = [](uint64_t descriptor, int begin, int bits) {
    return descriptor >> begin & ((uint64_t{1} << bits) - 1);
  };
  const uint64_t k = ptx::k_major(0x8400, 3);
  CHECK_EQ(field(k, 0, 14), (0x8400u + 96) / 16);
  CHECK_EQ(field(k, 32, 14), 64u);
  CHECK_EQ(field(k, 49, 3), 0u);
  CHECK_EQ(field(k, 62, 2), 1u);
  const uint64_t mn = ptx::mn_major(0x38000, 16384, 2);
  CHECK_EQ(field(mn, 0, 14), (0x38000u + 4096) / 16);
  CHECK_EQ(field(mn, 16, 14), 1024u);
  CHECK_EQ(field(mn, 32, 14), 64u);
  CHECK_EQ(field(mn, 62, 2), 1u);
}

}  // namespace
