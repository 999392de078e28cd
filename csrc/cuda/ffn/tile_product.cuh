#pragma once

#include "cuda/ffn/tile_loads.cuh"
#include "cuda/ptx/matrix.cuh"

// A warp's part of a tile: 16 kRowTiles rows by 8 kColumnTiles columns, in fragments of
// mma.m16n8k16 (ptx/matrix.cuh).
namespace redknot::gpu {

template <typename T, typename Tile>
struct TileProduct {
  static constexpr TileSize kSize = Tile::kSize;
  static constexpr int kRows = kSize.rows / Tile::kWarpRows;
  static constexpr int kColumns = kSize.columns / Tile::kWarpColumns;
  static constexpr int kRowTiles = kRows / 16;
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kDepthTiles = kSize.depth / 16;
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0);
  static_assert(Tile::kWarpRows * Tile::kWarpColumns * 32 == kGemmThreads);

  // 16 of depth.
  struct Fragments {
    uint32_t a[kRowTiles][4];
    uint32_t b[kColumnTiles / 2][4];  // of two column tiles each
  };

  float sums[kRowTiles][kColumnTiles][4];

  __device__ static int first_row() {
    return static_cast<int>(threadIdx.x) / 32 / Tile::kWarpColumns * kRows;
  }
  __device__ static int first_column() {
    return static_cast<int>(threadIdx.x) / 32 % Tile::kWarpColumns * kColumns;
  }

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
      }
    }
  }

  __device__ static void load(Fragments& to, const T* stage, int depth_tile) {
    const int lane = threadIdx.x % 32;
    const int a_row = first_row() + lane % 16, a_vector = depth_tile * 2 + lane / 16;
    const int a = swizzled<kSize.depth>(a_row, a_vector) * static_cast<int>(sizeof(T));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      constexpr int kBytes = 16 * kSize.depth * static_cast<int>(sizeof(T));
      ptx::load_matrix_x4(to.a[m], stage, a + m * kBytes);
    }
    const int b_row = kSize.rows + first_column() + lane / 16 * 8 + lane % 8;
    const int b_vector = depth_tile * 2 + lane / 8 % 2;
    const int b = swizzled<kSize.depth>(b_row, b_vector) * static_cast<int>(sizeof(T));
#pragma unroll
    for (int n = 0; n < kColumnTiles / 2; ++n) {
      constexpr int kBytes = 16 * kSize.depth * static_cast<int>(sizeof(T));
      ptx::load_matrix_x4(to.b[n], stage, b + n * kBytes);
    }
  }

  __device__ void add(const Fragments& from) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const uint32_t b[2] = {from.b[n / 2][n % 2 * 2], from.b[n / 2][n % 2 * 2 + 1]};
        ptx::mma_16816<T>(sums[m][n], from.a[m], b);
      }
    }
  }
};

}  // namespace redknot::gpu
