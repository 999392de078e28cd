// gathered_ffn, gathered_linear and rms_norm as the host calls them.
#include "cuda/common/alignment.h"
#include "cuda/common/architecture.h"
#include "cuda/ffn/ffn.h"
#include "cuda/ffn/launch_norm.cuh"
#include "cuda/kernels_cuda.h"

namespace redknot::gpu {
namespace {

cudaError_t current_device(GemmDevice* found) {
  found->is_hopper = chooses_hopper();
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&found->workers, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace

cudaError_t gathered_ffn_workspace(const GatheredFfnParams& params, int64_t* num_bytes) {
  GemmDevice device;
  const cudaError_t status = current_device(&device);
  if (status == cudaSuccess) *num_bytes = FfnWorkspace(params, device).num_bytes;
  return status;
}

cudaError_t gathered_ffn(const GatheredFfnParams& params, void* workspace, cudaStream_t stream) {
  GemmDevice device;
  const cudaError_t status = current_device(&device);
  if (status != cudaSuccess) return status;
  const FfnWorkspace layout(params, device);
  return params.dtype == DType::kBFloat16 ? ffn_bf16(params, layout, workspace, stream)
                                          : ffn_fp16(params, layout, workspace, stream);
}

cudaError_t gathered_linear_workspace(const GatheredLinearParams& params, int64_t* num_bytes) {
  GemmDevice device;
  const cudaError_t status = current_device(&device);
  if (status == cudaSuccess) *num_bytes = LinearWorkspace(params, device).num_bytes;
  return status;
}

cudaError_t gathered_linear(const GatheredLinearParams& params,
                            void* workspace,
                            cudaStream_t stream) {
  GemmDevice device;
  const cudaError_t status = current_device(&device);
  if (status != cudaSuccess) return status;
  const LinearWorkspace layout(params, device);
  return params.dtype == DType::kBFloat16 ? linear_bf16(params, layout, workspace, stream)
                                          : linear_fp16(params, layout, workspace, stream);
}

cudaError_t rms_norm(const GatherNormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  GemmDevice device;
  const cudaError_t status = current_device(&device);
  if (status != cudaSuccess) return status;
  GatherNorm norm;
  norm.residual = params.residual;
  norm.weight = params.weight;
  norm.indices = params.indices;
  norm.out = params.out;
  norm.residual_stride = params.residual_stride;
  norm.max_rows = static_cast<int32_t>(params.num_rows);
  norm.num_tokens = norm.max_rows;
  norm.hidden_dim = static_cast<int32_t>(params.hidden_dim);
  norm.eps = params.eps;
  const bool is_aligned = are_vectors_aligned({params.residual, params.weight, params.out},
                                              {params.residual_stride, params.hidden_dim},
                                              size_of(params.dtype));
  return with_element(params.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    constexpr int kVectorSize = kVectorBytes / sizeof(T);
    return is_aligned ? launch_gather_norm<T, kVectorSize>(norm, device.workers, stream)
                      : launch_gather_norm<T, 1>(norm, device.workers, stream);
  });
}

}  // namespace redknot::gpu
