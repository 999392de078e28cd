#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "arguments.h"
#include "redknot/attention.h"
#include "redknot/planner.h"
#include "result.h"

// From the arguments of seg_paged_attention and seg_paged_plan to the structs of their kernels, on
// whichever device `args` allows: shapes, dtypes, strides and devices are checked; values of index
// tensors are not read.
namespace redknot::binding {

// The lists that attention and its plan share, as they arrive.
struct RowTensors {
  const Tensor& row_indptr;
  const Tensor& cu_seqlens_q;
  const Tensor& q_positions;
  const Tensor& row_window;
  const Tensor& row_sink;
};

// With `num_layers` the lists of rows have that leading dimension.
PlanInput plan_input(const Arguments& args,
                     const RowTensors& lists,
                     int64_t num_q_heads,
                     int64_t page_size,
                     std::optional<int64_t> num_layers = {});
// That of a call of attention.
PlanInput plan_input(const SegPagedAttentionParams& params);

// The arguments of both forms of attention, but for the results.
struct AttentionInputs {
  const Tensor& q;
  const Tensor& k_cache;
  const Tensor& v_cache;
  RowTensors lists;
  const Tensor& page_refs;
  const std::optional<Tensor>& inv_freq;
  bool rope_interleaved;
  const std::optional<double>& softmax_scale;
  double softcap;
  const std::optional<Tensor>& plan;
};

// All but the plan and its workspace.
SegPagedAttentionParams attention_params(const Arguments& args,
                                         const AttentionInputs& in,
                                         const Tensor& out,
                                         const Tensor* maybe_lse);

// The two forms of the op on a device that does with its arguments what kAttend does: they differ
// in what stands behind the inputs.
template <void (*kAttend)(const AttentionInputs&, const Tensor& out, const Tensor* maybe_lse)>
class AttentionOps {
  template <typename... Results>
  static auto call(const Tensor& q,
                   const Tensor& k_cache,
                   const Tensor& v_cache,
                   const Tensor& row_indptr,
                   const Tensor& page_refs,
                   const Tensor& cu_seqlens_q,
                   const Tensor& q_positions,
                   const Tensor& row_window,
                   const Tensor& row_sink,
                   std::optional<Tensor> inv_freq,
                   bool rope_interleaved,
                   std::optional<double> softmax_scale,
                   double softcap,
                   std::optional<Tensor> plan,
                   Results... results) {
    return attend({q,
                   k_cache,
                   v_cache,
                   {row_indptr, cu_seqlens_q, q_positions, row_window, row_sink},
                   page_refs,
                   inv_freq,
                   rope_interleaved,
                   softmax_scale,
                   softcap,
                   plan},
                  results...);
  }

  static void attend(const AttentionInputs& in,
                     const Tensor& out,
                     const std::optional<Tensor>& lse) {
    kAttend(in, out, lse.has_value() ? &*lse : nullptr);
  }

  static std::tuple<Tensor, Tensor> attend(const AttentionInputs& in, bool return_lse) {
    const Tensor& q = in.q;
    const Arguments args("seg_paged_attention", q);
    args.floating("q", q, {"num_tokens", "num_q_heads", "head_dim"});
    const Tensor out = new_result(q, q.sizes());
    std::optional<Tensor> lse;
    if (return_lse) lse = torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float);
    attend(in, out, lse);
    return {out, lse.has_value() ? *lse : torch::stable::new_empty(q, {0}, ScalarType::Float)};
  }

 public:
  static constexpr auto kWriting = &call<Tensor, std::optional<Tensor>>;
  static constexpr auto kReturning = &call<bool>;
};

}  // namespace redknot::binding
