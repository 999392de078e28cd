// What the kernels of Hopper are given: boxes of pages, runs of chunks, budgets.
#include "check.h"
#include "cuda/attention/hopper_attend.cuh"

namespace {

using namespace redknot::gpu;
using redknot::DType;
using redknot::PagePool;

TEST(runs_are_the_largest_power_of_two_that_a_page_and_a_block_hold) {
  CHECK_EQ(run_chunks(8, 8), 1);
  CHECK_EQ(run_chunks(16, 8), 1);
  CHECK_EQ(run_chunks(24, 8), 1);
  CHECK_EQ(run_chunks(48, 8), 2);
  CHECK_EQ(run_chunks(64, 8), 4);
  CHECK_EQ(run_chunks(128, 8), 8);
  CHECK_EQ(run_chunks(256, 8), 8);
  CHECK_EQ(run_chunks(256, 4), 4);
}

PagePool pool_of(int64_t num_pages, int64_t page_stride, int64_t slot_stride) {
  PagePool pool;
  pool.dtype = DType::kBFloat16;
  pool.num_pages = num_pages;
  pool.page_size = 64;
  pool.head_dim = 128;
  pool.k_page_stride = pool.v_page_stride = page_stride;
  pool.k_slot_stride = pool.v_slot_stride = slot_stride;
  return pool;
}

TEST(pools_of_engines_have_boxes) {
  const auto encodable = [](const PagePool& pool) {
    return is_encodable(page_layout(pool, true, 16)) && is_encodable(page_layout(pool, false, 1));
  };
  CHECK(encodable(pool_of(100, 64 * 128, 128)));       // a pool of its own
  CHECK(encodable(pool_of(100, 64 * 256, 256)));       // keys and values side by side
  CHECK(encodable(pool_of(100, 64 * 8 * 128, 1024)));  // slots of all heads
  CHECK(encodable(pool_of(1, 7, 128)));                // one page: its stride means nothing
  CHECK(!encodable(pool_of(100, 128, 100 * 128)));     // slots outside, pages inside
  CHECK(!encodable(pool_of(100, 64 * 128 + 8, 128)));  // pages that are no multiple of slots apart
}

TEST(a_layout_says_where_pages_lie) {
  const TensorLayout layout = page_layout(pool_of(100, 64 * 256, 256), true, 32);
  CHECK_EQ(layout.rank, 3);
  CHECK_EQ(layout.size[0], 128u);
  CHECK_EQ(layout.size[1], 64u);
  CHECK_EQ(layout.size[2], 100u);
  CHECK_EQ(layout.stride[1], 256u);
  CHECK_EQ(layout.stride[2], 64u * 256);
  CHECK_EQ(layout.box[0], 64u);
  CHECK_EQ(layout.box[1], 32u);
}

TEST(panels_are_what_the_descriptors_say) {
  alignas(1024) static uint16_t matrix[128 * 256];
  const PanelMatrix<uint16_t, 128> panels{matrix};
  CHECK_EQ(panels.vector_at(0, 0) - matrix, 0);
  CHECK_EQ(panels.vector_at(3, 5) - matrix, 3 * 64 + (5 ^ 3) * 8);
  CHECK_EQ(panels.vector_at(77, 8 + 2) - matrix, 128 * 64 + 77 * 64 + (2 ^ 5) * 8);
  CHECK_EQ(&panels.at(9, 65) - matrix, 128 * 64 + 9 * 64 + (0 ^ 1) * 8 + 1);
}

}  // namespace
