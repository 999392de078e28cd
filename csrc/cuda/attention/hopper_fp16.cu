#include "cuda/attention/hopper.h"
#include "cuda/attention/hopper_launch.cuh"

namespace redknot::gpu {

cudaError_t hopper_prefill_fp16(const SegPagedAttentionParams& params,
                                const GpuPlanInput& input,
                                cudaStream_t stream) {
  return launch_hopper_prefill_of<__half>(params, input, stream);
}

}  // namespace redknot::gpu
