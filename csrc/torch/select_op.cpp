#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "arguments.h"
#include "executor.h"
#include "redknot/cpu.h"

namespace redknot::binding {
namespace {

Tensor token_importance(const Tensor& attn_out) {
  const Arguments args("token_importance");
  const DType dtype =
      args.floating("attn_out", attn_out, {"num_tokens", "num_q_heads", "head_dim"});
  const Tensor importance =
      torch::stable::new_empty(attn_out, {attn_out.size(0)}, ScalarType::Float);
  cpu::token_importance(
      {
          .attn_out = attn_out.data_ptr(),
          .importance = static_cast<float*>(importance.data_ptr()),
          .num_tokens = attn_out.size(0),
          .num_q_heads = attn_out.size(1),
          .head_dim = attn_out.size(2),
          .token_stride = attn_out.stride(0),
          .head_stride = attn_out.stride(1),
          .dtype = dtype,
      },
      torch_executor());
  return importance;
}

std::tuple<Tensor, Tensor> select_tokens(const Tensor& importance,
                                         const Tensor& cu_seqlens,
                                         double mass,
                                         int64_t recent_n,
                                         int64_t min_keep) {
  const Arguments args("select_tokens");
  args.tensor("importance", importance, ScalarType::Float, {"num_tokens"});
  args.contiguous("importance", importance);
  const int64_t num_tokens = importance.size(0);
  args.tensor("cu_seqlens", cu_seqlens, ScalarType::Int, {"num_seqs + 1"});
  args.offsets("cu_seqlens", cu_seqlens, "num_tokens", num_tokens);
  args.check(mass >= 0.0, "mass must not be negative, got ", mass);
  args.check(recent_n >= 0, "recent_n must not be negative, got ", recent_n);
  args.check(min_keep >= 0, "min_keep must not be negative, got ", min_keep);
  const auto* values = data<float>(importance);
  for (int64_t t = 0; t < num_tokens; ++t) {
    args.check(std::isfinite(values[t]) && values[t] >= 0.0f,
               "importance must be finite and not negative, got ",
               values[t],
               " at token ",
               t);
  }
  const Tensor indices = torch::stable::new_empty(importance, {num_tokens}, ScalarType::Int);
  const Tensor count = torch::stable::new_empty(importance, {1}, ScalarType::Int);
  cpu::select_tokens(
      {
          .importance = values,
          .cu_seqlens = data<int32_t>(cu_seqlens),
          .indices = static_cast<int32_t*>(indices.data_ptr()),
          .count = static_cast<int32_t*>(count.data_ptr()),
          .num_tokens = num_tokens,
          .num_seqs = cu_seqlens.size(0) - 1,
          .recent_n = recent_n,
          .min_keep = min_keep,
          .mass = mass,
      },
      torch_executor());
  return {indices, count};
}

void add_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("token_importance", TORCH_BOX(&token_importance));
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CPU, m) { add_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) { add_ops(m); }  // refuses its arguments by name

}  // namespace redknot::binding
