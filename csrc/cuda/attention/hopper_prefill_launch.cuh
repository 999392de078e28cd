#pragma once

#include "cuda/attention/hopper_attend.cuh"
#include "cuda/attention/hopper_launch.cuh"

namespace redknot::gpu {

template <typename T>
cudaError_t hopper_prefill(const SegPagedAttentionParams& params,
                           const GpuPlanInput& input,
                           cudaStream_t stream) {
  return with_head_dim(params.pool.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = head_dim;
    return launch_hopper<&hopper_attend_kernel<T, kHeadDim>>(params,
                                                             input,
                                                             HopperShape<kHeadDim>::kChunks,
                                                             kHopperThreads,
                                                             sizeof(HopperShared<T, kHeadDim>),
                                                             stream);
  });
}

}  // namespace redknot::gpu
