#pragma once

#include <cstdint>
#include <initializer_list>

namespace redknot::gpu {

// The widest access of a thread; a row of head_dim elements (a multiple of 8) is a multiple of it
// in every type.
constexpr int64_t kVectorBytes = 16;

// Whether every access at base + n * stride is aligned to a whole vector.
inline bool are_vectors_aligned(std::initializer_list<const void*> bases,
                                std::initializer_list<int64_t> strides,
                                int64_t element_bytes) {
  for (const void* base : bases) {
    if (reinterpret_cast<uintptr_t>(base) % kVectorBytes != 0) return false;
  }
  for (const int64_t stride : strides) {
    if (stride * element_bytes % kVectorBytes != 0) return false;
  }
  return true;
}

}  // namespace redknot::gpu
