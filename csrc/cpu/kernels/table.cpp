#include "../dispatch.h"
#include "attention.h"
#include "elementwise.h"
#include "few_rows.h"
#include "many_rows.h"
#include "roofs.h"

namespace redknot::cpu::REDKNOT_ISA {

const Kernels kKernels = {
    .attention_tile_rows = kAttentionTileRows,
    .attention_scratch_bytes = attention_scratch_bytes,
    .attention_item = attention_item,
    .attention_merge = attention_merge,
    .rope_row = rope_row,
    .token_importance = token_importance,
    .merge_states = merge_states,
    .gather_norm = gather_norm,
    .gated_activation = gated_activation,
    .add_bias = add_bias,
    .scatter_add = scatter_add,
    .takes_few_rows = takes_few_rows,
    .few_row_linear = few_row_linear,
    .many_rows_block = kManyRowsBlock,
    .takes_many_rows = takes_many_rows,
    .packed_row_bytes = packed_row_bytes,
    .pack_many_rows = pack_many_rows,
    .many_rows_scratch_bytes = many_rows_scratch_bytes,
    .many_row_linear = many_row_linear,
    .dot_roof = dot_roof,
    .read_roof = read_roof,
};

}  // namespace redknot::cpu::REDKNOT_ISA
