#pragma once

#include "cuda/attention/hopper_decode.cuh"
#include "cuda/attention/hopper_launch.cuh"

namespace redknot::gpu {

template <typename T>
cudaError_t hopper_decode(const SegPagedAttentionParams& params,
                          const GpuPlanInput& input,
                          cudaStream_t stream) {
  return with_head_dim(params.pool.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = head_dim;
    using Shape = HopperDecodeShape<kHeadDim>;
    return launch_hopper<&hopper_decode_kernel<T, kHeadDim>>(
        params,
        input,
        Shape::kChunks,
        Shape::kThreads,
        sizeof(HopperDecodeShared<T, kHeadDim>),
        stream);
  });
}

}  // namespace redknot::gpu
