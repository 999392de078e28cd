// gathered_ffn with the mma.sync kernels against fp64, in every schedule; two runs agree bit by
// bit.
#include "best_plan.h"
#include "ffn_case.hpp"
#include "linear_case.hpp"

namespace {

using namespace redknot;
using namespace redknot::gpu;
using BF16 = __nv_bfloat16;

template <typename T>
void expect_right(const FfnCase& c) {
  expect_right_ffn<T>(c, run_chunk<T>);
}

TEST(a_few_rows) { expect_right<BF16>({.rows = {0, 3, 4, 17, 38}}); }
TEST(a_few_rows_fp16) { expect_right<__half>({.rows = {38, 3, 4, 17, 0}, .is_packed = true}); }
TEST(no_row) { expect_right<BF16>({.rows = {}}); }
TEST(one_row) { expect_right<__half>({.rows = {7}}); }
TEST(every_row) { expect_right<BF16>({.rows = first_rows(40)}); }

// The borders between the tiles for 16, 64 and more rows.
TEST(flat_tiles_end_at_16_rows) {
  for (const int32_t count : {15, 16, 17}) {
    expect_right<__half>({.rows = first_rows(count), .hidden_dim = 72, .ffn_dim = 104});
  }
}
TEST(low_tiles_end_at_64_rows) {
  for (const int32_t count : {63, 64, 65}) {
    expect_right<BF16>({.rows = first_rows(count), .num_tokens = 70, .hidden_dim = 72});
  }
}
TEST(wide_tiles_of_odd_sizes) {
  expect_right<__half>(
      {.rows = first_rows(131), .num_tokens = 140, .hidden_dim = 264, .ffn_dim = 136});
}
TEST(wide_tiles_packed_and_strided) {
  expect_right<BF16>({.rows = first_rows(130),
                      .num_tokens = 131,
                      .hidden_dim = 96,
                      .ffn_dim = 264,
                      .is_packed = true,
                      .padding = 8});
}

// One column tile for many workers: the depth is split among them.
template <typename T, typename Tile>
void expect_right_split(const FfnCase& c) {
  const auto rows = static_cast<int32_t>(c.rows.size());
  const GemmPlan unsplit = unsplit_plan(Tile::kSize, rows, 2 * c.ffn_dim, c.hidden_dim);
  CHECK(best_plan(Tile::kSize, unsplit, c.workers, 1 << 30).splits > 1);
  expect_right<T>(c);
}

TEST(splits_of_flat_tiles) {
  expect_right_split<BF16, FlatTile>(
      {.rows = {1, 2, 30}, .hidden_dim = 520, .ffn_dim = 64, .workers = 9});
}
TEST(splits_of_low_tiles) {
  expect_right_split<__half, LowTile>(
      {.rows = first_rows(33), .hidden_dim = 1040, .ffn_dim = 64, .workers = 7});
}
TEST(splits_of_wide_tiles) {
  expect_right_split<__half, WideTile>(
      {.rows = first_rows(70), .num_tokens = 70, .hidden_dim = 1608, .ffn_dim = 72, .workers = 2});
}

TEST(chunks_of_rows) {
  expect_right<BF16>({.rows = first_rows(37), .chunk_rows = 16});  // the last has 5 rows
  expect_right<BF16>({.rows = first_rows(32), .chunk_rows = 16});  // the last has none
}
TEST(gelu) {
  expect_right<__half>({.rows = {0, 3, 4, 17, 38}, .activation = Activation::kGeluTanh});
}

// Not checked on the device; nobody else's memory may suffer.
TEST(rows_that_do_not_exist_are_skipped) {
  FfnCase c{.rows = {4, 40, -1, 1000000, 7}};
  expect_right<BF16>(c);
}

// --- gathered_linear
// ------------------------------------------------------------------------------

TEST(linear_of_gathered_rows) {
  for (const bool has_norm : {false, true}) {
    for (const bool has_bias : {false, true}) {
      expect_right_linear<BF16>({.rows = {3, 0, 17, 3}, .has_norm = has_norm, .has_bias = has_bias},
                                run_linear<BF16>);
    }
  }
}
TEST(linear_of_all_rows) {
  expect_right_linear<__half>({.num_tokens = 19, .takes_all = true, .has_bias = true},
                              run_linear<__half>);
}
TEST(linear_in_chunks) {
  expect_right_linear<__half>(
      {.num_tokens = 37, .takes_all = true, .has_norm = true, .chunk_rows = 16},
      run_linear<__half>);
  expect_right_linear<BF16>({.num_tokens = 37, .takes_all = true, .chunk_rows = 16},
                            run_linear<BF16>);
}
TEST(linear_with_split_depth) {
  expect_right_linear<BF16>(
      {.num_tokens = 5, .in_dim = 1032, .out_dim = 72, .takes_all = true, .workers = 9},
      run_linear<BF16>);
}

// --- what the comparison would see ---------------------------------------------------------------

template <typename Spoil>
double error_of(const FfnCase& c, Spoil&& spoil) {
  Ffn<__half> ffn(c);
  return ffn.error({}, [&](FfnChunk chunk, int32_t workers, const simt::Schedule& schedule) {
    spoil(chunk);
    run_chunk<__half>(chunk, workers, schedule);
  });
}

TEST(gate_and_up_in_each_others_place_are_far_off) {
  const auto swap = [](FfnChunk& chunk) { std::swap(chunk.gate_up.b, chunk.gate_up.b_up); };
  CHECK(error_of({.rows = first_rows(5)}, swap) > 100);
}

TEST(parts_that_are_added_up_before_all_have_arrived_are_nan) {
  const FfnCase c{.rows = {1, 2, 30}, .hidden_dim = 520, .ffn_dim = 64, .workers = 9};
  const auto nothing = [](FfnChunk&) {};
  CHECK(error_of(c, nothing) < kFfnTolerance);
  // The norm leaves the arrivals of the first product alone: NaN as they are, or one too many.
  const auto keep = [](FfnChunk& chunk) {
    std::fill_n(chunk.norm.arrivals, chunk.norm.num_arrivals, 1);
    chunk.norm.num_arrivals = 0;
  };
  CHECK(error_of(c, keep) > 100);
}

TEST(a_row_that_is_left_out_is_far_off) {
  const auto skip = [](FfnChunk& chunk) { chunk.down.num_tokens = 39; };
  CHECK(error_of({.rows = first_rows(40)}, skip) > 100);
}

}  // namespace
