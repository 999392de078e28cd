#pragma once

#include <algorithm>
#include <cstdint>

namespace redknot::gpu {

// How the streaming kernels of this room spread their work: a block is `lanes` threads wide along a
// row and `rows` rows high; blocks stride over the rows, and lanes over a row that is wider.
struct LaunchShape {
  int32_t blocks;
  int32_t lanes;
  int32_t rows;
};

// 256 threads: 8 blocks fill an SM's 2,048, small enough that the last wave is short.
constexpr int64_t kThreadsPerBlock = 256;
// Far more than any GPU runs at once, so that the stride only bounds the grid, never the speed.
constexpr int64_t kMaxBlocks = 65536;

// num_rows > 0, accesses_per_row > 0.
inline LaunchShape streaming_shape(int64_t num_rows, int64_t accesses_per_row) {
  const int64_t lanes = std::min(accesses_per_row, kThreadsPerBlock);
  const int64_t rows = kThreadsPerBlock / lanes;
  const int64_t blocks = std::min((num_rows + rows - 1) / rows, kMaxBlocks);
  return {static_cast<int32_t>(blocks), static_cast<int32_t>(lanes), static_cast<int32_t>(rows)};
}

}  // namespace redknot::gpu
