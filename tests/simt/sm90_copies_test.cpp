// The copy engine: boxes of tensors, bulk copies; and what describes matrices to wgmma.
#include <algorithm>

#include "check.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/matrix_descriptor.h"

namespace {

using namespace redknot::gpu;
using simt::Buffer;

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
