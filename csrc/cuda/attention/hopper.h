#pragma once

#include <cuda_runtime_api.h>

#include "cuda/attention/plan.h"
#include "redknot/attention.h"

// The launches for Hopper, of bf16 and fp16, instantiated in files of their own, which are compiled
// for 90a alone.
namespace redknot::gpu {

// cudaErrorNotSupported, and nothing launched, where there is no kernel for head_dim or the copy
// engine cannot describe the pool: then the kernel of sm_80 is to be taken.
template <typename T>
[[nodiscard]] cudaError_t hopper_prefill(const SegPagedAttentionParams& params,
                                         const GpuPlanInput& input,
                                         cudaStream_t stream);
template <typename T>
[[nodiscard]] cudaError_t hopper_decode(const SegPagedAttentionParams& params,
                                        const GpuPlanInput& input,
                                        cudaStream_t stream);

}  // namespace redknot::gpu
