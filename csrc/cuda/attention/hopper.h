#pragma once

#include <cuda_runtime_api.h>

#include "cuda/attention/plan.h"
#include "redknot/attention.h"

// The prefill kernels for Hopper, one file per element type as attention.h has them. `head_dim` is
// one that has_hopper_prefill (hopper_shape.h) names.
namespace redknot::gpu {

// cudaErrorNotSupported, and nothing launched, where the copy engine cannot describe the pool.
[[nodiscard]] cudaError_t hopper_prefill_bf16(const SegPagedAttentionParams& params,
                                              const GpuPlanInput& input,
                                              cudaStream_t stream);
[[nodiscard]] cudaError_t hopper_prefill_fp16(const SegPagedAttentionParams& params,
                                              const GpuPlanInput& input,
                                              cudaStream_t stream);

}  // namespace redknot::gpu
