// The values of index tensors are trusted here: reading them would wait for the device. Shapes,
// dtypes, strides, devices and alignment are checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "attention_params.h"
#include "cuda/attention/plan.h"
#include "cuda/common/alignment.h"
#include "cuda/kernels_cuda.h"
#include "launch.h"

namespace redknot::binding {
namespace {

using gpu::GpuPlanInput;
using gpu::GpuPlanLayout;

constexpr int64_t kHeadDims[] = {32, 64, 128, 256};
constexpr int64_t kMaxPageSize = 256;

void check_page_size(const Arguments& args, int64_t page_size) {
  args.check(page_size > 0 && page_size % gpu::kPageSlots == 0 && page_size <= kMaxPageSize,
             "page_size must be a multiple of ",
             gpu::kPageSlots,
             " up to ",
             kMaxPageSize,
             " on CUDA, got ",
             page_size);
}

// The same lists as a plan on the device sees them, whose tiles hold the group of a KV head.
GpuPlanInput gpu_plan_input(const Arguments& args, const PlanInput& rows, int64_t num_tokens) {
  const int64_t group_size = rows.num_q_heads / rows.num_kv_heads;
  args.check(group_size <= gpu::kPrefillRows,
             "at most ",
             gpu::kPrefillRows,
             " query heads may share a KV head on CUDA, got ",
             group_size);
  return {rows.row_indptr,
          rows.cu_seqlens_q,
          rows.q_positions,
          rows.row_window,
          rows.row_sink,
          rows.num_seqs,
          rows.num_kv_heads,
          rows.num_q_heads,
          num_tokens,
          rows.page_size};
}

// --- seg_paged_plan
// -------------------------------------------------------------------------------
Tensor seg_paged_plan(const Tensor& row_indptr,
                      const Tensor& cu_seqlens_q,
                      const Tensor& q_positions,
                      const Tensor& row_window,
                      const Tensor& row_sink,
                      int64_t num_q_heads,
                      int64_t page_size,
                      int64_t num_workers) {
  const Arguments args("seg_paged_plan", row_indptr);
  check_page_size(args, page_size);
  args.check(num_workers > 0, "num_workers must be positive, got ", num_workers);
  const bool has_layers = row_indptr.dim() == 2;
  const int64_t num_layers = has_layers ? row_indptr.size(0) : 1;
  const PlanInput rows = plan_input(args,
                                    {row_indptr, cu_seqlens_q, q_positions, row_window, row_sink},
                                    num_q_heads,
                                    page_size,
                                    has_layers ? std::optional(num_layers) : std::nullopt);
  const GpuPlanInput input = gpu_plan_input(args, rows, q_positions.size(0));
  const int64_t num_words = GpuPlanLayout(input).num_words;
  const Tensor plans =
      has_layers ? torch::stable::new_empty(row_indptr, {num_layers, num_words}, ScalarType::Int)
                 : torch::stable::new_empty(row_indptr, {num_words}, ScalarType::Int);
  launch_on_device_of(row_indptr, "seg_paged_plan", [&](cudaStream_t stream) {
    return gpu::seg_paged_plan(input, num_layers, static_cast<int32_t*>(plans.data_ptr()), stream);
  });
  return plans;
}

// --- seg_paged_attention
// --------------------------------------------------------------------------
// What the kernels have been built for.
void check_kernels(const Arguments& args, const SegPagedAttentionParams& params) {
  const PagePool& pool = params.pool;
  args.check(pool.dtype != DType::kFloat32,
             "k_cache must be bfloat16 or float16 on CUDA, got float32");
  bool is_known = false;
  for (const int64_t head_dim : kHeadDims) is_known = is_known || head_dim == pool.head_dim;
  args.check(is_known, "head_dim must be 32, 64, 128 or 256 on CUDA, got ", pool.head_dim);
  check_page_size(args, pool.page_size);
  args.check(params.softmax_scale > 0.0f,
             "softmax_scale must be positive on CUDA, got ",
             params.softmax_scale);
}

// Whole 16-byte vectors are copied: of every row of q, out, K and V.
void check_alignment(const Arguments& args, const SegPagedAttentionParams& params) {
  const auto check = [&](const char* name, const void* base, int64_t first, int64_t second) {
    args.check(
        gpu::are_vectors_aligned({base}, {first, second}, size_of(params.pool.dtype)),
        name,
        " must start at a multiple of 16 bytes, with strides of a multiple of 8 elements, on "
        "CUDA; got strides ",
        first,
        " and ",
        second);
  };
  check("k_cache", params.pool.k, params.pool.k_page_stride, params.pool.k_slot_stride);
  check("v_cache", params.pool.v, params.pool.v_page_stride, params.pool.v_slot_stride);
  check("q", params.q, params.q_token_stride, params.q_head_stride);
  check("out", params.out, params.out_token_stride, params.out_head_stride);
}

void attend(const AttentionInputs& in, const Tensor& out, const Tensor* maybe_lse) {
  const Arguments args("seg_paged_attention", in.q);
  SegPagedAttentionParams params = attention_params(args, in, out, maybe_lse);
  check_kernels(args, params);
  check_alignment(args, params);
  const GpuPlanInput input = gpu_plan_input(args, plan_input(params), params.num_tokens);
  if (params.num_tokens == 0) return;
  const int64_t plan_words = GpuPlanLayout(input).num_words;
  args.check(!in.plan.has_value() || in.plan->numel() == plan_words,
             "plan does not fit this call: a work list of seg_paged_plan for these shapes has ",
             plan_words,
             " elements, got ",
             in.plan.has_value() ? in.plan->numel() : 0);
  const Tensor plan = in.plan.has_value()
                          ? *in.plan
                          : torch::stable::new_empty(in.q, {plan_words}, ScalarType::Int);
  // Of torch's allocator: it goes back when this call returns, for work behind it on the stream.
  const Tensor workspace = torch::stable::new_empty(
      in.q, {gpu::max_partial_rows(input) * (params.pool.head_dim + 2)}, ScalarType::Float);
  params.plan = data<int32_t>(plan);
  params.maybe_workspace = static_cast<float*>(workspace.data_ptr());
  launch_on_device_of(in.q, "seg_paged_attention", [&](cudaStream_t stream) {
    if (!in.plan.has_value()) {
      const cudaError_t status =
          gpu::seg_paged_plan(input, 1, static_cast<int32_t*>(plan.data_ptr()), stream);
      if (status != cudaSuccess) return status;
    }
    return gpu::seg_paged_attention(params, stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) {
  m.impl("seg_paged_attention", TORCH_BOX(AttentionOps<attend>::kReturning));
  m.impl("seg_paged_attention_out", TORCH_BOX(AttentionOps<attend>::kWriting));
  m.impl("seg_paged_plan", TORCH_BOX(&seg_paged_plan));
}

}  // namespace redknot::binding
