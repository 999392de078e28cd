#include "cuda/attention/hopper.h"
#include "cuda/attention/hopper_launch.cuh"

namespace redknot::gpu {

cudaError_t hopper_prefill_bf16(const SegPagedAttentionParams& params,
                                const GpuPlanInput& input,
                                cudaStream_t stream) {
  return launch_hopper_prefill_of<__nv_bfloat16>(params, input, stream);
}

}  // namespace redknot::gpu
