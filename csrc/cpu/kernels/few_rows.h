#pragma once

#include <cstdint>

#include "redknot/ffn.h"

namespace redknot::cpu::REDKNOT_ISA {

// Whether few_row_linear takes these sizes.
bool takes_few_rows(const LinearParams& params);
// Columns [16 * begin, 16 * end) of the output.
void few_row_linear(const LinearParams& params, int64_t begin, int64_t end);

}  // namespace redknot::cpu::REDKNOT_ISA
