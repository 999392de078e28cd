#pragma once

#include <cstdint>

#include "redknot/types.h"

#ifdef RK_SIMT
#include <simt.hpp>
#else
#include <cuda.h>
#endif

namespace redknot::gpu {

// What the copy engine is told of a tensor of 16-bit elements, of which it copies boxes into shared
// memory with the 128-byte swizzle. Dimensions begin with the contiguous one.
struct TensorLayout {
  const void* base = nullptr;  // a multiple of 16
  DType dtype = DType::kBFloat16;
  int rank = 2;                       // 2 to 4
  uint64_t size[4] = {1, 1, 1, 1};    // elements of each dimension
  uint64_t stride[4] = {1, 1, 1, 1};  // elements; of dimension 0 always 1
  uint32_t box[4] = {64, 1, 1, 1};    // of dimension 0 always 64: the 128 bytes of the swizzle
};
constexpr int kBoxColumns = 64;

// Whether the rules of cuTensorMapEncodeTiled allow it: alignment, sizes, and strides that grow by
// whole multiples.
constexpr bool is_encodable(const TensorLayout& tensor) {
  constexpr uint64_t kBytes = 2, kMaxSize = uint64_t{1} << 32, kMaxStride = uint64_t{1} << 40;
  if (tensor.rank < 2 || tensor.rank > 4 || tensor.dtype == DType::kFloat32) return false;
  if (tensor.stride[0] != 1 || tensor.box[0] != kBoxColumns) return false;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.size[i] == 0 || tensor.size[i] > kMaxSize) return false;
    if (tensor.box[i] == 0 || tensor.box[i] > 256) return false;
  }
  for (int i = 1; i < tensor.rank; ++i) {
    const uint64_t bytes = tensor.stride[i] * kBytes;
    if (bytes % 16 != 0 || bytes >= kMaxStride) return false;
    if (tensor.stride[i] % tensor.stride[i - 1] != 0) return false;
    if (tensor.stride[i] < tensor.size[i - 1] * tensor.stride[i - 1]) return false;
  }
  return true;
}

// A kernel takes it as `const __grid_constant__ TensorMap`, or inside a struct that is one.
#ifdef RK_SIMT
using TensorMap = ::simt::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// False where the tensor has no map: `tensor` is not encodable, or the driver knows none.
[[nodiscard]] bool encode_tensor_map(const TensorLayout& tensor, TensorMap* map);

#ifdef RK_SIMT
inline bool encode_tensor_map(const TensorLayout& tensor, TensorMap* map) {
  if (!is_encodable(tensor) || reinterpret_cast<uintptr_t>(tensor.base) % 16 != 0) return false;
  *map = {};
  map->base = static_cast<const char*>(tensor.base);
  map->rank = tensor.rank;
  for (int i = 0; i < 4; ++i) {
    map->size[i] = tensor.size[i];
    map->stride_bytes[i] = tensor.stride[i] * 2;
    map->box[i] = tensor.box[i];
  }
  return true;
}
#endif

}  // namespace redknot::gpu
