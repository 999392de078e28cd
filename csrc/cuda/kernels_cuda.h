#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/attention/plan.h"
#include "cuda/common/architecture.h"
#include "redknot/attention.h"
#include "redknot/ffn.h"
#include "redknot/merge.h"
#include "redknot/pages.h"
#include "redknot/rope.h"
#include "redknot/select.h"

// Every kernel of this room, as the host calls it: arguments are checked already, pointers are of
// the current device, the work is queued on `stream` and not waited for.
namespace redknot::gpu {

[[nodiscard]] cudaError_t write_pages(const WritePagesParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t copy_pages(const CopyPagesParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t rope_realign(const RopeRealignParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t rope_realign_pages(const RopeRealignPagesParams& params,
                                             cudaStream_t stream);
[[nodiscard]] cudaError_t token_importance(const TokenImportanceParams& params,
                                           cudaStream_t stream);
// `workspace` holds as many int32 as select_tokens_workspace says.
int64_t select_tokens_workspace(int64_t num_tokens, int64_t num_seqs);
[[nodiscard]] cudaError_t select_tokens(const SelectTokensParams& params,
                                        int32_t* workspace,
                                        cudaStream_t stream);
// 16-bit elements; hidden_dim, ffn_dim and every stride are multiples of 8, pointers of 16 bytes.
// `workspace` holds as many bytes as gathered_ffn_workspace says of the current device.
[[nodiscard]] cudaError_t gathered_ffn_workspace(const GatheredFfnParams& params,
                                                 int64_t* num_bytes);
[[nodiscard]] cudaError_t gathered_ffn(const GatheredFfnParams& params,
                                       void* workspace,
                                       cudaStream_t stream);
// The same, with in_dim and out_dim.
[[nodiscard]] cudaError_t gathered_linear_workspace(const GatheredLinearParams& params,
                                                    int64_t* num_bytes);
[[nodiscard]] cudaError_t gathered_linear(const GatheredLinearParams& params,
                                          void* workspace,
                                          cudaStream_t stream);
// params.indices is null.
[[nodiscard]] cudaError_t rms_norm(const GatherNormParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t merge_states(const MergeStatesParams& params, cudaStream_t stream);

// The plans of `num_layers` layers, one behind the other, GpuPlanLayout(input).num_words each; the
// arrays of `input` are the layers', in the same way.
[[nodiscard]] cudaError_t seg_paged_plan(const GpuPlanInput& input,
                                         int64_t num_layers,
                                         int32_t* plans,
                                         cudaStream_t stream);
// params.plan is one of these, of plan_input(params); params.maybe_workspace holds
// max_partial_rows() rows of head_dim + 2 floats.
[[nodiscard]] cudaError_t seg_paged_attention(const SegPagedAttentionParams& params,
                                              cudaStream_t stream);

}  // namespace redknot::gpu
