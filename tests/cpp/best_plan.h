#pragma once

#include <algorithm>

#include "cuda/ffn/schedule.h"

namespace redknot::gpu {

// What the lanes of a warp find together.
inline GemmPlan best_plan(TileSize tile,
                          GemmPlan unsplit,
                          int32_t workers,
                          int64_t partial_floats) {
  uint64_t best = kNoPlan;
  for (int32_t splits = 1; splits <= kMaxSplits; ++splits) {
    best = std::min(best, rank_of_splits(tile, unsplit, splits, workers, partial_floats));
  }
  return split_plan(unsplit, static_cast<int32_t>(best & 0xffffffffu));
}

}  // namespace redknot::gpu
