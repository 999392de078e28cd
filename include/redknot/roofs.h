#pragma once

#include <cstdint>

#include "redknot/types.h"

namespace redknot {

// What the machine itself can do, for benchmarks to be held against.

// `num_rounds` rounds of independent multiply-accumulates that never leave the registers, on every
// worker.
struct DotRoofParams {
  int64_t num_rounds = 0;
  DType dtype = DType::kFloat32;
};

// Reads `num_bytes` once, and nothing else.
struct ReadRoofParams {
  const void* data = nullptr;  // [num_bytes]
  int64_t num_bytes = 0;
};

}  // namespace redknot
