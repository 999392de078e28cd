// The work of gathered_ffn on a GPU as plain arithmetic: which block computes what, where it lies.
#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "best_plan.h"
#include "check.h"
#include "cuda/ffn/ffn_workspace.h"

namespace {

using namespace redknot;
using namespace redknot::gpu;

constexpr TileSize kTiles[] = {FlatTile::kSize, LowTile::kSize, WideTile::kSize};
constexpr int64_t kNoLimit = int64_t{1} << 40;

TEST(items_cover_every_step_of_every_tile_once) {
  for (const TileSize tile : kTiles) {
    for (const int32_t rows : {1, 16, 17, 129, 4097}) {
      for (const int32_t splits : {1, 2, 3, 7}) {
        const GemmPlan plan = split_plan(unsplit_plan(tile, rows, 1000, 1032), splits);
        std::map<int32_t, std::vector<int>> steps;
        for (int32_t i = 0; i < plan.num_items(); ++i) {
          const WorkItem2d item = item_at(plan, i);
          CHECK(item.row_tile >= 0 && item.row_tile * tile.rows < rows);
          CHECK(item.column_tile >= 0 && item.column_tile * tile.columns < 1000);
          CHECK(item.step_begin < item.step_end && item.split < plan.splits);
          auto& seen = steps[item.tile(plan)];
          seen.resize(plan.depth_steps);
          for (int32_t s = item.step_begin; s < item.step_end; ++s) ++seen.at(s);
        }
        CHECK_EQ(static_cast<int32_t>(steps.size()), plan.num_tiles());
        CHECK(plan.depth_steps * tile.depth >= 1032);
        for (const auto& [number, seen] : steps) {
          CHECK(number < plan.num_tiles());
          CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
        }
      }
    }
  }
}

TEST(blocks_that_run_at_once_share_rows_and_columns) {
  const GemmPlan plan = unsplit_plan(WideTile::kSize, 8192, 2 * 14336, 4096);
  std::set<int32_t> row_tiles, column_tiles;
  for (int32_t i = 0; i < 132; ++i) {
    row_tiles.insert(item_at(plan, i).row_tile);
    column_tiles.insert(item_at(plan, i).column_tile);
  }
  CHECK_EQ(row_tiles.size(), 16u);
  CHECK_EQ(column_tiles.size(), 9u);
}

TEST(a_full_gpu_is_not_split) {
  const GemmPlan unsplit = unsplit_plan(WideTile::kSize, 8192, 28672, 4096);
  CHECK_EQ(best_plan(WideTile::kSize, unsplit, 132, kNoLimit).splits, 1);
}

TEST(few_tiles_are_split_until_the_gpu_is_full) {
  // 512 rows of a down projection: 4 x 16 tiles for 132 blocks.
  const GemmPlan down = unsplit_plan(WideTile::kSize, 512, 4096, 14336);
  CHECK_EQ(best_plan(WideTile::kSize, down, 132, kNoLimit).splits, 2);
  // One token: 32 column tiles of 224 steps each.
  const GemmPlan one =
      best_plan(FlatTile::kSize, unsplit_plan(FlatTile::kSize, 1, 4096, 14336), 132, kNoLimit);
  const int32_t waves = ceil_divide(one.num_items(), 132);
  // The busiest block has little more than its part of all steps.
  CHECK(waves * one.steps_per_split * 132 < 1.25 * one.num_tiles() * one.depth_steps);
}

TEST(splits_stay_within_their_workspace) {
  constexpr int32_t kWorkers = 108;
  const int64_t floats = kWorkers * kPartialFloatsPerWorker;
  for (const TileSize tile : kTiles) {
    for (int32_t rows = 1; rows <= 4096; rows = rows * 3 / 2 + 1) {
      for (const int32_t columns : {8, 1024, 5120, 28672}) {
        for (const int32_t depth : {8, 4096, 25600}) {
          const GemmPlan unsplit = unsplit_plan(tile, rows, columns, depth);
          const GemmPlan plan = best_plan(tile, unsplit, kWorkers, floats);
          CHECK(plan.splits >= 1 && plan.splits <= kMaxSplits);
          if (plan.splits == 1) continue;
          CHECK(int64_t{plan.num_items()} * tile.rows * tile.columns <= floats);
          CHECK(plan.num_tiles() <= kWorkers * kArrivalsPerWorker);
        }
      }
    }
  }
}

// ldmatrix reads eight rows of 16 bytes at once, without a conflict where they are in eight
// different groups of four banks.
template <int kDepth>
void expect_no_bank_conflicts() {
  std::set<int> places;
  for (int row = 0; row < 16; ++row) {
    for (int vector = 0; vector < kDepth / kVector; ++vector) {
      places.insert(swizzled<kDepth>(row, vector) / kVector);
      std::set<int> banks;
      for (int r = row / 8 * 8; r < row / 8 * 8 + 8; ++r) {
        banks.insert(swizzled<kDepth>(r, vector) * 2 / 16 % 8);
      }
      CHECK_EQ(banks.size(), 8u);
    }
  }
  CHECK_EQ(static_cast<int>(places.size()), 16 * kDepth / kVector);  // each has its own place
  CHECK_EQ(*places.rbegin(), 16 * kDepth / kVector - 1);
}
TEST(rows_of_32_have_no_bank_conflicts) { expect_no_bank_conflicts<32>(); }
TEST(rows_of_64_have_no_bank_conflicts) { expect_no_bank_conflicts<64>(); }

TEST(gates_and_ups_of_a_column_are_the_same_warps) {
  for (const int32_t part : {16, 32, 64}) {
    std::set<std::pair<int32_t, bool>> seen;
    for (int32_t row = 0; row < 256; ++row) {
      const WeightRow weight = weight_row(true, part, row);
      seen.insert({weight.column, weight.is_up});
      CHECK(weight.column < 128);
      if (!weight.is_up) {
        const WeightRow other = weight_row(true, part, row + part / 2);
        CHECK(other.is_up && other.column == weight.column);
      }
    }
    CHECK_EQ(seen.size(), 256u);
    CHECK_EQ(weight_row(false, part, 77).column, 77);
  }
}

TEST(rows_of_a_call_are_those_of_its_chunk) {
  const auto rows = [](int32_t count, int32_t first_row) {
    return rows_of_call(&count, first_row, 16);
  };
  CHECK_EQ(rows(0, 0), 0);
  CHECK_EQ(rows(5, 0), 5);
  CHECK_EQ(rows(20, 0), 16);
  CHECK_EQ(rows(20, 16), 4);
  CHECK_EQ(rows(10, 16), 0);
  CHECK_EQ(rows(-3, 0), 0);
  CHECK_EQ(rows_of_call(nullptr, 0, 16), 16);
}

TEST(workspace_parts_do_not_overlap) {
  GatheredFfnParams params;
  params.max_rows = 10000;
  params.hidden_dim = 4096;
  params.ffn_dim = 14336;
  params.dtype = DType::kBFloat16;
  const FfnWorkspace workspace(params, {132, false});
  CHECK_EQ(workspace.chunk_rows, kMaxChunkRows);
  CHECK(workspace.activated - workspace.normed >= kMaxChunkRows * 4096 * 2);
  CHECK(workspace.partials - workspace.activated >= kMaxChunkRows * 14336 * 2);
  CHECK(workspace.arrivals - workspace.partials >= workspace.partial_floats() * 4);
  CHECK(workspace.num_bytes - workspace.arrivals >= 2 * workspace.num_arrivals() * 4);
}

}  // namespace
