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

// Reads pieces of memory in a given order, and does nothing else.
struct ReadRoofParams {
  const void* data = nullptr;      // [num_pieces, piece_bytes]
  const int32_t* order = nullptr;  // [num_reads], pieces
  int64_t num_reads = 0;
  int64_t piece_bytes = 0;
};

}  // namespace redknot
