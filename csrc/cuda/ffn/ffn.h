#pragma once

#include <cuda_runtime_api.h>

#include "cuda/ffn/ffn_workspace.h"
#include "cuda/ffn/linear_workspace.h"

// gathered_ffn and gathered_linear by element type, each in a file of its own: they compile side by
// side.
namespace redknot::gpu {

[[nodiscard]] cudaError_t ffn_bf16(const GatheredFfnParams& params,
                                   const FfnWorkspace& workspace,
                                   void* memory,
                                   cudaStream_t stream);
[[nodiscard]] cudaError_t ffn_fp16(const GatheredFfnParams& params,
                                   const FfnWorkspace& workspace,
                                   void* memory,
                                   cudaStream_t stream);
[[nodiscard]] cudaError_t linear_bf16(const GatheredLinearParams& params,
                                      const LinearWorkspace& workspace,
                                      void* memory,
                                      cudaStream_t stream);
[[nodiscard]] cudaError_t linear_fp16(const GatheredLinearParams& params,
                                      const LinearWorkspace& workspace,
                                      void* memory,
                                      cudaStream_t stream);

// The kernel of Hopper (hopper_ffn.cu), in builds that have it: `gemm` with more than kLowRows
// rows.
[[nodiscard]] cudaError_t hopper_row_gemm(
    const RowGemm& gemm, Result result, DType dtype, int32_t workers, cudaStream_t stream);

}  // namespace redknot::gpu
