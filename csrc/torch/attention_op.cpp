#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "attention_params.h"
#include "executor.h"
#include "redknot/cpu.h"
#include "redknot/planner.h"
#include "register.h"

namespace redknot::binding {
namespace {

// Values of the lists that attention and its plan share; num_refs < 0: not known.
void check_rows(const Arguments& args,
                const PlanInput& rows,
                const RowTensors& lists,
                int64_t num_refs) {
  args.offsets("cu_seqlens_q", lists.cu_seqlens_q, "num_tokens", lists.q_positions.size(0));
  const int64_t num_rows = rows.num_seqs * rows.num_kv_heads;
  if (num_refs >= 0) {
    args.offsets("row_indptr", lists.row_indptr, "num_refs", num_refs);
  } else {
    args.offsets("row_indptr", lists.row_indptr, "its own last value", rows.row_indptr[num_rows]);
  }
  for (int64_t seq = 0; seq < rows.num_seqs; ++seq) {
    const int32_t first = rows.cu_seqlens_q[seq];
    for (int32_t t = first; t < rows.cu_seqlens_q[seq + 1]; ++t) {
      args.check(rows.q_positions[t] >= 0 &&
                     (t == first || rows.q_positions[t - 1] <= rows.q_positions[t]),
                 "q_positions must ascend from 0 within a sequence, got ",
                 rows.q_positions[t],
                 " at token ",
                 t);
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    args.check(rows.row_sink[r] >= 0,
               "row_sink must not be negative, got ",
               rows.row_sink[r],
               " at row ",
               r);
  }
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
      args.page_ref(r, ref, pool.num_pages, pool.page_size);
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
  const RowTensors lists{row_indptr, cu_seqlens_q, q_positions, row_window, row_sink};
  const PlanInput rows = plan_input(args, lists, num_q_heads, page_size);
  check_rows(args, rows, lists, page_refs.size(0));
  check_refs(args,
             rows,
             {.num_pages = num_pages, .page_size = page_size},
             data<PageRef>(page_refs),
             has_inv_freq);
}

void attend(const AttentionInputs& in, const Tensor& out, const Tensor* maybe_lse) {
  const Arguments args("seg_paged_attention");
  SegPagedAttentionParams params = attention_params(args, in, out, maybe_lse);
  PlanInput rows = plan_input(params);
  rows.tile_rows = cpu::attention_tile_rows();
  check_rows(args, rows, in.lists, params.num_refs);
  check_refs(args, rows, params.pool, params.page_refs, in.inv_freq.has_value());

  std::vector<int32_t> own_plan;
  if (in.plan.has_value()) {
    params.plan = data<int32_t>(*in.plan);
    const std::string mismatch = plan_mismatch(rows, params.plan, in.plan->numel());
    args.check(mismatch.empty(), "plan does not fit this call: ", mismatch);
  } else {
    own_plan = make_plan(rows, torch::stable::get_num_threads());
    params.plan = own_plan.data();
  }
  const int64_t workspace_floats = plan_workspace_floats(params.plan, params.pool.head_dim);
  std::optional<Tensor> workspace;
  if (workspace_floats > 0) {
    workspace = new_floats(in.q, {workspace_floats});
    params.maybe_workspace = static_cast<float*>(workspace->data_ptr());
  }
  cpu::seg_paged_attention(params, torch_executor());
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
  const RowTensors lists{row_indptr, cu_seqlens_q, q_positions, row_window, row_sink};
  PlanInput rows = plan_input(args, lists, num_q_heads, page_size);
  rows.tile_rows = cpu::attention_tile_rows();
  check_rows(args, rows, lists, -1);
  const std::vector<int32_t> plan = make_plan(rows, num_workers);
  const Tensor out =
      torch::stable::new_empty(row_indptr, {static_cast<int64_t>(plan.size())}, ScalarType::Int);
  std::copy(plan.begin(), plan.end(), static_cast<int32_t*>(out.data_ptr()));
  return out;
}

void add_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("seg_paged_attention", TORCH_BOX(AttentionOps<attend>::kReturning));
  m.impl("seg_paged_attention_out", TORCH_BOX(AttentionOps<attend>::kWriting));
  m.impl("seg_paged_plan", TORCH_BOX(&seg_paged_plan));
}

}  // namespace

RK_REGISTER_ON_CPU(add_ops)
STABLE_TORCH_LIBRARY_IMPL(redknot, CPU, m) {
  m.impl("_check_paged_rows", TORCH_BOX(&check_paged_rows));
}

}  // namespace redknot::binding
