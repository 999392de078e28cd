#pragma once

#include <algorithm>

#include "cuda/attention/hopper_attend.cuh"
#include "cuda/common/resident_blocks.cuh"

namespace redknot::gpu {

template <typename T, int kHeadDim>
cudaError_t launch_hopper_prefill(const SegPagedAttentionParams& call,
                                  const GpuPlanInput& input,
                                  cudaStream_t stream) {
  constexpr size_t kSmemBytes = sizeof(HopperShared<T, kHeadDim>);
  constexpr auto kKernel = &hopper_attend_kernel<T, kHeadDim>;
  HopperParams params{{}, {}, {}, {}, {}, call, PlanShape(input), ScoreScale(call), 1};
  if (!fill_hopper_params<kHeadDim>(call, &params)) return cudaErrorNotSupported;
  int blocks = 0;
  const cudaError_t status = resident_blocks<kKernel>(kHopperThreads, kSmemBytes, &blocks);
  if (status != cudaSuccess) return status;
  const auto grid = static_cast<uint32_t>(std::min<int64_t>(blocks, max_items(input)));
  hopper_attend_kernel<T, kHeadDim><<<grid, kHopperThreads, kSmemBytes, stream>>>(params);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_hopper_prefill_of(const SegPagedAttentionParams& params,
                                     const GpuPlanInput& input,
                                     cudaStream_t stream) {
  switch (params.pool.head_dim) {
    case 64:
      return launch_hopper_prefill<T, 64>(params, input, stream);
    case 128:
      return launch_hopper_prefill<T, 128>(params, input, stream);
    case 256:
      return launch_hopper_prefill<T, 256>(params, input, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace redknot::gpu
