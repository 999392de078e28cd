#pragma once

#include <cstdint>
#include <utility>

#include "redknot/types.h"

namespace redknot {

// Storage of the 16-bit element types; kernels compute in fp32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls visit(Element{}) with the element type of a dtype.
template <typename Visit>
decltype(auto) dispatch_dtype(DType dtype, Visit&& visit) {
  switch (dtype) {
    case DType::kBFloat16:
      return std::forward<Visit>(visit)(BFloat16{});
    case DType::kFloat16:
      return std::forward<Visit>(visit)(Float16{});
    default:
      return std::forward<Visit>(visit)(float{});
  }
}

}  // namespace redknot
