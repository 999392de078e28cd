#pragma once

#include "cuda/ffn/ffn_workspace.h"
#include "cuda/ffn/launch_norm.cuh"
#include "cuda/ffn/launch_product.cuh"
#include "cuda/ffn/linear_workspace.h"

// The launches of gathered_ffn and gathered_linear for one element type; one .cu file per type
// includes this. Which chunks have rows, only the device knows; a launch without any ends at once.
namespace redknot::gpu {

// Per chunk of rows: norm, gate and up, down.
template <typename T>
cudaError_t launch_ffn(const GatheredFfnParams& params,
                       const FfnWorkspace& workspace,
                       void* memory,
                       cudaStream_t stream) {
  const GemmDevice device = workspace.device;
  cudaError_t status = cudaSuccess;
  for (int64_t first = 0; first < params.max_rows; first += workspace.chunk_rows) {
    const FfnChunk chunk = ffn_chunk(params, workspace, memory, first);
    status = launch_gather_norm<T, 8>(chunk.norm, device.workers, stream);
    if (status == cudaSuccess) {
      status = launch_product<T, Result::kGated>(chunk.gate_up, params.dtype, device, stream);
    }
    if (status == cudaSuccess) {
      status = launch_product<T, Result::kScatterAdd>(chunk.down, params.dtype, device, stream);
    }
    if (status != cudaSuccess) break;
  }
  return status;
}

template <typename T>
cudaError_t launch_linear(const GatheredLinearParams& params,
                          const LinearWorkspace& workspace,
                          void* memory,
                          cudaStream_t stream) {
  const GemmDevice device = workspace.device;
  cudaError_t status = cudaSuccess;
  for (int64_t first = 0; first < params.max_rows; first += workspace.chunk_rows) {
    const LinearChunk chunk = linear_chunk(params, workspace, memory, first);
    if (chunk.gathers) {
      status = launch_gather_norm<T, 8>(chunk.norm, device.workers, stream);
    } else {
      const auto bytes = static_cast<size_t>(workspace.num_arrivals()) * sizeof(int32_t);
      status = cudaMemsetAsync(chunk.product.arrivals, 0, bytes, stream);
    }
    if (status == cudaSuccess) {
      status = launch_product<T, Result::kStore>(chunk.product, params.dtype, device, stream);
    }
    if (status != cudaSuccess) break;
  }
  return status;
}

}  // namespace redknot::gpu
