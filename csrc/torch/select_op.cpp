#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "executor.h"
#include "redknot/cpu.h"
#include "register.h"
#include "select_params.h"

namespace redknot::binding {

TokenImportanceCall token_importance_call(const Arguments& args, const Tensor& attn_out) {
  const DType dtype =
      args.floating("attn_out", attn_out, {"num_tokens", "num_q_heads", "head_dim"});
  const Tensor importance =
      torch::stable::new_empty(attn_out, {attn_out.size(0)}, ScalarType::Float);
  const TokenImportanceParams params = {
      .attn_out = attn_out.data_ptr(),
      .importance = static_cast<float*>(importance.data_ptr()),
      .num_tokens = attn_out.size(0),
      .num_q_heads = attn_out.size(1),
      .head_dim = attn_out.size(2),
      .token_stride = attn_out.stride(0),
      .head_stride = attn_out.stride(1),
      .dtype = dtype,
  };
  return {params, importance};
}

SelectTokensCall select_tokens_call(const Arguments& args,
                                    const Tensor& importance,
                                    const Tensor& cu_seqlens,
                                    double mass,
                                    int64_t recent_n,
                                    int64_t min_keep) {
  args.tensor("importance", importance, ScalarType::Float, {"num_tokens"});
  args.contiguous("importance", importance);
  args.tensor("cu_seqlens", cu_seqlens, ScalarType::Int, {"num_seqs + 1"});
  args.contiguous("cu_seqlens", cu_seqlens);
  args.check(cu_seqlens.size(0) > 0, "cu_seqlens must start with 0");
  args.check(mass >= 0.0, "mass must not be negative, got ", mass);
  args.check(recent_n >= 0, "recent_n must not be negative, got ", recent_n);
  args.check(min_keep >= 0, "min_keep must not be negative, got ", min_keep);
  const int64_t num_tokens = importance.size(0);
  const Tensor indices = torch::stable::new_empty(importance, {num_tokens}, ScalarType::Int);
  const Tensor count = torch::stable::new_empty(importance, {1}, ScalarType::Int);
  const SelectTokensParams params = {
      .importance = data<float>(importance),
      .cu_seqlens = data<int32_t>(cu_seqlens),
      .indices = static_cast<int32_t*>(indices.data_ptr()),
      .count = static_cast<int32_t*>(count.data_ptr()),
      .num_tokens = num_tokens,
      .num_seqs = cu_seqlens.size(0) - 1,
      .recent_n = recent_n,
      .min_keep = min_keep,
      .mass = mass,
  };
  return {params, indices, count};
}

namespace {

Tensor token_importance(const Tensor& attn_out) {
  const TokenImportanceCall call = token_importance_call(Arguments("token_importance"), attn_out);
  cpu::token_importance(call.params, torch_executor());
  return call.importance;
}

std::tuple<Tensor, Tensor> select_tokens(const Tensor& importance,
                                         const Tensor& cu_seqlens,
                                         double mass,
                                         int64_t recent_n,
                                         int64_t min_keep) {
  const Arguments args("select_tokens");
  const SelectTokensCall call =
      select_tokens_call(args, importance, cu_seqlens, mass, recent_n, min_keep);
  args.offsets("cu_seqlens", cu_seqlens, "num_tokens", call.params.num_tokens);
  const float* values = call.params.importance;
  for (int64_t t = 0; t < call.params.num_tokens; ++t) {
    args.check(std::isfinite(values[t]) && values[t] >= 0.0f,
               "importance must be finite and not negative, got ",
               values[t],
               " at token ",
               t);
  }
  cpu::select_tokens(call.params, torch_executor());
  return {call.indices, call.count};
}

void add_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("token_importance", TORCH_BOX(&token_importance));
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
}

}  // namespace

RK_REGISTER_ON_CPU(add_ops)

}  // namespace redknot::binding
