#include "attention_params.h"

#include <cmath>

namespace redknot::binding {

PlanInput plan_input(const Arguments& args,
                     const RowTensors& lists,
                     int64_t num_q_heads,
                     int64_t page_size,
                     std::optional<int64_t> num_layers) {
  const auto list = [&](const char* name, const Tensor& tensor, Dim length) {
    args.tensor(name, tensor, ScalarType::Int, {length});
    args.contiguous(name, tensor);
  };
  const auto row_list = [&](const char* name, const Tensor& tensor, Dim length) {
    if (!num_layers.has_value()) return list(name, tensor, length);
    args.tensor(name, tensor, ScalarType::Int, {{"num_layers", *num_layers}, length});
    args.contiguous(name, tensor);
  };
  row_list("row_window", lists.row_window, "num_rows");
  const int64_t num_rows = lists.row_window.size(num_layers.has_value() ? 1 : 0);
  row_list("row_sink", lists.row_sink, {"num_rows", num_rows});
  row_list("row_indptr", lists.row_indptr, {"num_rows + 1", num_rows + 1});
  list("q_positions", lists.q_positions, "num_tokens");
  list("cu_seqlens_q", lists.cu_seqlens_q, "num_seqs + 1");
  args.check(lists.cu_seqlens_q.size(0) > 0, "cu_seqlens_q must start with 0, got no element");

  const int64_t num_seqs = lists.cu_seqlens_q.size(0) - 1;
  args.check(num_seqs > 0 || lists.q_positions.size(0) == 0,
             "cu_seqlens_q must end with num_tokens = ",
             lists.q_positions.size(0),
             ", got no sequence");
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
  return {
      .row_indptr = data<int32_t>(lists.row_indptr),
      .cu_seqlens_q = data<int32_t>(lists.cu_seqlens_q),
      .q_positions = data<int32_t>(lists.q_positions),
      .row_window = data<int32_t>(lists.row_window),
      .row_sink = data<int32_t>(lists.row_sink),
      .num_seqs = num_seqs,
      .num_kv_heads = num_kv_heads,
      .num_q_heads = num_q_heads,
      .page_size = page_size,
  };
}

PlanInput plan_input(const SegPagedAttentionParams& params) {
  return {
      .row_indptr = params.row_indptr,
      .cu_seqlens_q = params.cu_seqlens_q,
      .q_positions = params.q_positions,
      .row_window = params.row_window,
      .row_sink = params.row_sink,
      .num_seqs = params.num_seqs,
      .num_kv_heads = params.num_kv_heads,
      .num_q_heads = params.num_q_heads,
      .page_size = params.pool.page_size,
  };
}

SegPagedAttentionParams attention_params(const Arguments& args,
                                         const AttentionInputs& in,
                                         const Tensor& out,
                                         const Tensor* maybe_lse) {
  const PagePool pool = args.pool(in.k_cache, in.v_cache);
  const Dim head_dim{"head_dim", pool.head_dim};
  args.floating("q", in.q, {"num_tokens", "num_q_heads", head_dim}, "k_cache", pool.dtype);
  const Dim num_tokens{"num_tokens", in.q.size(0)}, num_q_heads{"num_q_heads", in.q.size(1)};
  args.tensor("q_positions", in.lists.q_positions, ScalarType::Int, {num_tokens});
  args.tensor("page_refs", in.page_refs, ScalarType::Int, {"num_refs", 4});
  args.contiguous("page_refs", in.page_refs);
  const PlanInput rows = plan_input(args, in.lists, num_q_heads.size, pool.page_size);

  const int64_t rotary_dim =
      in.inv_freq.has_value() ? args.inv_freq(*in.inv_freq, pool.head_dim) : 0;
  const double scale =
      in.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(pool.head_dim)));
  args.check(std::isfinite(scale), "softmax_scale must be finite, got ", scale);
  args.check(std::isfinite(in.softcap) && in.softcap >= 0.0,
             "softcap must be positive, or 0 for none, got ",
             in.softcap);

  args.floating("out", out, {num_tokens, num_q_heads, head_dim}, "k_cache", pool.dtype);
  args.writable("out", out);
  args.apart("out", out, "q", in.q);
  args.apart("out", out, "k_cache", in.k_cache);
  args.apart("out", out, "v_cache", in.v_cache);
  if (maybe_lse != nullptr) {
    args.tensor("lse", *maybe_lse, ScalarType::Float, {num_q_heads, num_tokens});
    args.contiguous("lse", *maybe_lse);
  }
  if (in.plan.has_value()) {
    args.tensor("plan", *in.plan, ScalarType::Int, {"plan_length"});
    args.contiguous("plan", *in.plan);
  }
  return {
      .pool = pool,
      .q = in.q.data_ptr(),
      .out = out.data_ptr(),
      .maybe_lse = maybe_lse == nullptr ? nullptr : static_cast<float*>(maybe_lse->data_ptr()),
      .row_indptr = rows.row_indptr,
      .page_refs = data<PageRef>(in.page_refs),
      .cu_seqlens_q = rows.cu_seqlens_q,
      .q_positions = rows.q_positions,
      .row_window = rows.row_window,
      .row_sink = rows.row_sink,
      .maybe_inv_freq = data<float>(in.inv_freq),
      .num_tokens = num_tokens.size,
      .num_q_heads = num_q_heads.size,
      .num_kv_heads = rows.num_kv_heads,
      .num_seqs = rows.num_seqs,
      .num_refs = in.page_refs.size(0),
      .rotary_dim = rotary_dim,
      .q_token_stride = in.q.stride(0),
      .q_head_stride = in.q.stride(1),
      .out_token_stride = out.stride(0),
      .out_head_stride = out.stride(1),
      .softmax_scale = static_cast<float>(scale),
      .softcap = static_cast<float>(in.softcap),
      .rope_interleaved = in.rope_interleaved,
  };
}

}  // namespace redknot::binding
