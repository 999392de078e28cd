// gathered_ffn, gathered_linear, rms_norm. The values of indices and count are trusted here:
// reading them would wait for the device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <string>

#include "cuda/common/alignment.h"
#include "cuda/kernels_cuda.h"
#include "ffn_params.h"
#include "launch.h"
#include "linear_params.h"

namespace redknot::binding {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

void check_dtype(const Arguments& args, const char* name, DType dtype) {
  args.check(dtype != DType::kFloat32, name, " must be bfloat16 or float16 on CUDA, got float32");
}

void check_rows(const Arguments& args, const char* name, const void* base, int64_t stride) {
  args.check(gpu::are_vectors_aligned({base}, {stride}, size_of(DType::kBFloat16)),
             name,
             " must start at a multiple of 16 bytes, with rows a multiple of 8 elements apart, on "
             "CUDA; got a stride of ",
             stride);
}

void check_dims(const Arguments& args, const char* names, int64_t first, int64_t second) {
  args.check(first % 8 == 0 && second % 8 == 0,
             names,
             " must be multiples of 8 on CUDA, got ",
             first,
             " and ",
             second);
}

void check_num_rows(const Arguments& args, int64_t num_tokens, int64_t max_rows) {
  args.check(num_tokens <= kMaxRows && max_rows <= kMaxRows,
             "at most 2^31 - 1 tokens on CUDA, got ",
             num_tokens,
             " and indices for ",
             max_rows);
}

void check_layout(const Arguments& args, const GatheredFfnParams& params) {
  check_dtype(args, "residual", params.dtype);
  check_dims(args, "hidden_dim and ffn_dim", params.hidden_dim, params.ffn_dim);
  check_rows(args, "residual", params.residual, params.residual_stride);
  check_rows(args, "norm_weight", params.norm_weight, 0);
  check_rows(args, "w_gate_up", params.w_gate, params.gate_stride);
  check_rows(args, "w_up", params.w_up, params.up_stride);
  check_rows(args, "w_down", params.w_down, params.down_stride);
  check_num_rows(args, params.num_tokens, params.max_rows);
}

void check_layout(const Arguments& args, const GatheredLinearParams& params) {
  check_dtype(args, "x", params.dtype);
  check_dims(args, "in_dim and out_dim", params.in_dim, params.out_dim);
  check_rows(args, "x", params.x, params.x_stride);
  check_rows(args, "weight", params.w, params.w_stride);
  check_rows(args, "bias", params.maybe_bias, 0);
  check_rows(args, "norm_weight", params.maybe_norm, 0);
  check_num_rows(args, params.num_tokens, params.max_rows);
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

Tensor gathered_linear(const Tensor& x,
                       const Tensor& weight,
                       std::optional<Tensor> bias,
                       std::optional<Tensor> norm_weight,
                       double eps,
                       std::optional<Tensor> indices,
                       std::optional<Tensor> count) {
  const Arguments args("gathered_linear", x);
  GatheredLinearParams params =
      gathered_linear_params(args, {x, weight, bias, norm_weight, indices, count}, eps);
  check_layout(args, params);
  const Tensor out = torch::stable::new_empty(x, {params.max_rows, params.out_dim});
  if (params.max_rows == 0 || params.num_tokens == 0) return out;
  params.out = out.data_ptr();
  launch_on_device_of(x, "gathered_linear", [&](cudaStream_t stream) {
    int64_t num_bytes = 0;
    const cudaError_t status = gpu::gathered_linear_workspace(params, &num_bytes);
    if (status != cudaSuccess) return status;
    const Tensor workspace = torch::stable::new_empty(x, {num_bytes}, ScalarType::Byte);
    return gpu::gathered_linear(params, workspace.data_ptr(), stream);
  });
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Arguments args("rms_norm", x);
  const RmsNormCall call = rms_norm_call(args, x, weight, eps);
  args.check(call.params.num_rows <= kMaxRows,
             "at most 2^31 - 1 rows on CUDA, got ",
             call.params.num_rows);
  launch_on_device_of(
      x, "rms_norm", [&](cudaStream_t stream) { return gpu::rms_norm(call.params, stream); });
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) {
  m.impl("gathered_ffn", TORCH_BOX(&gathered_ffn));
  m.impl("gathered_linear", TORCH_BOX(&gathered_linear));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
}

}  // namespace redknot::binding
