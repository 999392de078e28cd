#include "cuda/attention/attention.h"
#include "cuda/attention/launch_attention.cuh"

namespace redknot::gpu {

cudaError_t attend_fp16(const SegPagedAttentionParams& params,
                        const GpuPlanInput& input,
                        cudaStream_t stream) {
  return launch_attention_of<__half>(params, input, stream);
}

}  // namespace redknot::gpu
