// What the executor does with correct code: collectives against tables, copies, matrix fragments.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <numeric>

#include "check.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/matrix.cuh"

namespace {

using namespace redknot::gpu;
using simt::Buffer;

TEST(every_thread_of_every_block_runs_once) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    Buffer<int> seen("seen", 2 * 3 * 40);
    std::fill(seen.begin(), seen.end(), 0);
    simt::launch({{2, 3}, {8, 5}, 0, schedule}, [&] {
      const unsigned block = blockIdx.x + gridDim.x * blockIdx.y;
      seen[block * 40 + threadIdx.x + blockDim.x * threadIdx.y] += 1;
    });
    for (const int count : seen) CHECK_EQ(count, 1);
  }
}

TEST(shuffles_votes_and_matches_follow_their_tables) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    simt::launch({{1}, {64}, 0, schedule}, [&] {
      const int lane = threadIdx.x % 32;
      const auto expect = [](bool right) {
        if (!right) throw simt::Error("wrong value");
      };
      const uint32_t all = 0xffffffffu;
      expect(__shfl_sync(all, lane * 3, 7) == 21);
      expect(__shfl_xor_sync(all, lane, 5) == (lane ^ 5));
      expect(__shfl_up_sync(all, lane, 4) == (lane < 4 ? lane : lane - 4));
      expect(__shfl_down_sync(all, lane, 4) == (lane > 27 ? lane : lane + 4));
      expect(__ballot_sync(all, lane % 3 == 0) == 0x49249249u);
      expect(__any_sync(all, lane == 9) && !__any_sync(all, false));
      expect(__all_sync(all, true) && !__all_sync(all, lane != 9));
      expect(__match_any_sync(all, lane % 16) == (0x10001u << (lane % 16)));
      // Halves of a warp may go different ways, each with its own mask.
      if (lane < 16) {
        expect(__shfl_xor_sync(0xffffu, lane, 1) == (lane ^ 1));
      } else {
        expect(__ballot_sync(0xffff0000u, lane == 20) == 1u << 20);
      }
    });
  }
}

TEST(copies_land_group_by_group_at_their_wait) {
  Buffer<float> source("source", 12);
  std::iota(source.begin(), source.end(), 1.0f);
  Buffer<float> seen("seen", 8);
  simt::launch({{1}, {1}, 64}, [&] {
    RK_DYNAMIC_SMEM(smem);
    auto* values = reinterpret_cast<float*>(smem);
    ptx::copy_async_16(values, source.data(), true);
    ptx::copy_commit();
    ptx::copy_async_16(values + 4, source.data() + 4, false);
    ptx::copy_commit();
    seen[0] = values[0];
    ptx::copy_wait<1>();
    seen[1] = values[0];
    seen[2] = values[4];
    ptx::copy_wait<0>();
    seen[3] = values[4];
  });
  CHECK(std::isnan(seen[0]) && std::isnan(seen[2]));
  CHECK_EQ(seen[1], 1.0f);
  CHECK_EQ(seen[3], 0.0f);
}

// C = A B^T by the fragments that the PTX ISA draws, elements indexed without ldmatrix.
template <typename T>
float product_error(const simt::Schedule& schedule, bool through_shared_memory) {
  const auto from_float = [](float x) {
    if constexpr (std::is_same_v<T, __half>) {
      return __float2half_rn(x);
    } else {
      return __float2bfloat16_rn(x);
    }
  };
  Buffer<T> a("a", 16 * 16), b("b", 16 * 16);  // b: row k, column n, n < 8 used
  Buffer<float> c("c", 16 * 8);
  std::vector<float> a_values(256), b_values(256);
  for (int i = 0; i < 256; ++i) {
    a_values[i] = static_cast<float>(i * 37 % 101 - 50) / 16;
    b_values[i] = static_cast<float>(i * 53 % 97 - 48) / 16;
    a[i] = from_float(a_values[i]);
    b[i] = from_float(b_values[i]);
  }
  simt::launch({{1}, {32}, 1024, schedule}, [&] {
    RK_DYNAMIC_SMEM(smem);
    T* a_tile = reinterpret_cast<T*>(smem);
    T* b_tile = a_tile + 256;
    const int lane = threadIdx.x, group = lane / 4, member = lane % 4;
    const auto pair = [](const T* low, const T* high) {
      return uint32_t{low->bits} | uint32_t{high->bits} << 16;
    };
    uint32_t a_regs[4], b_regs[4];
    if (through_shared_memory) {
      for (int i = lane; i < 256; i += 32) a_tile[i] = a[i];
      for (int i = lane; i < 256; i += 32) b_tile[i] = b[i];
      __syncwarp();
      ptx::load_matrix_x4(a_regs, a_tile + lane % 16 * 16 + lane / 16 * 8);
      ptx::load_matrix_x4_transposed(b_regs, b_tile + lane % 16 * 16 + lane / 16 * 8);
    } else {
      for (int i = 0; i < 4; ++i) {
        const T* at = a.data() + (group + i % 2 * 8) * 16 + member * 2 + i / 2 * 8;
        a_regs[i] = pair(at, at + 1);
      }
      for (int i = 0; i < 2; ++i) {
        const T* at = b.data() + (member * 2 + i * 8) * 16 + group;
        b_regs[i] = pair(at, at + 16);
      }
    }
    float sums[4] = {};
    const uint32_t b_pair[2] = {b_regs[0], b_regs[1]};
    ptx::mma_16816<T>(sums, a_regs, b_pair);
    for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = sums[i];
  });
  float worst = 0;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) {
        sum += double{a_values[row * 16 + k]} * b_values[k * 16 + column];
      }
      worst = std::max(worst, std::abs(c[row * 8 + column] - static_cast<float>(sum)));
    }
  }
  return worst;
}

TEST(matrix_products_follow_the_fragment_tables) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    for (const bool shared : {false, true}) {
      CHECK(product_error<__nv_bfloat16>(schedule, shared) < 1e-3f);
      CHECK(product_error<__half>(schedule, shared) < 1e-3f);
    }
  }
}

TEST(packing_rounds_to_nearest_even) {
  CHECK_EQ(ptx::pack<__nv_bfloat16>(1.0f, -2.0f), 0xc0003f80u);
  CHECK_EQ(ptx::pack<__half>(1.0f, -2.0f), 0xc0003c00u);
  CHECK_EQ(ptx::pack<__nv_bfloat16>(1.00390625f, 1.01171875f), 0x3f823f80u);  // two ties
}

}  // namespace
