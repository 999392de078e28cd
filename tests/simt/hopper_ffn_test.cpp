// gathered_ffn as Hopper runs it against fp64, in every schedule: wgmma and the copy engine from 65
// rows on, mma.sync below.
#include "best_plan.h"
#include "cuda/ffn/hopper_gemm.cuh"
#include "ffn_case.hpp"
#include "linear_case.hpp"

namespace {

using namespace redknot;
using namespace redknot::gpu;
using BF16 = __nv_bfloat16;

template <typename T, Result kResult>
void run_product(const RowGemm& gemm, int32_t workers, const simt::Schedule& schedule) {
  const auto blocks = static_cast<unsigned>(workers);
  simt::launch({{blocks}, {kGemmThreads}, kGemmSharedBytes, schedule},
               [&] { row_gemm_kernel<T, kResult>(with_at_most(gemm, kLowRows)); });
  HopperGemm params;
  const DType dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
  CHECK(make_hopper_gemm(with_more_than(gemm, kLowRows), dtype, &params));
  simt::launch({{blocks}, {kHopperThreads}, sizeof(HopperShared), schedule},
               [&] { hopper_gemm_kernel<T, kResult>(params); });
}

// The launches of launch_ffn.cuh.
template <typename T>
void run_hopper_chunk(const FfnChunk& chunk, int32_t workers, const simt::Schedule& schedule) {
  norm_chunk<T>(chunk, workers, schedule);
  run_product<T, Result::kGated>(chunk.gate_up, workers, schedule);
  run_product<T, Result::kScatterAdd>(chunk.down, workers, schedule);
}

template <typename T>
void expect_right(const FfnCase& c) {
  expect_right_ffn<T>(c, run_hopper_chunk<T>);
}

TEST(no_row) { expect_right<BF16>({.rows = {}}); }
TEST(one_row) { expect_right<BF16>({.rows = {7}}); }
TEST(either_kernel_at_its_border) {
  expect_right<BF16>({.rows = first_rows(64), .num_tokens = 66});
  expect_right<BF16>({.rows = first_rows(65), .num_tokens = 66});
}
TEST(odd_sizes_in_fp16) {
  expect_right<__half>(
      {.rows = first_rows(131), .num_tokens = 140, .hidden_dim = 264, .ffn_dim = 136});
}
TEST(packed_and_strided) {
  expect_right<BF16>({.rows = first_rows(130),
                      .num_tokens = 131,
                      .hidden_dim = 96,
                      .ffn_dim = 264,
                      .is_packed = true,
                      .padding = 8,
                      .workers = 2});
}
TEST(more_steps_than_stages_and_items_than_blocks) {
  expect_right<__half>(
      {.rows = first_rows(70), .num_tokens = 70, .hidden_dim = 520, .ffn_dim = 200, .workers = 1});
}
TEST(splits) {
  const FfnCase c{
      .rows = first_rows(66), .num_tokens = 66, .hidden_dim = 1608, .ffn_dim = 72, .workers = 3};
  const GemmPlan unsplit = unsplit_plan(HopperTile::kSize, 66, 2 * c.ffn_dim, c.hidden_dim);
  CHECK(best_plan(HopperTile::kSize, unsplit, c.workers, 1 << 30).splits > 1);
  expect_right<__half>(c);
}
TEST(chunks_of_rows) {
  expect_right<BF16>({.rows = first_rows(150), .num_tokens = 150, .chunk_rows = 80});
}
TEST(gelu) {
  expect_right<__half>(
      {.rows = first_rows(80), .num_tokens = 80, .activation = Activation::kGeluTanh});
}

template <typename T>
void run_hopper_linear(const LinearChunk& chunk, int32_t workers, const simt::Schedule& schedule) {
  gather_or_clear<T>(chunk, workers, schedule);
  run_product<T, Result::kStore>(chunk.product, workers, schedule);
}

TEST(linear) {
  expect_right_linear<BF16>(
      {.rows = first_rows(80), .num_tokens = 90, .has_norm = true, .has_bias = true},
      run_hopper_linear<BF16>);
  expect_right_linear<__half>({.num_tokens = 130, .in_dim = 136, .out_dim = 264, .takes_all = true},
                              run_hopper_linear<__half>);
}

TEST(ups_that_begin_a_row_late_are_far_off) {
  Ffn<BF16> ffn({.rows = first_rows(70), .num_tokens = 70});
  const double error =
      ffn.error({}, [&](FfnChunk chunk, int32_t workers, const simt::Schedule& schedule) {
        chunk.gate_up.b_up = static_cast<const BF16*>(chunk.gate_up.b_up) + chunk.gate_up.depth;
        chunk.gate_up.columns -= 1;
        run_hopper_chunk<BF16>(chunk, workers, schedule);
      });
  CHECK(error > 100);
}

}  // namespace
