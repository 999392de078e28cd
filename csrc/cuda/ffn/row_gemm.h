#pragma once

#include <cstdint>

#include "cuda/common/host_device.h"
#include "cuda/ffn/schedule.h"
#include "redknot/ffn.h"

// The products of gathered_ffn as kernels see them.
namespace redknot::gpu {

// What becomes of a sum of the product.
enum class Result {
  kGated,       // activation(gate) * up, of two matrices B that share A, is stored
  kScatterAdd,  // it is added to the row that `indices` names
  kStore,       // it is stored, with the bias if there is one
};

// C [rows, columns] = A [rows, depth] B [columns, depth]^T, where only the device knows `rows`.
struct RowGemm {
  const void* a = nullptr;     // [max_rows, depth], whatever is behind the rows
  const void* b = nullptr;     // [columns, depth]
  const void* b_up = nullptr;  // [columns, depth], kGated: the up projection; b is the gate
  int64_t a_stride = 0;
  int64_t b_stride = 0;
  int64_t b_up_stride = 0;
  int32_t columns = 0;
  int32_t depth = 0;
  // This call's rows are those of [first_row, first_row + max_rows) that are below *count; calls
  // with fewer than least_rows or more than most_rows of them are another kernel's.
  const int32_t* count = nullptr;  // null: max_rows
  int32_t first_row = 0;
  int32_t max_rows = 0;
  int32_t least_rows = 0;
  int32_t most_rows = 0;
  // Splits of a tile leave their sums here; whoever comes last adds them up.
  float* partials = nullptr;    // [partial_floats]
  int32_t* arrivals = nullptr;  // zeros, one for each tile that may be split
  int64_t partial_floats = 0;
  // kGated, kStore: out [max_rows, columns]; kScatterAdd: the residual [num_tokens, columns].
  void* out = nullptr;
  const void* bias = nullptr;  // [columns] or null, kStore
  int64_t out_stride = 0;
  const int32_t* indices = nullptr;  // [first_row + max_rows], kScatterAdd
  int32_t num_tokens = 0;
  Activation activation = Activation::kSilu;
};

// The part of a call that has up to most_rows rows; the part that has more.
inline RowGemm with_at_most(RowGemm gemm, int32_t most_rows) {
  gemm.most_rows = most_rows;
  return gemm;
}
inline RowGemm with_more_than(RowGemm gemm, int32_t rows) {
  gemm.least_rows = rows + 1;
  return gemm;
}

RK_HOST_DEVICE inline int32_t rows_of_call(const int32_t* count,
                                           int32_t first_row,
                                           int32_t max_rows) {
  if (count == nullptr) return max_rows;
  const int32_t rows = *count - first_row;
  return rows < 0 ? 0 : rows < max_rows ? rows : max_rows;
}

// Tiles of the mma.sync kernel; 256 threads, at most 96 KiB of stages, which GPUs of 8.6 and 8.9
// have too.
struct WideTile {  // a warp computes 64 x 64: half of the bytes that 32 x 64 would read per product
  static constexpr TileSize kSize{128, 256, 32};
  static constexpr int kStages = 4;
  static constexpr int kWarpRows = 2, kWarpColumns = 4;
};
struct LowTile {  // up to 64 rows: the weights are read once, and their bandwidth is what counts
  static constexpr TileSize kSize{64, 128, 64};
  static constexpr int kStages = 4;
  static constexpr int kWarpRows = 2, kWarpColumns = 4;
};
struct FlatTile {  // up to 16 rows
  static constexpr TileSize kSize{16, 128, 64};
  static constexpr int kStages = 5;
  static constexpr int kWarpRows = 1, kWarpColumns = 8;
};
constexpr int32_t kLowRows = LowTile::kSize.rows;
constexpr int32_t kFlatRows = FlatTile::kSize.rows;
constexpr int kGemmThreads = 256;

template <typename Tile>
constexpr int stage_bytes() {
  return (Tile::kSize.rows + Tile::kSize.columns) * Tile::kSize.depth * 2;
}
template <typename Tile>
constexpr int tile_bytes() {
  return Tile::kStages * stage_bytes<Tile>();
}
constexpr int kStageBytes = tile_bytes<WideTile>();
static_assert(tile_bytes<LowTile>() <= kStageBytes && tile_bytes<FlatTile>() <= kStageBytes);
constexpr int kGemmSharedBytes = kStageBytes + 16;  // and a word for whoever comes last
static_assert(kGemmSharedBytes <= 99 * 1024);

// Blocks that run at once, one per multiprocessor: the products take its registers whole.
struct GemmDevice {
  int32_t workers = 0;
  bool is_hopper = false;  // runs hopper_ffn.cu
};

// Partial sums: as many as two waves of the widest tile have. An item that is split is no larger.
constexpr int64_t kPartialFloatsPerWorker = 2 * WideTile::kSize.rows * WideTile::kSize.columns;
// Tiles that are split are fewer than their items, which fit the partial sums.
constexpr int64_t kArrivalsPerWorker =
    kPartialFloatsPerWorker / (FlatTile::kSize.rows * FlatTile::kSize.columns) / 2;

constexpr int kVector = 8;  // elements in 16 bytes

// Rows of kDepth elements whose 16-byte vectors are exchanged within a row, so that the eight rows
// which ldmatrix reads at once lie in different banks: a line of the banks holds one row of 64
// elements, or two of 32.
template <int kDepth>
RK_HOST_DEVICE constexpr int swizzled(int row, int vector) {
  static_assert(kDepth == 32 || kDepth == 64);
  const int turn = kDepth == 64 ? row % 8 : row / 2 % 4;
  return row * kDepth + (vector ^ turn) * kVector;
}

// Where row r of a tile's part of B lies in the weights. With gate and up at once, a warp of
// `warp_columns` rows of B holds the gates of half as many columns of C, and behind them the ups of
// the same columns.
struct WeightRow {
  int32_t column;  // of C, from the tile's first
  bool is_up;
};
RK_HOST_DEVICE constexpr WeightRow weight_row(bool is_gated, int32_t warp_columns, int32_t row) {
  if (!is_gated) return {row, false};
  const int32_t half = warp_columns / 2;
  return {row / warp_columns * half + row % half, row % warp_columns >= half};
}

}  // namespace redknot::gpu
