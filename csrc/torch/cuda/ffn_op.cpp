// gathered_ffn and rms_norm. The values of indices and count are trusted here: reading them would
// wait for the device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <string>

#include "cuda/common/alignment.h"
#include "cuda/kernels_cuda.h"
#include "ffn_params.h"
#include "launch.h"

namespace redknot::binding {
namespace {

void check_layout(const Arguments& args, const GatheredFfnParams& params) {
  args.check(params.dtype != DType::kFloat32,
             "residual must be bfloat16 or float16 on CUDA, got float32");
  args.check(params.hidden_dim % 8 == 0 && params.ffn_dim % 8 == 0,
             "hidden_dim and ffn_dim must be multiples of 8 on CUDA, got ",
             params.hidden_dim,
             " and ",
             params.ffn_dim);
  const auto check = [&](const char* name, const void* base, int64_t stride) {
    args.check(gpu::are_vectors_aligned({base}, {stride}, size_of(params.dtype)),
               name,
               " must start at a multiple of 16 bytes, with rows a multiple of 8 elements apart, "
               "on CUDA; got a stride of ",
               stride);
  };
  check("residual", params.residual, params.residual_stride);
  check("norm_weight", params.norm_weight, 0);
  check("w_gate_up", params.w_gate, params.gate_stride);
  check("w_up", params.w_up, params.up_stride);
  check("w_down", params.w_down, params.down_stride);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  args.check(params.num_tokens <= kMax && params.max_rows <= kMax,
             "at most 2^31 - 1 tokens on CUDA, got ",
             params.num_tokens,
             " and indices for ",
             params.max_rows);
}

void gathered_ffn(const Tensor& residual,
                  const Tensor& norm_weight,
                  double eps,
                  const Tensor& w_gate_up,
                  const Tensor& w_down,
                  const Tensor& indices,
                  const Tensor& count,
                  std::string activation,
                  std::optional<Tensor> w_up) {
  const Arguments args("gathered_ffn", residual);
  const GatheredFfnParams params = gathered_ffn_params(
      args, {residual, norm_weight, w_gate_up, w_up, w_down, indices, count}, eps, activation);
  check_layout(args, params);
  if (params.max_rows == 0 || params.num_tokens == 0) return;
  launch_on_device_of(residual, "gathered_ffn", [&](cudaStream_t stream) {
    int64_t num_bytes = 0;
    const cudaError_t status = gpu::gathered_ffn_workspace(params, &num_bytes);
    if (status != cudaSuccess) return status;
    // Of torch's allocator: it goes back when this call returns, for work behind it on the stream.
    const Tensor workspace = torch::stable::new_empty(residual, {num_bytes}, ScalarType::Byte);
    return gpu::gathered_ffn(params, workspace.data_ptr(), stream);
  });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Arguments args("rms_norm", x);
  const RmsNormCall call = rms_norm_call(args, x, weight, eps);
  args.check(call.params.num_rows <= std::numeric_limits<int32_t>::max(),
             "at most 2^31 - 1 rows on CUDA, got ",
             call.params.num_rows);
  launch_on_device_of(
      x, "rms_norm", [&](cudaStream_t stream) { return gpu::rms_norm(call.params, stream); });
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) {
  m.impl("gathered_ffn", TORCH_BOX(&gathered_ffn));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
}

}  // namespace redknot::binding
