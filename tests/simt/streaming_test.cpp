// write_pages, copy_pages and rope_realign on the executor.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "cuda/pages/move_rows.cuh"
#include "cuda/rope/realign_keys.cuh"

namespace {

using namespace redknot;
using namespace redknot::gpu;
using simt::Buffer;

std::vector<uint16_t> numbered(size_t count, uint16_t first) {
  std::vector<uint16_t> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<uint16_t>(first + i);
  return values;
}

// K and V interleaved in one tensor: [num_pages, page_size, 2, head_dim].
struct Pool {
  static constexpr int64_t kPages = 5, kPageSize = 3, kHeadDim = 24;
  std::vector<uint16_t> before = numbered(kPages * kPageSize * 2 * kHeadDim, 20000);
  Buffer<uint16_t> memory{"pool", before};

  PagePool params() {
    return {.k = memory.data(),
            .v = memory.data() + kHeadDim,
            .num_pages = kPages,
            .page_size = kPageSize,
            .head_dim = kHeadDim,
            .k_page_stride = kPageSize * 2 * kHeadDim,
            .k_slot_stride = 2 * kHeadDim,
            .v_page_stride = kPageSize * 2 * kHeadDim,
            .v_slot_stride = 2 * kHeadDim,
            .dtype = DType::kBFloat16};
  }
};

// A grid of two blocks, so that rows are strided over; lanes, too, where a row is wider than 2.
template <typename Access, typename Rows>
void run_moves(const Rows& rows, const simt::Schedule& schedule) {
  simt::launch({{2}, {2, 4}, 0, schedule}, [&] { move_rows_kernel<Access>(rows); });
}

template <typename Access>
void expect_written() {
  constexpr int64_t kTokens = 4, kHeads = 3, kDim = Pool::kHeadDim;
  const std::vector<int64_t> slots = {14, 0, -1, 7, 8, 6, -1, -1, 2, 13, 1, 3};
  for (const simt::Schedule& schedule : simt::kSchedules) {
    Pool pool;
    std::vector<uint16_t> expected = pool.before;
    // K and V are halves of one projection: a token is 2 * kHeads heads.
    Buffer<uint16_t> kv("kv", numbered(kTokens * 2 * kHeads * kDim, 1));
    Buffer<int64_t> slot_numbers("slots", slots);
    const WritePagesParams params = {.pool = pool.params(),
                                     .k = kv.data(),
                                     .v = kv.data() + kHeads * kDim,
                                     .slots = slot_numbers.data(),
                                     .num_tokens = kTokens,
                                     .num_kv_heads = kHeads,
                                     .k_token_stride = 2 * kHeads * kDim,
                                     .k_head_stride = kDim,
                                     .v_token_stride = 2 * kHeads * kDim,
                                     .v_head_stride = kDim,
                                     .slots_token_stride = kHeads};
    run_moves<Access>(WriteRows{params}, schedule);
    for (int64_t i = 0; i < kTokens * kHeads; ++i) {
      if (slots[i] < 0) continue;
      const auto* k = kv.data() + (i / kHeads * 2 * kHeads + i % kHeads) * kDim;
      std::copy_n(k, kDim, expected.begin() + slots[i] * 2 * kDim);
      std::copy_n(k + kHeads * kDim, kDim, expected.begin() + slots[i] * 2 * kDim + kDim);
    }
    CHECK(std::equal(expected.begin(), expected.end(), pool.memory.begin()));
  }
}

TEST(tokens_are_written_to_their_slots_and_nowhere_else) {
  expect_written<uint4>();
  expect_written<uint16_t>();
}

template <typename Access>
void expect_copied() {
  constexpr int64_t kPageElements = Pool::kPageSize * 2 * Pool::kHeadDim;
  for (const simt::Schedule& schedule : simt::kSchedules) {
    Pool pool;
    std::vector<uint16_t> expected = pool.before;
    Buffer<int32_t> copies("copies", std::vector<int32_t>{4, 1, 4, 0, 2, 3});
    const CopyPagesParams params = {
        .pool = pool.params(), .copies = copies.data(), .num_copies = 3};
    run_moves<Access>(CopyRows{params}, schedule);
    for (size_t i = 0; i < copies.size(); i += 2) {
      std::copy_n(pool.before.begin() + copies[i] * kPageElements,
                  kPageElements,
                  expected.begin() + copies[i + 1] * kPageElements);
    }
    CHECK(std::equal(expected.begin(), expected.end(), pool.memory.begin()));
  }
}

TEST(pages_are_copied_whole) {
  expect_copied<uint4>();
  expect_copied<uint16_t>();
}

TEST(slots_and_pages_outside_the_pool_are_found) {
  for (const int32_t bad : {-1, static_cast<int32_t>(Pool::kPages)}) {
    Pool pool;
    Buffer<int32_t> copies("copies", std::vector<int32_t>{0, bad});
    const CopyPagesParams params = {
        .pool = pool.params(), .copies = copies.data(), .num_copies = 1};
    CHECK_THROWS(run_moves<uint4>(CopyRows{params}, {}), "copies must name pages below num_pages");
  }
  for (const int64_t bad : {int64_t{-2}, Pool::kPages * Pool::kPageSize}) {
    Pool pool;
    Buffer<uint16_t> kv("kv", numbered(2 * Pool::kHeadDim, 1));
    Buffer<int64_t> slots("slots", std::vector<int64_t>{bad});
    const WritePagesParams params = {.pool = pool.params(),
                                     .k = kv.data(),
                                     .v = kv.data() + Pool::kHeadDim,
                                     .slots = slots.data(),
                                     .num_tokens = 1,
                                     .num_kv_heads = 1};
    CHECK_THROWS(run_moves<uint4>(WriteRows{params}, {}),
                 "slots must be -1 or below num_pages * page_size");
  }
}

// --- rope_realign -------------------------------------------------------------------------------

std::vector<float> frequencies(int64_t rotary_dim) {
  std::vector<float> found;
  for (int64_t d = 0; d < rotary_dim; d += 2) {
    found.push_back(static_cast<float>(std::pow(10000.0, -static_cast<double>(d) / rotary_dim)));
  }
  return found;
}

float value(int64_t i) { return std::sin(0.37f * static_cast<float>(i)); }

// R(offset) of one key, in double, of the angles as fp32 has them.
std::vector<double> rotated(const float* key,
                            int64_t head_dim,
                            const std::vector<float>& inv_freq,
                            int32_t offset,
                            bool interleaved) {
  std::vector<double> turned(key, key + head_dim);
  const auto half = static_cast<int64_t>(inv_freq.size());
  for (int64_t d = 0; d < half; ++d) {
    const double angle = static_cast<float>(offset) * inv_freq[d];
    const int64_t a = interleaved ? 2 * d : d, b = interleaved ? 2 * d + 1 : d + half;
    turned[a] = key[a] * std::cos(angle) - key[b] * std::sin(angle);
    turned[b] = key[b] * std::cos(angle) + key[a] * std::sin(angle);
  }
  return turned;
}

template <int kSize, typename Keys>
void run_realign(const Keys& keys, const simt::Schedule& schedule) {
  const dim3 grid{2, static_cast<unsigned>(keys.num_runs())};
  simt::launch({grid, {4, 3}, 0, schedule}, [&] { realign_keys_kernel<float, kSize>(keys); });
}

// Nine heads are two runs, the second of one; an offset of 0, and many turns either way.
template <int kSize>
void expect_realigned(int64_t head_dim, int64_t rotary_dim, bool interleaved, bool in_place) {
  constexpr int64_t kTokens = 7, kHeads = 9;
  const std::vector<float> inv_freq = frequencies(rotary_dim);
  std::vector<float> keys(kTokens * kHeads * head_dim);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = value(static_cast<int64_t>(i));
  const std::vector<int32_t> by = {0, 1, -1, 200000, -131072, 77, 4096};
  Buffer<float> from_freq("inv_freq", inv_freq);
  Buffer<int32_t> offsets("offsets", by);
  for (const simt::Schedule& schedule : simt::kSchedules) {
    Buffer<float> k("k", keys), out("out", keys.size());
    Buffer<float>& result = in_place ? k : out;
    const RopeRealignParams params = {.k = k.data(),
                                      .out = result.data(),
                                      .maybe_offsets = offsets.data(),
                                      .inv_freq = from_freq.data(),
                                      .num_tokens = kTokens,
                                      .num_heads = kHeads,
                                      .head_dim = head_dim,
                                      .rotary_dim = rotary_dim,
                                      .k_token_stride = kHeads * head_dim,
                                      .k_head_stride = head_dim,
                                      .out_token_stride = kHeads * head_dim,
                                      .out_head_stride = head_dim,
                                      .dtype = DType::kFloat32,
                                      .interleaved = interleaved};
    run_realign<kSize>(TokenKeys{params}, schedule);
    for (int64_t row = 0; row < kTokens * kHeads; ++row) {
      const auto expected =
          rotated(keys.data() + row * head_dim, head_dim, inv_freq, by[row / kHeads], interleaved);
      for (int64_t d = 0; d < head_dim; ++d) {
        CHECK(std::abs(result[row * head_dim + d] - expected[d]) < 2e-6);
      }
    }
  }
}

TEST(keys_turn_by_the_offset_of_their_token) {
  for (const bool in_place : {false, true}) {
    expect_realigned<4>(32, 32, false, in_place);
    expect_realigned<4>(48, 24, false, in_place);  // the last 24 dimensions do not turn
    expect_realigned<1>(10, 6, false, in_place);
    expect_realigned<1>(12, 8, true, in_place);
  }
}

TEST(pages_turn_their_valid_keys_alone) {
  constexpr int64_t kPages = 4, kPageSize = 6, kDim = 16;
  const std::vector<float> inv_freq = frequencies(kDim);
  std::vector<float> keys(kPages * kPageSize * kDim);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = value(static_cast<int64_t>(i));
  // Page, position, valid slots, offset: full, partly valid, nothing to turn, none valid.
  const std::vector<PageRef> refs = {{2, 0, 6, 500}, {0, 6, 5, -3}, {3, 0, 6, 0}, {1, 0, 0, 9}};
  Buffer<float> from_freq("inv_freq", inv_freq);
  Buffer<PageRef> page_refs("page_refs", refs);
  for (const simt::Schedule& schedule : simt::kSchedules) {
    Buffer<float> k_cache("k_cache", keys);
    const RopeRealignPagesParams params = {.k_cache = k_cache.data(),
                                           .page_refs = page_refs.data(),
                                           .inv_freq = from_freq.data(),
                                           .num_refs = static_cast<int64_t>(refs.size()),
                                           .num_pages = kPages,
                                           .page_size = kPageSize,
                                           .head_dim = kDim,
                                           .rotary_dim = kDim,
                                           .k_page_stride = kPageSize * kDim,
                                           .k_slot_stride = kDim,
                                           .dtype = DType::kFloat32};
    run_realign<4>(PageKeys{params}, schedule);
    for (const PageRef& ref : refs) {
      for (int64_t slot = 0; slot < kPageSize; ++slot) {
        const int64_t at = (ref.page * kPageSize + slot) * kDim;
        const bool turns = slot < ref.num_valid && ref.rotation_offset != 0;
        const auto expected =
            rotated(keys.data() + at, kDim, inv_freq, turns ? ref.rotation_offset : 0, false);
        for (int64_t d = 0; d < kDim; ++d) CHECK(std::abs(k_cache[at + d] - expected[d]) < 2e-6);
      }
    }
  }
}

TEST(pages_outside_the_cache_are_not_turned) {
  Buffer<float> k_cache("k_cache", std::vector<float>(2 * 4 * 8, 1.0f));
  Buffer<float> from_freq("inv_freq", frequencies(8));
  Buffer<PageRef> page_refs("page_refs", std::vector<PageRef>{{2, 0, 4, 1}});
  CHECK_THROWS(run_realign<4>(PageKeys{{.k_cache = k_cache.data(),
                                        .page_refs = page_refs.data(),
                                        .inv_freq = from_freq.data(),
                                        .num_refs = 1,
                                        .num_pages = 2,
                                        .page_size = 4,
                                        .head_dim = 8,
                                        .rotary_dim = 8,
                                        .k_page_stride = 32,
                                        .k_slot_stride = 8}},
                              {}),
               "page_refs must name pages below num_pages");
}

}  // namespace
