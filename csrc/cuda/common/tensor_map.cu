#include <cuda_runtime_api.h>

#include "cuda/ptx/tensor_map.h"

namespace redknot::gpu {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Of the driver, which is asked at run time: linking libcuda would tie the library to machines that
// have it. Null where the driver is older than 12.0.
Encode driver_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t status =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  const bool is_found = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return is_found ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

bool encode_tensor_map(const TensorLayout& tensor, TensorMap* map) {
  static const Encode encode = driver_encode();
  if (encode == nullptr || !is_encodable(tensor)) return false;
  const cuuint64_t strides[3] = {tensor.stride[1] * 2, tensor.stride[2] * 2, tensor.stride[3] * 2};
  const cuuint64_t sizes[4] = {tensor.size[0], tensor.size[1], tensor.size[2], tensor.size[3]};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result = encode(map,
                                 tensor.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                 static_cast<cuuint32_t>(tensor.rank),
                                 const_cast<void*>(tensor.base),
                                 sizes,
                                 strides,
                                 tensor.box,
                                 element_strides,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS;
}

}  // namespace redknot::gpu
