#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstring>
#include <optional>

#include "executor.h"
#include "linear_params.h"
#include "redknot/cpu.h"
#include "register.h"
#include "result.h"

namespace redknot::binding {

GatheredLinearParams gathered_linear_params(const Arguments& args,
                                            const LinearTensors& in,
                                            double eps) {
  args.eps(eps);
  GatheredLinearParams params;
  params.dtype = args.floating("x", in.x, {"num_tokens", "in_dim"});
  params.num_tokens = in.x.size(0);
  params.in_dim = in.x.size(1);
  const Dim in_dim = {"in_dim", params.in_dim};
  args.floating("weight", in.weight, {"out_dim", in_dim}, "x", params.dtype);
  params.out_dim = in.weight.size(0);
  if (in.bias.has_value()) {
    args.floating("bias", *in.bias, {{"out_dim", params.out_dim}}, "x", params.dtype);
    params.maybe_bias = in.bias->data_ptr();
  }
  if (in.norm_weight.has_value()) {
    args.floating("norm_weight", *in.norm_weight, {in_dim}, "x", params.dtype);
    params.maybe_norm = in.norm_weight->data_ptr();
  }
  args.check(in.indices.has_value() == in.count.has_value(),
             "indices and count must be given together");
  params.max_rows = params.num_tokens;
  if (in.indices.has_value()) {
    args.tensor("indices", *in.indices, ScalarType::Int, {"max_rows"});
    args.contiguous("indices", *in.indices);
    args.tensor("count", *in.count, ScalarType::Int, {1});
    params.indices = data<int32_t>(*in.indices);
    params.count = data<int32_t>(*in.count);
    params.max_rows = in.indices->size(0);
  }
  params.x = in.x.data_ptr();
  params.w = in.weight.data_ptr();
  params.x_stride = in.x.stride(0);
  params.w_stride = in.weight.stride(0);
  params.eps = static_cast<float>(eps);
  return params;
}

namespace {

// Torch's own product, into memory that is there already.
void matmul_into(const Tensor& x, const Tensor& w, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(torch::stable::transpose(w, 0, 1)),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // `out` once more, ours to let go
}

}  // namespace

void linear_on_cpu(DType dtype, const Tensor& x, const Tensor& w, const Tensor& out) {
  const bool done = cpu::linear(
      {
          .x = x.data_ptr(),
          .w = w.data_ptr(),
          .out = out.data_ptr(),
          .num_rows = x.size(0),
          .in_dim = x.size(1),
          .out_dim = w.size(0),
          .w_stride = w.stride(0),
          .out_stride = out.stride(0),
          .dtype = dtype,
      },
      torch_executor());
  if (!done) matmul_into(x, w, out);
}

namespace {

int64_t checked_rows(const Arguments& args, const GatheredLinearParams& call) {
  if (call.count == nullptr) return call.max_rows;
  const int64_t num_rows = *call.count;
  args.check(num_rows >= 0 && num_rows <= call.max_rows,
             "count must be within indices, got ",
             num_rows,
             " of ",
             call.max_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    args.check(call.indices[i] >= 0 && call.indices[i] < call.num_tokens,
               "indices must be below num_tokens = ",
               call.num_tokens,
               ", got ",
               call.indices[i],
               " at ",
               i);
  }
  return num_rows;
}

// The rows that are multiplied, one behind the other.
Tensor gathered_rows(const GatheredLinearParams& call, const Tensor& x, int64_t num_rows) {
  const bool is_whole = call.indices == nullptr && call.x_stride == call.in_dim;
  if (is_whole && call.maybe_norm == nullptr) return x;
  const Tensor rows = new_result(x, {num_rows, call.in_dim});
  if (call.maybe_norm != nullptr) {
    cpu::gather_norm(
        {
            .residual = call.x,
            .weight = call.maybe_norm,
            .indices = call.indices,
            .out = rows.data_ptr(),
            .num_rows = num_rows,
            .hidden_dim = call.in_dim,
            .residual_stride = call.x_stride,
            .eps = call.eps,
            .dtype = call.dtype,
        },
        torch_executor());
    return rows;
  }
  const int64_t row_bytes = call.in_dim * size_of(call.dtype);
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t row = call.indices == nullptr ? i : call.indices[i];
    const int64_t offset = row * call.x_stride * size_of(call.dtype);
    std::memcpy(static_cast<char*>(rows.data_ptr()) + i * row_bytes,
                static_cast<const char*>(call.x) + offset,
                row_bytes);
  }
  return rows;
}

Tensor gathered_linear(const Tensor& x,
                       const Tensor& weight,
                       std::optional<Tensor> bias,
                       std::optional<Tensor> norm_weight,
                       double eps,
                       std::optional<Tensor> indices,
                       std::optional<Tensor> count) {
  const Arguments args("gathered_linear");
  const GatheredLinearParams call =
      gathered_linear_params(args, {x, weight, bias, norm_weight, indices, count}, eps);
  const int64_t num_rows = checked_rows(args, call);
  Tensor out = new_result(x, {call.max_rows, call.out_dim});
  const Tensor first = torch::stable::narrow(out, 0, 0, num_rows);
  linear_on_cpu(call.dtype, gathered_rows(call, x, num_rows), weight, first);
  if (call.maybe_bias != nullptr) {
    cpu::add_bias(
        {
            .out = out.data_ptr(),
            .bias = call.maybe_bias,
            .num_rows = num_rows,
            .dim = call.out_dim,
            .dtype = call.dtype,
        },
        torch_executor());
  }
  const int64_t row_bytes = call.out_dim * size_of(call.dtype);
  std::memset(static_cast<char*>(out.data_ptr()) + num_rows * row_bytes,
              0,
              (call.max_rows - num_rows) * row_bytes);
  return out;
}

void add_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("gathered_linear", TORCH_BOX(&gathered_linear));
}

}  // namespace

RK_REGISTER_ON_CPU(add_ops)

}  // namespace redknot::binding
