// gathered_ffn and rms_norm as the host calls them.
#include "cuda/common/alignment.h"
#include "cuda/ffn/ffn.h"
#include "cuda/ffn/launch_norm.cuh"
#include "cuda/kernels_cuda.h"

namespace redknot::gpu {
namespace {

struct DeviceShape {
  int32_t num_sms = 0;
  int32_t major = 0;  // of the compute capability
};

cudaError_t current_device(DeviceShape* shape) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&shape->num_sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&shape->major, cudaDevAttrComputeCapabilityMajor, device);
  }
  return status;
}

// One block per multiprocessor: the products take its registers whole.
FfnWorkspace workspace_on(const DeviceShape& device, const GatheredFfnParams& params) {
  return {params, device.num_sms, device.major == 9};
}

}  // namespace

cudaError_t gathered_ffn_workspace(const GatheredFfnParams& params, int64_t* num_bytes) {
  DeviceShape device;
  const cudaError_t status = current_device(&device);
  if (status == cudaSuccess) *num_bytes = workspace_on(device, params).num_bytes;
  return status;
}

cudaError_t gathered_ffn(const GatheredFfnParams& params, void* workspace, cudaStream_t stream) {
  DeviceShape device;
  const cudaError_t status = current_device(&device);
  if (status != cudaSuccess) return status;
  const FfnWorkspace layout = workspace_on(device, params);
  return params.dtype == DType::kBFloat16 ? ffn_bf16(params, layout, workspace, stream)
                                          : ffn_fp16(params, layout, workspace, stream);
}

cudaError_t rms_norm(const GatherNormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  DeviceShape device;
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
    return is_aligned ? launch_gather_norm<T, kVectorSize>(norm, device.num_sms, stream)
                      : launch_gather_norm<T, 1>(norm, device.num_sms, stream);
  });
}

}  // namespace redknot::gpu
