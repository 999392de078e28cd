#pragma once

#include <cstdint>

#include "redknot/types.h"

namespace redknot::cpu::REDKNOT_ISA {

// Floating-point operations done.
int64_t dot_roof(int64_t num_rounds, DType dtype);
// A checksum, so that no read can be left out.
float read_roof(const void* data, int64_t num_bytes);

}  // namespace redknot::cpu::REDKNOT_ISA
