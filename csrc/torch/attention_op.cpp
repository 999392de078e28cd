#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "executor.h"
#include "redknot/cpu.h"
#include "redknot/planner.h"

namespace redknot::binding {
namespace {

// The inputs of seg_paged_attention and its out form, as they arrive.
struct AttentionInputs {
  const Tensor& q;
  const Tensor& k_cache;
  const Tensor& v_cache;
  const Tensor& row_indptr;
  const Tensor& page_refs;
  const Tensor& cu_seqlens_q;
  const Tensor& q_positions;
  const Tensor& row_window;
  const Tensor& row_sink;
  const std::optional<Tensor>& inv_freq;
  bool rope_interleaved;
  const std::optional<double>& softmax_scale;
  double softcap;
  const std::optional<Tensor>& plan;
};

// Lists of rows, the same in attention and in its plan.
PlanInput check_rows(const Arguments& args,
                     const Tensor& row_indptr,
                     const Tensor& cu_seqlens_q,
                     const Tensor& q_positions,
                     const Tensor& row_window,
                     const Tensor& row_sink,
                     int64_t num_refs,
                     int64_t num_q_heads,
                     int64_t page_size) {
  args.tensor("cu_seqlens_q", cu_seqlens_q, ScalarType::Int, {"num_seqs + 1"});
  args.tensor("row_window", row_window, ScalarType::Int, {"num_rows"});
  const int64_t num_rows = row_window.size(0);
  args.tensor("row_sink", row_sink, ScalarType::Int, {{"num_rows", num_rows}});
  args.tensor("row_indptr", row_indptr, ScalarType::Int, {{"num_rows + 1", num_rows + 1}});
  args.tensor("q_positions", q_positions, ScalarType::Int, {"num_tokens"});
  args.contiguous("row_window", row_window);
  args.contiguous("row_sink", row_sink);
  args.contiguous("q_positions", q_positions);
  const int64_t num_tokens = q_positions.size(0);
  args.offsets("cu_seqlens_q", cu_seqlens_q, "num_tokens", num_tokens);
  if (num_refs >= 0) {
    args.offsets("row_indptr", row_indptr, "num_refs", num_refs);
  } else {
    args.offsets(
        "row_indptr", row_indptr, "its own last value", data<int32_t>(row_indptr)[num_rows]);
  }

  const int64_t num_seqs = cu_seqlens_q.size(0) - 1;
  args.check(num_seqs == 0 ? num_rows == 0 : num_rows > 0 && num_rows % num_seqs == 0,
             "row_window must hold num_kv_heads rows per sequence, got ",
             num_rows,
             " rows for ",
             num_seqs,
             " sequences");
  const int64_t num_kv_heads = num_seqs == 0 ? 1 : num_rows / num_seqs;
  args.check(num_q_heads > 0 && num_q_heads % num_kv_heads == 0,
             "num_q_heads must be a positive multiple of num_kv_heads = ",
             num_kv_heads,
             ", got ",
             num_q_heads);

  const auto* positions = data<int32_t>(q_positions);
  const auto* cu_seqlens = data<int32_t>(cu_seqlens_q);
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    for (int32_t t = cu_seqlens[seq]; t < cu_seqlens[seq + 1]; ++t) {
      args.check(positions[t] >= 0 && (t == cu_seqlens[seq] || positions[t - 1] <= positions[t]),
                 "q_positions must ascend from 0 within a sequence, got ",
                 positions[t],
                 " at token ",
                 t);
    }
  }
  const auto* sink = data<int32_t>(row_sink);
  for (int64_t r = 0; r < num_rows; ++r) {
    args.check(sink[r] >= 0, "row_sink must not be negative, got ", sink[r], " at row ", r);
  }
  return {
      .row_indptr = data<int32_t>(row_indptr),
      .cu_seqlens_q = cu_seqlens,
      .q_positions = positions,
      .row_window = data<int32_t>(row_window),
      .row_sink = sink,
      .num_seqs = num_seqs,
      .num_kv_heads = num_kv_heads,
      .num_q_heads = num_q_heads,
      .page_size = page_size,
  };
}

// What a bad reference could break: memory safety, and the order that sums rely on.
void check_refs(const Arguments& args,
                const PlanInput& rows,
                const PagePool& pool,
                const PageRef* refs,
                bool has_inv_freq) {
  for (int64_t row = 0; row < rows.num_seqs * rows.num_kv_heads; ++row) {
    int64_t next_position = 0;
    for (int32_t r = rows.row_indptr[row]; r < rows.row_indptr[row + 1]; ++r) {
      const PageRef& ref = refs[r];
      args.check(ref.page >= 0 && ref.page < pool.num_pages,
                 "page_refs[",
                 r,
                 "] must name a page below num_pages = ",
                 pool.num_pages,
                 ", got ",
                 ref.page);
      args.check(ref.num_valid >= 0 && ref.num_valid <= pool.page_size,
                 "page_refs[",
                 r,
                 "] must have 0 to page_size = ",
                 pool.page_size,
                 " valid slots, got ",
                 ref.num_valid);
      args.check(ref.first_position >= next_position &&
                     int64_t{ref.first_position} + ref.num_valid <= INT32_MAX,
                 "page_refs of a row must be ordered by position without overlap, got position ",
                 ref.first_position,
                 " at ",
                 r,
                 " in row ",
                 row);
      next_position = int64_t{ref.first_position} + ref.num_valid;
      args.check(ref.rotation_offset == 0 || has_inv_freq,
                 "inv_freq is needed since page_refs[",
                 r,
                 "] has rotation offset ",
                 ref.rotation_offset);
    }
  }
}

// The checks of values that the CPU op always makes, for callers of ops that trust them.
void check_paged_rows(const Tensor& row_indptr,
                      const Tensor& page_refs,
                      const Tensor& cu_seqlens_q,
                      const Tensor& q_positions,
                      const Tensor& row_window,
                      const Tensor& row_sink,
                      int64_t num_q_heads,
                      int64_t num_pages,
                      int64_t page_size,
                      bool has_inv_freq) {
  const Arguments args("seg_paged_attention");
  args.tensor("page_refs", page_refs, ScalarType::Int, {"num_refs", 4});
  args.contiguous("page_refs", page_refs);
  const PlanInput rows = check_rows(args,
                                    row_indptr,
                                    cu_seqlens_q,
                                    q_positions,
                                    row_window,
                                    row_sink,
                                    page_refs.size(0),
                                    num_q_heads,
                                    page_size);
  check_refs(args,
             rows,
             {.num_pages = num_pages, .page_size = page_size},
             data<PageRef>(page_refs),
             has_inv_freq);
}

void attend(const AttentionInputs& in, const Tensor& out, const Tensor* maybe_lse) {
  const Arguments args("seg_paged_attention");
  const PagePool pool = args.pool(in.k_cache, in.v_cache);
  args.floating(
      "q", in.q, {"num_tokens", "num_q_heads", {"head_dim", pool.head_dim}}, "k_cache", pool.dtype);
  const int64_t num_tokens = in.q.size(0);
  const int64_t num_q_heads = in.q.size(1);
  args.tensor("q_positions", in.q_positions, ScalarType::Int, {{"num_tokens", num_tokens}});
  args.tensor("page_refs", in.page_refs, ScalarType::Int, {"num_refs", 4});
  args.contiguous("page_refs", in.page_refs);
  const int64_t num_refs = in.page_refs.size(0);
  const PlanInput rows = check_rows(args,
                                    in.row_indptr,
                                    in.cu_seqlens_q,
                                    in.q_positions,
                                    in.row_window,
                                    in.row_sink,
                                    num_refs,
                                    num_q_heads,
                                    pool.page_size);
  const auto* refs = data<PageRef>(in.page_refs);
  check_refs(args, rows, pool, refs, in.inv_freq.has_value());
  args.check(!in.rope_interleaved, "rope_interleaved=True is not supported yet");
  args.check(in.softcap == 0.0, "softcap is not supported yet, got ", in.softcap);
  const int64_t rotary_dim =
      in.inv_freq.has_value() ? args.inv_freq(*in.inv_freq, pool.head_dim) : 0;
  const double scale =
      in.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(pool.head_dim)));
  args.check(std::isfinite(scale), "softmax_scale must be finite, got ", scale);

  args.floating(
      "out",
      out,
      {{"num_tokens", num_tokens}, {"num_q_heads", num_q_heads}, {"head_dim", pool.head_dim}},
      "k_cache",
      pool.dtype);
  args.writable("out", out);
  if (maybe_lse != nullptr) {
    args.tensor("lse",
                *maybe_lse,
                ScalarType::Float,
                {{"num_q_heads", num_q_heads}, {"num_tokens", num_tokens}});
    args.contiguous("lse", *maybe_lse);
  }

  std::vector<int32_t> own_plan;
  const int32_t* plan = nullptr;
  if (in.plan.has_value()) {
    args.tensor("plan", *in.plan, ScalarType::Int, {"plan_length"});
    args.contiguous("plan", *in.plan);
    plan = data<int32_t>(*in.plan);
    const std::string mismatch = plan_mismatch(rows, plan, in.plan->numel());
    args.check(mismatch.empty(), "plan does not fit this call: ", mismatch);
  } else {
    own_plan = make_plan(rows, torch::stable::get_num_threads());
    plan = own_plan.data();
  }
  const int64_t workspace_floats = plan_workspace_floats(plan, pool.head_dim);
  std::optional<Tensor> workspace;
  if (workspace_floats > 0) {
    workspace = torch::stable::new_empty(in.q, {workspace_floats}, ScalarType::Float);
  }

  cpu::seg_paged_attention(
      {
          .pool = pool,
          .q = in.q.data_ptr(),
          .out = out.data_ptr(),
          .maybe_lse = maybe_lse == nullptr ? nullptr : static_cast<float*>(maybe_lse->data_ptr()),
          .row_indptr = rows.row_indptr,
          .page_refs = refs,
          .cu_seqlens_q = rows.cu_seqlens_q,
          .q_positions = rows.q_positions,
          .row_window = rows.row_window,
          .row_sink = rows.row_sink,
          .maybe_inv_freq = data<float>(in.inv_freq),
          .plan = plan,
          .maybe_workspace =
              workspace.has_value() ? static_cast<float*>(workspace->data_ptr()) : nullptr,
          .num_tokens = num_tokens,
          .num_q_heads = num_q_heads,
          .num_kv_heads = rows.num_kv_heads,
          .num_seqs = rows.num_seqs,
          .num_refs = num_refs,
          .rotary_dim = rotary_dim,
          .q_token_stride = in.q.stride(0),
          .q_head_stride = in.q.stride(1),
          .out_token_stride = out.stride(0),
          .out_head_stride = out.stride(1),
          .softmax_scale = static_cast<float>(scale),
      },
      torch_executor());
}

std::tuple<Tensor, Tensor> seg_paged_attention(const Tensor& q,
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
                                               bool return_lse) {
  Arguments("seg_paged_attention").floating("q", q, {"num_tokens", "num_q_heads", "head_dim"});
  const Tensor out = torch::stable::new_empty(q, q.sizes());
  const Tensor lse = return_lse
                         ? torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float)
                         : torch::stable::new_empty(q, {0}, ScalarType::Float);
  attend({q,
          k_cache,
          v_cache,
          row_indptr,
          page_refs,
          cu_seqlens_q,
          q_positions,
          row_window,
          row_sink,
          inv_freq,
          rope_interleaved,
          softmax_scale,
          softcap,
          plan},
         out,
         return_lse ? &lse : nullptr);
  return {out, lse};
}

void seg_paged_attention_out(const Tensor& q,
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
                             const Tensor& out,
                             std::optional<Tensor> lse) {
  attend({q,
          k_cache,
          v_cache,
          row_indptr,
          page_refs,
          cu_seqlens_q,
          q_positions,
          row_window,
          row_sink,
          inv_freq,
          rope_interleaved,
          softmax_scale,
          softcap,
          plan},
         out,
         lse.has_value() ? &*lse : nullptr);
}

Tensor seg_paged_plan(const Tensor& row_indptr,
                      const Tensor& cu_seqlens_q,
                      const Tensor& q_positions,
                      const Tensor& row_window,
                      const Tensor& row_sink,
                      int64_t num_q_heads,
                      int64_t page_size,
                      int64_t num_workers) {
  const Arguments args("seg_paged_plan");
  args.check(page_size > 0, "page_size must be positive, got ", page_size);
  args.check(num_workers > 0, "num_workers must be positive, got ", num_workers);
  const PlanInput rows = check_rows(args,
                                    row_indptr,
                                    cu_seqlens_q,
                                    q_positions,
                                    row_window,
                                    row_sink,
                                    -1,
                                    num_q_heads,
                                    page_size);
  const std::vector<int32_t> plan = make_plan(rows, num_workers);
  const Tensor out =
      torch::stable::new_empty(row_indptr, {static_cast<int64_t>(plan.size())}, ScalarType::Int);
  std::copy(plan.begin(), plan.end(), static_cast<int32_t*>(out.data_ptr()));
  return out;
}

void add_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("seg_paged_attention", TORCH_BOX(&seg_paged_attention));
  m.impl("seg_paged_attention_out", TORCH_BOX(&seg_paged_attention_out));
  m.impl("seg_paged_plan", TORCH_BOX(&seg_paged_plan));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CPU, m) {
  add_ops(m);
  m.impl("_check_paged_rows", TORCH_BOX(&check_paged_rows));
}
#if !defined(REDKNOT_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) { add_ops(m); }  // refuses its arguments by name
#endif

}  // namespace redknot::binding
