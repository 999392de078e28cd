#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "executor.h"
#include "merge_params.h"
#include "redknot/cpu.h"
#include "register.h"

namespace redknot::binding {

MergeStatesCall merge_states_call(const Arguments& args,
                                  const Tensor& out_a,
                                  const Tensor& lse_a,
                                  const Tensor& out_b,
                                  const Tensor& lse_b) {
  const DType dtype = args.floating("out_a", out_a, {"num_tokens", "num_q_heads", "head_dim"});
  const Dim tokens = {"num_tokens", out_a.size(0)};
  const Dim heads = {"num_q_heads", out_a.size(1)};
  const Dim dim = {"head_dim", out_a.size(2)};
  args.floating("out_b", out_b, {tokens, heads, dim}, "out_a", dtype);
  args.tensor("lse_a", lse_a, ScalarType::Float, {heads, tokens});
  args.tensor("lse_b", lse_b, ScalarType::Float, {heads, tokens});
  const Tensor out = torch::stable::new_empty(out_a, out_a.sizes());
  const Tensor lse = torch::stable::new_empty(lse_a, lse_a.sizes());
  const MergeStatesParams params = {
      .out_a = out_a.data_ptr(),
      .out_b = out_b.data_ptr(),
      .lse_a = data<float>(lse_a),
      .lse_b = data<float>(lse_b),
      .out = out.data_ptr(),
      .lse = static_cast<float*>(lse.data_ptr()),
      .num_tokens = out_a.size(0),
      .num_q_heads = out_a.size(1),
      .head_dim = out_a.size(2),
      .a_token_stride = out_a.stride(0),
      .a_head_stride = out_a.stride(1),
      .b_token_stride = out_b.stride(0),
      .b_head_stride = out_b.stride(1),
      .lse_a_head_stride = lse_a.stride(0),
      .lse_b_head_stride = lse_b.stride(0),
      .dtype = dtype,
  };
  return {params, out, lse};
}

namespace {

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a,
                                        const Tensor& lse_a,
                                        const Tensor& out_b,
                                        const Tensor& lse_b) {
  const MergeStatesCall call =
      merge_states_call(Arguments("merge_states"), out_a, lse_a, out_b, lse_b);
  cpu::merge_states(call.params, torch_executor());
  return {call.out, call.lse};
}

void add_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("merge_states", TORCH_BOX(&merge_states));
}

}  // namespace

RK_REGISTER_ON_CPU(add_ops)

}  // namespace redknot::binding
