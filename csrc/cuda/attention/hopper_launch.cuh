#pragma once

#include <algorithm>
#include <utility>

#include "cuda/attention/hopper.h"
#include "cuda/attention/hopper_params.h"
#include "cuda/common/resident_blocks.cuh"

namespace redknot::gpu {

template <auto kKernel>
cudaError_t launch_hopper(const SegPagedAttentionParams& call,
                          const GpuPlanInput& input,
                          int block_chunks,
                          int threads,
                          size_t smem_bytes,
                          cudaStream_t stream) {
  HopperParams params{{}, {}, {}, {}, {}, call, PlanShape(input), ScoreScale(call), 1};
  if (!fill_hopper_params(call, block_chunks, &params)) return cudaErrorNotSupported;
  int blocks = 0;
  const cudaError_t status = resident_blocks<kKernel>(threads, smem_bytes, &blocks);
  if (status != cudaSuccess) return status;
  const auto grid = static_cast<uint32_t>(std::min<int64_t>(blocks, max_items(input)));
  kKernel<<<grid, static_cast<uint32_t>(threads), smem_bytes, stream>>>(params);
  return cudaGetLastError();
}

// Calls `launch` with the head_dim as a constant.
template <typename Launch>
cudaError_t with_head_dim(int64_t head_dim, Launch&& launch) {
  switch (head_dim) {
    case 64:
      return launch(std::integral_constant<int, 64>{});
    case 128:
      return launch(std::integral_constant<int, 128>{});
    case 256:
      return launch(std::integral_constant<int, 256>{});
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace redknot::gpu
