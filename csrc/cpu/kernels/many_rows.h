#pragma once

#include <cstdint>

#include "redknot/ffn.h"

// out = x w^T for many rows of x: x is packed once for all threads, then each computes columns.
namespace redknot::cpu::REDKNOT_ISA {

inline constexpr int64_t kManyRowsBlock = 32;  // rows that are packed as one

// Whether these functions take such sizes; only tiles beat a library's product.
bool takes_many_rows(const LinearParams& params);
int64_t packed_row_bytes(const LinearParams& params);
// Blocks [begin, end) of kManyRowsBlock rows of x, of all that are in `packed`.
void pack_many_rows(const LinearParams& params, void* packed, int64_t begin, int64_t end);

// Memory of one thread for `columns`.
int64_t many_rows_scratch_bytes(const LinearParams& params, int64_t columns);
// Columns [begin, end) of the output; both are multiples of 32.
void many_row_linear(
    const LinearParams& params, const void* packed, void* scratch, int64_t begin, int64_t end);

}  // namespace redknot::cpu::REDKNOT_ISA
