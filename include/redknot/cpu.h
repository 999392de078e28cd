#pragma once

#include "redknot/attention.h"
#include "redknot/ffn.h"
#include "redknot/merge.h"
#include "redknot/pages.h"
#include "redknot/parallel.h"
#include "redknot/roofs.h"
#include "redknot/rope.h"
#include "redknot/select.h"

// The CPU launchers, one per parameter struct. Arguments are trusted: they were checked at the
// wall.
namespace redknot::cpu {

// PlanInput::tile_rows for the instruction set in use; any other will do.
int64_t attention_tile_rows();
void seg_paged_attention(const SegPagedAttentionParams& params, const Executor& executor);
void write_pages(const WritePagesParams& params, const Executor& executor);
void copy_pages(const CopyPagesParams& params, const Executor& executor);
void rope_realign(const RopeRealignParams& params, const Executor& executor);
void rope_realign_pages(const RopeRealignPagesParams& params, const Executor& executor);
void token_importance(const TokenImportanceParams& params, const Executor& executor);
void select_tokens(const SelectTokensParams& params, const Executor& executor);
void merge_states(const MergeStatesParams& params, const Executor& executor);
void gather_norm(const GatherNormParams& params, const Executor& executor);
// False where a library's product is faster or the only one; nothing is done then.
bool linear(const LinearParams& params, const Executor& executor);
void gated_activation(const GatedActivationParams& params, const Executor& executor);
void add_bias(const AddBiasParams& params, const Executor& executor);
void scatter_add(const ScatterAddParams& params, const Executor& executor);
int64_t dot_roof(const DotRoofParams& params, const Executor& executor);
float read_roof(const ReadRoofParams& params, const Executor& executor);

// The instruction set in use: "default", "avx2", "avx512" or "amx". Choosing one is for tests;
// false when this machine lacks it or nobody knows it.
const char* isa_name();
bool use_isa(const char* name);

}  // namespace redknot::cpu
