#pragma once

#include <algorithm>

#include "cuda/common/resident_blocks.cuh"
#include "cuda/ffn/ffn.h"
#include "cuda/ffn/ffn_workspace.h"
#include "cuda/ffn/launch_norm.cuh"
#include "cuda/ffn/row_gemm.cuh"

// The launches of gathered_ffn for one element type; one .cu file per type includes this. Per chunk
// of rows: norm, gate and up, down. Which chunks have rows, only the device knows; a launch without
// any ends at once.
namespace redknot::gpu {

template <typename T, Result kResult>
cudaError_t launch_row_gemm(const RowGemm& gemm, int32_t workers, cudaStream_t stream) {
  int blocks = 0;  // also tells CUDA how much shared memory the kernel takes
  const cudaError_t status =
      resident_blocks<&row_gemm_kernel<T, kResult>>(kGemmThreads, kGemmSharedBytes, &blocks);
  if (status != cudaSuccess) return status;
  row_gemm_kernel<T, kResult>
      <<<static_cast<uint32_t>(workers), kGemmThreads, kGemmSharedBytes, stream>>>(gemm);
  return cudaGetLastError();
}

// On Hopper up to kLowRows rows stay here: they wait for the weights, however these are multiplied.
template <typename T, Result kResult>
cudaError_t launch_product(const RowGemm& gemm,
                           DType dtype,
                           const FfnWorkspace& workspace,
                           cudaStream_t stream) {
#ifdef REDKNOT_HOPPER
  if (workspace.is_hopper) {
    const cudaError_t status =
        launch_row_gemm<T, kResult>(with_at_most(gemm, kLowRows), workspace.workers, stream);
    if (status != cudaSuccess || gemm.max_rows <= kLowRows) return status;
    return hopper_row_gemm(
        with_more_than(gemm, kLowRows), kResult, dtype, workspace.workers, stream);
  }
#endif
  return launch_row_gemm<T, kResult>(gemm, workspace.workers, stream);
}

template <typename T>
cudaError_t launch_ffn_chunk(const FfnChunk& chunk,
                             DType dtype,
                             const FfnWorkspace& workspace,
                             cudaStream_t stream) {
  cudaError_t status = launch_gather_norm<T, 8>(chunk.norm, workspace.workers, stream);
  if (status == cudaSuccess) {
    status = launch_product<T, Result::kGated>(chunk.gate_up, dtype, workspace, stream);
  }
  if (status == cudaSuccess) {
    status = launch_product<T, Result::kScatterAdd>(chunk.down, dtype, workspace, stream);
  }
  return status;
}

template <typename T>
cudaError_t launch_ffn(const GatheredFfnParams& params,
                       const FfnWorkspace& workspace,
                       void* memory,
                       cudaStream_t stream) {
  for (int64_t first = 0; first < params.max_rows; first += workspace.chunk_rows) {
    const FfnChunk chunk = ffn_chunk(params, workspace, memory, first);
    const cudaError_t status = launch_ffn_chunk<T>(chunk, params.dtype, workspace, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace redknot::gpu
