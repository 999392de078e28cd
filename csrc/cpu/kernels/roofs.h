#pragma once

#include <cstdint>

#include "redknot/types.h"

namespace redknot::cpu::REDKNOT_ISA {

// Floating-point operations done.
int64_t dot_roof(int64_t num_rounds, DType dtype);
// Reads pieces of `piece_bytes` side by side. A checksum, so that no read can be left out.
float read_roof(const void* const* pieces, int64_t num_pieces, int64_t piece_bytes);

}  // namespace redknot::cpu::REDKNOT_ISA
