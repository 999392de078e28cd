// The values of index tensors are trusted here: reading them would wait for the device. Shapes,
// dtypes, strides, devices and alignment are checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "arguments.h"
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
  args.check(page_size > 0 && page_size % gpu::kChunkKeys == 0 && page_size <= kMaxPageSize,
             "page_size must be a multiple of ",
             gpu::kChunkKeys,
             " up to ",
             kMaxPageSize,
             " on CUDA, got ",
             page_size);
}

// Heads of every sequence, and that they fit a tile.
int64_t kv_heads(const Arguments& args, int64_t num_rows, int64_t num_seqs, int64_t num_q_heads) {
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
  args.check(num_q_heads / num_kv_heads <= gpu::kPrefillRows,
             "at most ",
             gpu::kPrefillRows,
             " query heads may share a KV head on CUDA, got ",
             num_q_heads / num_kv_heads);
  return num_kv_heads;
}

int64_t num_seqs_of(const Arguments& args, const Tensor& cu_seqlens_q) {
  args.tensor("cu_seqlens_q", cu_seqlens_q, ScalarType::Int, {"num_seqs + 1"});
  args.contiguous("cu_seqlens_q", cu_seqlens_q);
  args.check(cu_seqlens_q.size(0) > 0, "cu_seqlens_q must start with 0, got no element");
  return cu_seqlens_q.size(0) - 1;
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
  const int64_t num_rows = row_window.dim() > 0 ? row_window.size(row_window.dim() - 1) : 0;
  const auto check_row_list = [&](const char* name, const Tensor& tensor, Dim length) {
    if (has_layers) {
      args.tensor(name, tensor, ScalarType::Int, {{"num_layers", num_layers}, length});
    } else {
      args.tensor(name, tensor, ScalarType::Int, {length});
    }
    args.contiguous(name, tensor);
  };
  check_row_list("row_window", row_window, {"num_rows", num_rows});
  check_row_list("row_sink", row_sink, {"num_rows", num_rows});
  check_row_list("row_indptr", row_indptr, {"num_rows + 1", num_rows + 1});
  args.tensor("q_positions", q_positions, ScalarType::Int, {"num_tokens"});
  args.contiguous("q_positions", q_positions);
  const int64_t num_seqs = num_seqs_of(args, cu_seqlens_q);
  const GpuPlanInput input{data<int32_t>(row_indptr),
                           data<int32_t>(cu_seqlens_q),
                           data<int32_t>(q_positions),
                           data<int32_t>(row_window),
                           data<int32_t>(row_sink),
                           num_seqs,
                           kv_heads(args, num_rows, num_seqs, num_q_heads),
                           num_q_heads,
                           q_positions.size(0),
                           page_size};
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
// -------------------------------------------------------------------------- The arguments of both
// forms as they arrive, but for the results.
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

PagePool check_pool(const Arguments& args, const AttentionInputs& in) {
  const PagePool pool = args.pool(in.k_cache, in.v_cache);
  args.check(pool.dtype != DType::kFloat32,
             "k_cache must be bfloat16 or float16 on CUDA, got ",
             describe(in.k_cache));
  bool is_known = false;
  for (const int64_t head_dim : kHeadDims) is_known = is_known || head_dim == pool.head_dim;
  args.check(is_known, "head_dim must be 32, 64, 128 or 256 on CUDA, got ", pool.head_dim);
  check_page_size(args, pool.page_size);
  return pool;
}

void check_options(const Arguments& args, const AttentionInputs& in, double scale) {
  args.check(!in.rope_interleaved, "rope_interleaved=True is not supported on CUDA yet");
  args.check(in.softcap == 0.0, "softcap is not supported on CUDA yet, got ", in.softcap);
  args.check(std::isfinite(scale) && scale > 0.0,
             "softmax_scale must be finite and positive on CUDA, got ",
             scale);
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

SegPagedAttentionParams make_params(const Arguments& args,
                                    const AttentionInputs& in,
                                    const Tensor& out,
                                    const Tensor* maybe_lse) {
  const PagePool pool = check_pool(args, in);
  const double scale =
      in.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(pool.head_dim)));
  check_options(args, in, scale);
  args.floating(
      "q", in.q, {"num_tokens", "num_q_heads", {"head_dim", pool.head_dim}}, "k_cache", pool.dtype);
  const Dim num_tokens{"num_tokens", in.q.size(0)}, num_q_heads{"num_q_heads", in.q.size(1)};
  args.floating(
      "out", out, {num_tokens, num_q_heads, {"head_dim", pool.head_dim}}, "k_cache", pool.dtype);
  args.writable("out", out);
  if (maybe_lse != nullptr) {
    args.tensor("lse", *maybe_lse, ScalarType::Float, {num_q_heads, num_tokens});
    args.contiguous("lse", *maybe_lse);
  }
  args.tensor("q_positions", in.q_positions, ScalarType::Int, {num_tokens});
  args.tensor("page_refs", in.page_refs, ScalarType::Int, {"num_refs", 4});
  args.tensor("row_window", in.row_window, ScalarType::Int, {"num_rows"});
  const int64_t num_rows = in.row_window.size(0);
  args.tensor("row_sink", in.row_sink, ScalarType::Int, {{"num_rows", num_rows}});
  args.tensor("row_indptr", in.row_indptr, ScalarType::Int, {{"num_rows + 1", num_rows + 1}});
  args.contiguous("q_positions", in.q_positions);
  args.contiguous("page_refs", in.page_refs);
  args.contiguous("row_window", in.row_window);
  args.contiguous("row_sink", in.row_sink);
  args.contiguous("row_indptr", in.row_indptr);
  const int64_t num_seqs = num_seqs_of(args, in.cu_seqlens_q);
  args.check(num_seqs > 0 || num_tokens.size == 0,
             "q must be empty without a sequence, got ",
             describe(in.q));
  const SegPagedAttentionParams params = {
      .pool = pool,
      .q = in.q.data_ptr(),
      .out = out.data_ptr(),
      .maybe_lse = maybe_lse == nullptr ? nullptr : static_cast<float*>(maybe_lse->data_ptr()),
      .row_indptr = data<int32_t>(in.row_indptr),
      .page_refs = data<PageRef>(in.page_refs),
      .cu_seqlens_q = data<int32_t>(in.cu_seqlens_q),
      .q_positions = data<int32_t>(in.q_positions),
      .row_window = data<int32_t>(in.row_window),
      .row_sink = data<int32_t>(in.row_sink),
      .maybe_inv_freq = data<float>(in.inv_freq),
      .num_tokens = num_tokens.size,
      .num_q_heads = num_q_heads.size,
      .num_kv_heads = kv_heads(args, num_rows, num_seqs, num_q_heads.size),
      .num_seqs = num_seqs,
      .num_refs = in.page_refs.size(0),
      .rotary_dim = in.inv_freq.has_value() ? args.inv_freq(*in.inv_freq, pool.head_dim) : 0,
      .q_token_stride = in.q.stride(0),
      .q_head_stride = in.q.stride(1),
      .out_token_stride = out.stride(0),
      .out_head_stride = out.stride(1),
      .softmax_scale = static_cast<float>(scale),
  };
  check_alignment(args, params);
  return params;
}

// GPUs of 8.6, 8.9 and 12.0 give a block 99 KiB; A100 and Hopper what any kernel here takes.
void check_shared_memory(const Arguments& args,
                         const SegPagedAttentionParams& params,
                         int32_t device) {
  const int64_t needed = gpu::attention_shared_bytes(params);
  int given = 0;
  const cudaError_t status =
      cudaDeviceGetAttribute(&given, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  args.check(status == cudaSuccess, cudaGetErrorString(status));
  args.check(needed <= given,
             "head_dim ",
             params.pool.head_dim,
             " needs ",
             needed,
             " bytes of shared memory per block, but this GPU gives ",
             given);
}

void attend(const AttentionInputs& in, const Tensor& out, const Tensor* maybe_lse) {
  const Arguments args("seg_paged_attention", in.q);
  SegPagedAttentionParams params = make_params(args, in, out, maybe_lse);
  if (params.num_tokens == 0) return;
  check_shared_memory(args, params, in.q.get_device());
  const GpuPlanInput input = gpu::plan_input(params);
  const int64_t plan_words = GpuPlanLayout(input).num_words;
  if (in.plan.has_value()) {
    args.tensor("plan", *in.plan, ScalarType::Int, {"plan_length"});
    args.contiguous("plan", *in.plan);
    args.check(in.plan->numel() == plan_words,
               "plan does not fit this call: a work list of seg_paged_plan for these shapes has ",
               plan_words,
               " elements, got ",
               in.plan->numel());
  }
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
  Arguments("seg_paged_attention", q).floating("q", q, {"num_tokens", "num_q_heads", "head_dim"});
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) {
  m.impl("seg_paged_attention", TORCH_BOX(&seg_paged_attention));
  m.impl("seg_paged_attention_out", TORCH_BOX(&seg_paged_attention_out));
  m.impl("seg_paged_plan", TORCH_BOX(&seg_paged_plan));
}

}  // namespace redknot::binding
