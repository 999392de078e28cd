// The values of cu_seqlens and importance are trusted here: reading them would wait for the device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/kernels_cuda.h"
#include "launch.h"
#include "select_params.h"

namespace redknot::binding {
namespace {

Tensor token_importance(const Tensor& attn_out) {
  const TokenImportanceCall call =
      token_importance_call(Arguments("token_importance", attn_out), attn_out);
  launch_on_device_of(attn_out, "token_importance", [&](cudaStream_t stream) {
    return gpu::token_importance(call.params, stream);
  });
  return call.importance;
}

std::tuple<Tensor, Tensor> select_tokens(const Tensor& importance,
                                         const Tensor& cu_seqlens,
                                         double mass,
                                         int64_t recent_n,
                                         int64_t min_keep) {
  const SelectTokensCall call = select_tokens_call(
      Arguments("select_tokens", importance), importance, cu_seqlens, mass, recent_n, min_keep);
  const int64_t size = gpu::select_tokens_workspace(call.params.num_tokens, call.params.num_seqs);
  const Tensor workspace = torch::stable::new_empty(importance, {size}, ScalarType::Int);
  launch_on_device_of(importance, "select_tokens", [&](cudaStream_t stream) {
    return gpu::select_tokens(call.params, static_cast<int32_t*>(workspace.data_ptr()), stream);
  });
  return {call.indices, call.count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) {
  m.impl("token_importance", TORCH_BOX(&token_importance));
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
}

}  // namespace redknot::binding
