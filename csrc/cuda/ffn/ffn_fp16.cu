#include "cuda/ffn/ffn.h"
#include "cuda/ffn/launch_ffn.cuh"

namespace redknot::gpu {

cudaError_t ffn_fp16(const GatheredFfnParams& params,
                     const FfnWorkspace& workspace,
                     void* memory,
                     cudaStream_t stream) {
  return launch_ffn<__half>(params, workspace, memory, stream);
}

cudaError_t linear_fp16(const GatheredLinearParams& params,
                        const LinearWorkspace& workspace,
                        void* memory,
                        cudaStream_t stream) {
  return launch_linear<__half>(params, workspace, memory, stream);
}

}  // namespace redknot::gpu
