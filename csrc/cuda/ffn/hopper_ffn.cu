#include "cuda/common/element.cuh"
#include "cuda/common/resident_blocks.cuh"
#include "cuda/ffn/ffn.h"
#include "cuda/ffn/hopper_gemm.cuh"

namespace redknot::gpu {
namespace {

template <typename T, Result kResult>
cudaError_t launch(const HopperGemm& params, int32_t workers, cudaStream_t stream) {
  int blocks = 0;  // also tells CUDA how much shared memory the kernel takes
  const cudaError_t status = resident_blocks<&hopper_gemm_kernel<T, kResult>>(
      kHopperThreads, sizeof(HopperShared), &blocks);
  if (status != cudaSuccess) return status;
  hopper_gemm_kernel<T, kResult>
      <<<static_cast<uint32_t>(workers), kHopperThreads, sizeof(HopperShared), stream>>>(params);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_result(const HopperGemm& params,
                          Result result,
                          int32_t workers,
                          cudaStream_t stream) {
  switch (result) {
    case Result::kGated:
      return launch<T, Result::kGated>(params, workers, stream);
    case Result::kScatterAdd:
      return launch<T, Result::kScatterAdd>(params, workers, stream);
    case Result::kStore:
      break;
  }
  return launch<T, Result::kStore>(params, workers, stream);
}

}  // namespace

cudaError_t hopper_row_gemm(
    const RowGemm& gemm, Result result, DType dtype, int32_t workers, cudaStream_t stream) {
  HopperGemm params;
  if (!make_hopper_gemm(gemm, dtype, &params)) return cudaErrorNotSupported;
  return dtype == DType::kBFloat16 ? launch_result<__nv_bfloat16>(params, result, workers, stream)
                                   : launch_result<__half>(params, result, workers, stream);
}

}  // namespace redknot::gpu
