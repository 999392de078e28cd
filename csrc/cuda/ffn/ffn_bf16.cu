#include "cuda/ffn/ffn.h"
#include "cuda/ffn/launch_ffn.cuh"

namespace redknot::gpu {

cudaError_t ffn_bf16(const GatheredFfnParams& params,
                     const FfnWorkspace& workspace,
                     void* memory,
                     cudaStream_t stream) {
  return launch_ffn<__nv_bfloat16>(params, workspace, memory, stream);
}

cudaError_t linear_bf16(const GatheredLinearParams& params,
                        const LinearWorkspace& workspace,
                        void* memory,
                        cudaStream_t stream) {
  return launch_linear<__nv_bfloat16>(params, workspace, memory, stream);
}

}  // namespace redknot::gpu
