#pragma once

#include "cuda/common/resident_blocks.cuh"
#include "cuda/ffn/ffn.h"
#include "cuda/ffn/row_gemm.cuh"

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

// Which kernel has rows to multiply, only the device knows; the other ends at once. On Hopper up to
// kLowRows rows stay with mma.sync: they wait for the weights, however these are multiplied.
template <typename T, Result kResult>
cudaError_t launch_product(const RowGemm& gemm,
                           DType dtype,
                           GemmDevice device,
                           cudaStream_t stream) {
#ifdef REDKNOT_HOPPER
  if (device.is_hopper) {
    const cudaError_t status =
        launch_row_gemm<T, kResult>(with_at_most(gemm, kLowRows), device.workers, stream);
    if (status != cudaSuccess || gemm.max_rows <= kLowRows) return status;
    return hopper_row_gemm(with_more_than(gemm, kLowRows), kResult, dtype, device.workers, stream);
  }
#else
  static_cast<void>(dtype);
#endif
  return launch_row_gemm<T, kResult>(gemm, device.workers, stream);
}

}  // namespace redknot::gpu
