#pragma once

#include <cuda_runtime_api.h>

#include "cuda/attention/plan.h"
#include "redknot/attention.h"

// The launches of prefill on Hopper, instantiated in files of their own, which are compiled for 90a
// alone.
namespace redknot::gpu {

// cudaErrorNotSupported, and nothing launched, where there is no kernel for head_dim or the copy
// engine cannot describe the pool: then the kernel of sm_80 is to be taken.
[[nodiscard]] cudaError_t hopper_prefill_bf16(const SegPagedAttentionParams& params,
                                              const GpuPlanInput& input,
                                              cudaStream_t stream);
[[nodiscard]] cudaError_t hopper_prefill_fp16(const SegPagedAttentionParams& params,
                                              const GpuPlanInput& input,
                                              cudaStream_t stream);

}  // namespace redknot::gpu
