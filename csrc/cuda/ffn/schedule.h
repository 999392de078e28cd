#pragma once

#include <cstdint>

#include "cuda/common/host_device.h"

// Which part of a product C [rows, columns] = A [rows, depth] B [columns, depth]^T a block of a
// persistent grid computes, and when. The rows are only known on the device, so it is the device
// that plans; the numbers below are all it needs, and the host tests them.
namespace redknot::gpu {

constexpr int32_t kMaxSplits = 32;  // a lane each: a warp looks for the best at once

// A tile of C and the steps of depth that it is summed in.
struct TileSize {
  int32_t rows;
  int32_t columns;  // rows of B: twice the columns of C where gate and up are computed at once
  int32_t depth;
};

struct GemmPlan {
  int32_t row_tiles;
  int32_t column_tiles;
  int32_t depth_steps;      // of all splits together
  int32_t splits;           // parts of a tile's depth, each an item of its own
  int32_t steps_per_split;  // the last split may have fewer, and has at least one

  RK_HOST_DEVICE int32_t num_tiles() const { return row_tiles * column_tiles; }
  RK_HOST_DEVICE int32_t num_items() const { return num_tiles() * splits; }
};

RK_HOST_DEVICE inline int32_t ceil_divide(int32_t n, int32_t divisor) {
  return static_cast<int32_t>((static_cast<uint32_t>(n) + static_cast<uint32_t>(divisor) - 1) /
                              static_cast<uint32_t>(divisor));
}

RK_HOST_DEVICE inline GemmPlan unsplit_plan(TileSize tile,
                                            int32_t rows,
                                            int32_t columns,
                                            int32_t depth) {
  const int32_t steps = ceil_divide(depth, tile.depth);
  return {ceil_divide(rows, tile.rows), ceil_divide(columns, tile.columns), steps, 1, steps};
}

RK_HOST_DEVICE inline GemmPlan split_plan(GemmPlan plan, int32_t splits) {
  plan.steps_per_split = ceil_divide(plan.depth_steps, splits);
  plan.splits = ceil_divide(plan.depth_steps, plan.steps_per_split);
  return plan;
}

// Steps of partial sums that fit `partial_floats`; splitting further has no workspace.
RK_HOST_DEVICE inline bool fits_workspace(TileSize tile,
                                          const GemmPlan& plan,
                                          int64_t partial_floats) {
  return plan.splits == 1 || int64_t{plan.num_items()} * tile.rows * tile.columns <= partial_floats;
}

// How long a plan takes, in steps of depth of the busiest of `workers` blocks. An item costs a step
// beside its own: the epilogue. A split writes its sums to memory, which is read once more for each
// by the block that adds them up.
RK_HOST_DEVICE inline int32_t plan_cost(TileSize tile, const GemmPlan& plan, int32_t workers) {
  const int32_t waves = ceil_divide(plan.num_items(), workers);
  if (plan.splits == 1) return waves * (plan.steps_per_split + 1);
  // fp32 sums against the 16-bit elements that a step loads.
  const int32_t move =
      ceil_divide(2 * tile.rows * tile.columns, (tile.rows + tile.columns) * tile.depth);
  return waves * (plan.steps_per_split + 1 + move) + plan.splits * move;
}

// The candidate `splits` and its cost in one number, of which the least is the best: the fewest
// splits among equals.
constexpr uint64_t kNoPlan = ~uint64_t{0};
RK_HOST_DEVICE inline uint64_t rank_of_splits(TileSize tile,
                                              const GemmPlan& unsplit,
                                              int32_t splits,
                                              int32_t workers,
                                              int64_t partial_floats) {
  if (splits > unsplit.depth_steps) return kNoPlan;
  const GemmPlan plan = split_plan(unsplit, splits);
  if (!fits_workspace(tile, plan, partial_floats)) return kNoPlan;
  return uint64_t{static_cast<uint32_t>(plan_cost(tile, plan, workers))} << 32 |
         static_cast<uint32_t>(splits);
}

struct WorkItem2d {
  int32_t row_tile;
  int32_t column_tile;
  int32_t split;
  int32_t step_begin;
  int32_t step_end;

  RK_HOST_DEVICE int32_t tile(const GemmPlan& plan) const {
    return row_tile * plan.column_tiles + column_tile;
  }
};

// Items in the order in which blocks take them: the splits of a tile beside each other; tiles go
// down a band of rows before the next columns, so that the blocks which run at once share what they
// read of A (a band) and of B (a few columns' worth) in the L2 cache.
constexpr int32_t kBandTiles = 16;
RK_HOST_DEVICE inline WorkItem2d item_at(const GemmPlan& plan, int32_t number) {
  const int32_t tile = number / plan.splits, split = number - tile * plan.splits;
  const int32_t band = tile / (kBandTiles * plan.column_tiles);
  const int32_t in_band = tile - band * kBandTiles * plan.column_tiles;
  const int32_t first_row = band * kBandTiles;
  const int32_t left = plan.row_tiles - first_row;
  const int32_t height = left < kBandTiles ? left : kBandTiles;
  const int32_t column = in_band / height;
  const int32_t begin = split * plan.steps_per_split;
  const int32_t end = begin + plan.steps_per_split;
  return {first_row + in_band - column * height,
          column,
          split,
          begin,
          end < plan.depth_steps ? end : plan.depth_steps};
}

}  // namespace redknot::gpu
