#pragma once

#include <cuda_runtime_api.h>

#include "cuda/ffn/ffn_workspace.h"

// gathered_ffn by element type, each in a file of its own: they compile side by side.
namespace redknot::gpu {

[[nodiscard]] cudaError_t ffn_bf16(const GatheredFfnParams& params,
                                   const FfnWorkspace& workspace,
                                   void* memory,
                                   cudaStream_t stream);
[[nodiscard]] cudaError_t ffn_fp16(const GatheredFfnParams& params,
                                   const FfnWorkspace& workspace,
                                   void* memory,
                                   cudaStream_t stream);

}  // namespace redknot::gpu
