#pragma once

#include <cstdint>

#include "redknot/attention.h"
#include "redknot/ffn.h"
#include "redknot/merge.h"
#include "redknot/planner.h"
#include "redknot/rope.h"
#include "redknot/select.h"

namespace redknot::cpu {

// cos and sin of (offset * inv_freq) for every distinct rotation offset of a call, ascending.
struct RotationTable {
  const int32_t* offsets = nullptr;  // [num_offsets]
  const float* cos = nullptr;        // [num_offsets, rotary_dim / 2]
  const float* sin = nullptr;        // [num_offsets, rotary_dim / 2]
  int64_t num_offsets = 0;
};

// The functions that are compiled once per instruction set. Each works on a range of rows (tokens,
// items) that the launcher gives to one thread.
struct Kernels {
  int64_t attention_tile_rows;
  int64_t (*attention_scratch_bytes)(const SegPagedAttentionParams& params);
  // `maybe_next` is what this thread does next, most likely; its first pages may be asked for.
  void (*attention_item)(const SegPagedAttentionParams& params,
                         const RotationTable& rotations,
                         const WorkItem& item,
                         const WorkItem* maybe_next,
                         void* scratch);
  // Merges the partial results of one tile; `item` is its first split.
  void (*attention_merge)(const SegPagedAttentionParams& params, const WorkItem& item);
  // Turns one row: out = R k with R given by cos, sin [rotary_dim / 2].
  void (*rope_row)(const void* k,
                   void* out,
                   const float* cos,
                   const float* sin,
                   int64_t head_dim,
                   int64_t rotary_dim,
                   DType dtype,
                   bool interleaved);
  void (*token_importance)(const TokenImportanceParams& params, int64_t begin, int64_t end);
  void (*merge_states)(const MergeStatesParams& params, int64_t begin, int64_t end);
  void (*gather_norm)(const GatherNormParams& params, int64_t begin, int64_t end);
  void (*gated_activation)(const GatedActivationParams& params, int64_t begin, int64_t end);
  void (*add_bias)(const AddBiasParams& params, int64_t begin, int64_t end);
  void (*scatter_add)(const ScatterAddParams& params, int64_t begin, int64_t end);
  bool (*takes_few_rows)(const LinearParams& params);
  void (*few_row_linear)(const LinearParams& params, int64_t begin, int64_t end);
  int64_t many_rows_block;
  bool (*takes_many_rows)(const LinearParams& params);
  int64_t (*packed_row_bytes)(const LinearParams& params);
  void (*pack_many_rows)(const LinearParams& params, void* packed, int64_t begin, int64_t end);
  int64_t (*many_rows_scratch_bytes)(const LinearParams& params, int64_t columns);
  void (*many_row_linear)(
      const LinearParams& params, const void* packed, void* scratch, int64_t begin, int64_t end);
  int64_t (*dot_roof)(int64_t num_rounds, DType dtype);
  float (*read_roof)(const void* const* pieces, int64_t num_pieces, int64_t piece_bytes);
};

// The table in use; chosen once from cpuid, or by use_isa().
const Kernels& kernels();

namespace isa_default {
extern const Kernels kKernels;
}
namespace isa_avx2 {
extern const Kernels kKernels;
}
namespace isa_avx512 {
extern const Kernels kKernels;
}
namespace isa_amx {  // isa_avx512 with bf16 attention on tiles
extern const Kernels kKernels;
}

}  // namespace redknot::cpu
