#pragma once

#include <algorithm>

#include "cuda/common/resident_blocks.cuh"
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

template <typename T>
cudaError_t launch_ffn_chunk(const FfnChunk& chunk, int32_t workers, cudaStream_t stream) {
  cudaError_t status = launch_gather_norm<T, 8>(chunk.norm, workers, stream);
  if (status == cudaSuccess) {
    status = launch_row_gemm<T, Result::kGated>(chunk.gate_up, workers, stream);
  }
  if (status == cudaSuccess) {
    status = launch_row_gemm<T, Result::kScatterAdd>(chunk.down, workers, stream);
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
    const cudaError_t status = launch_ffn_chunk<T>(chunk, workspace.workers, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace redknot::gpu
