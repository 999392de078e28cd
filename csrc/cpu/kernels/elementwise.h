#pragma once

#include <cstdint>

#include "redknot/ffn.h"
#include "redknot/merge.h"
#include "redknot/select.h"

namespace redknot::cpu::REDKNOT_ISA {

void rope_row(const void* k,
              void* out,
              const float* cos,
              const float* sin,
              int64_t head_dim,
              int64_t rotary_dim,
              DType dtype,
              bool interleaved);
void token_importance(const TokenImportanceParams& params, int64_t begin, int64_t end);
// Rows of (token, head), head fastest.
void merge_states(const MergeStatesParams& params, int64_t begin, int64_t end);
void gather_norm(const GatherNormParams& params, int64_t begin, int64_t end);
void gated_activation(const GatedActivationParams& params, int64_t begin, int64_t end);
void add_bias(const AddBiasParams& params, int64_t begin, int64_t end);
void scatter_add(const ScatterAddParams& params, int64_t begin, int64_t end);

}  // namespace redknot::cpu::REDKNOT_ISA
