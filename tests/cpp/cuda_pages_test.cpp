// Where the rows of write_pages and copy_pages go, without a GPU: the maps are plain templates.
#include <numeric>

#include "check.h"
#include "cuda/common/alignment.h"
#include "cuda/common/launch_shape.h"
#include "cuda/pages/row_moves.h"

namespace {

using namespace redknot;
using gpu::CopyRows;
using gpu::RowMove;
using gpu::WriteRows;

// K and V as two halves of the last dimension of one tensor [num_pages, page_size, 2 * head_dim].
PagePool interleaved_pool() {
  return {.num_pages = 5,
          .page_size = 4,
          .head_dim = 8,
          .k_page_stride = 64,
          .k_slot_stride = 16,
          .v_page_stride = 64,
          .v_slot_stride = 16};
}

TEST(write_rows_go_to_their_slots) {
  // Two tokens of three heads, views of a fused projection: token stride beyond the heads.
  const std::vector<int64_t> slots = {7, -1, 0, 19, 4, -1};
  const WriteRows rows{{.pool = interleaved_pool(),
                        .slots = slots.data(),
                        .num_tokens = 2,
                        .num_kv_heads = 3,
                        .k_token_stride = 100,
                        .k_head_stride = 8,
                        .v_token_stride = 200,
                        .v_head_stride = 16,
                        .slots_token_stride = 3}};
  CHECK_EQ(rows.num_rows(), 6);
  for (int64_t row = 0; row < rows.num_rows(); ++row) {
    const int64_t token = row / 3, head = row % 3, slot = slots[row];
    const RowMove move = rows(row);
    CHECK_EQ(move.skip, slot < 0);
    if (move.skip) continue;
    CHECK_EQ(move.k_from, token * 100 + head * 8);
    CHECK_EQ(move.v_from, token * 200 + head * 16);
    CHECK_EQ(move.k_to, slot / 4 * 64 + slot % 4 * 16);
    CHECK_EQ(move.v_to, move.k_to);
  }
}

TEST(addresses_do_not_wrap_at_32_bits) {
  PagePool pool = interleaved_pool();
  pool.num_pages = int64_t{1} << 33;
  const int64_t page = (int64_t{1} << 32) + 3;
  const int64_t slot_number = page * pool.page_size + 2;
  const WriteRows rows{{.pool = pool, .slots = &slot_number, .num_tokens = 1, .num_kv_heads = 1}};
  CHECK_EQ(rows(0).k_to, page * 64 + 2 * 16);
}

TEST(copy_rows_cover_whole_pages) {
  const std::vector<int32_t> copies = {1, 3, 2, 0};
  const CopyRows rows{{.pool = interleaved_pool(), .copies = copies.data(), .num_copies = 2}};
  CHECK_EQ(rows.num_rows(), 8);
  for (int64_t row = 0; row < rows.num_rows(); ++row) {
    const RowMove move = rows(row);
    CHECK_EQ(move.skip, false);
    CHECK_EQ(move.k_from, copies[row / 4 * 2] * 64 + row % 4 * 16);
    CHECK_EQ(move.k_to, copies[row / 4 * 2 + 1] * 64 + row % 4 * 16);
  }
}

TEST(division_is_exact_on_both_sides_of_32_bits) {
  for (const int64_t n : {int64_t{0}, int64_t{17}, int64_t{UINT32_MAX}, int64_t{1} << 40}) {
    for (const int64_t divisor : {int64_t{1}, int64_t{3}, int64_t{UINT32_MAX}, int64_t{1} << 35}) {
      const auto [quotient, remainder] = gpu::divide(n, divisor);
      CHECK_EQ(quotient, n / divisor);
      CHECK_EQ(remainder, n % divisor);
    }
  }
}

TEST(vectors_need_aligned_bases_and_strides) {
  alignas(16) const char base[32] = {};
  CHECK(gpu::are_vectors_aligned({base, base + 16}, {8, 64}, 2));
  CHECK(!gpu::are_vectors_aligned({base + 2}, {8}, 2));
  CHECK(!gpu::are_vectors_aligned({base}, {8, 4}, 2));
  CHECK(gpu::are_vectors_aligned({base}, {8, 4}, 4));
}

TEST(a_launch_covers_every_row_within_the_limits_of_a_block) {
  for (const int64_t num_rows : {int64_t{1}, int64_t{15}, int64_t{1000}, int64_t{1} << 40}) {
    for (const int64_t accesses : {1, 12, 16, 256, 1000}) {
      const gpu::LaunchShape shape = gpu::streaming_shape(num_rows, accesses);
      CHECK(shape.lanes >= 1 && shape.rows >= 1 && shape.blocks >= 1);
      CHECK(shape.lanes * shape.rows <= gpu::kThreadsPerBlock);
      // One pass, or a grid that the rows stride over.
      CHECK(int64_t{shape.blocks} * shape.rows >= num_rows || shape.blocks == gpu::kMaxBlocks);
      CHECK((int64_t{shape.blocks} - 1) * shape.rows < num_rows);
    }
  }
}

}  // namespace
