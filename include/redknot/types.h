#pragma once

#include <cstdint>

namespace redknot {

// The one list of element types that kernels take. Index arithmetic is int64 everywhere.
enum class DType : int8_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace redknot
