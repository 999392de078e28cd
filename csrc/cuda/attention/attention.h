#pragma once

#include <cuda_runtime_api.h>

#include "cuda/attention/plan.h"
#include "redknot/attention.h"

// The attention launches of each element type, instantiated in files of their own.
namespace redknot::gpu {

[[nodiscard]] cudaError_t attend_bf16(const SegPagedAttentionParams& params,
                                      const GpuPlanInput& input,
                                      cudaStream_t stream);
[[nodiscard]] cudaError_t attend_fp16(const SegPagedAttentionParams& params,
                                      const GpuPlanInput& input,
                                      cudaStream_t stream);

}  // namespace redknot::gpu
