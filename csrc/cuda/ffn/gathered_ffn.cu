// gathered_ffn and rms_norm as the host calls them.
#include "cuda/common/alignment.h"
#include "cuda/common/architecture.h"
#include "cuda/ffn/ffn.h"
#include "cuda/ffn/launch_norm.cuh"
#include "cuda/kernels_cuda.h"

namespace redknot::gpu {
namespace {

cudaError_t count_sms(int32_t* num_sms) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device);
}

// One block per multiprocessor: the products take its registers whole.
FfnWorkspace workspace_on(int32_t num_sms, const GatheredFfnParams& params) {
  return {params, num_sms, chooses_hopper()};
}

}  // namespace

cudaError_t gathered_ffn_workspace(const GatheredFfnParams& params, int64_t* num_bytes) {
  int32_t num_sms = 0;
  const cudaError_t status = count_sms(&num_sms);
  if (status == cudaSuccess) *num_bytes = workspace_on(num_sms, params).num_bytes;
  return status;
}

cudaError_t gathered_ffn(const GatheredFfnParams& params, void* workspace, cudaStream_t stream) {
  int32_t num_sms = 0;
  const cudaError_t status = count_sms(&num_sms);
  if (status != cudaSuccess) return status;
  const FfnWorkspace layout = workspace_on(num_sms, params);
  return params.dtype == DType::kBFloat16 ? ffn_bf16(params, layout, workspace, stream)
                                          : ffn_fp16(params, layout, workspace, stream);
}

cudaError_t rms_norm(const GatherNormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  int32_t num_sms = 0;
  const cudaError_t status = count_sms(&num_sms);
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
    return is_aligned ? launch_gather_norm<T, kVectorSize>(norm, num_sms, stream)
                      : launch_gather_norm<T, 1>(norm, num_sms, stream);
  });
}

}  // namespace redknot::gpu
