#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "executor.h"
#include "ffn_params.h"
#include "linear_params.h"
#include "redknot/cpu.h"
#include "register.h"
#include "result.h"

namespace redknot::binding {
namespace {

Activation activation_of(const Arguments& args, const std::string& name) {
  args.check(name == "silu" || name == "gelu_tanh",
             "activation must be \"silu\" or \"gelu_tanh\", got \"",
             name,
             "\"");
  return name == "silu" ? Activation::kSilu : Activation::kGeluTanh;
}

}  // namespace

GatheredFfnParams gathered_ffn_params(const Arguments& args,
                                      const FfnTensors& in,
                                      double eps,
                                      const std::string& activation) {
  GatheredFfnParams params;
  args.eps(eps);
  params.activation = activation_of(args, activation);
  params.dtype = args.floating("residual", in.residual, {"num_tokens", "hidden_dim"});
  args.writable("residual", in.residual);
  params.num_tokens = in.residual.size(0);
  params.hidden_dim = in.residual.size(1);
  const Dim hidden = {"hidden_dim", params.hidden_dim};
  args.floating("norm_weight", in.norm_weight, {hidden}, "residual", params.dtype);
  args.floating("w_down", in.w_down, {hidden, "ffn_dim"}, "residual", params.dtype);
  params.ffn_dim = in.w_down.size(1);
  params.gate_stride = in.w_gate_up.dim() == 2 ? in.w_gate_up.stride(0) : 0;
  params.w_gate = in.w_gate_up.data_ptr();
  if (in.w_up.has_value()) {
    const Dim ffn = {"ffn_dim", params.ffn_dim};
    args.floating("w_gate_up", in.w_gate_up, {ffn, hidden}, "residual", params.dtype);
    args.floating("w_up", *in.w_up, {ffn, hidden}, "residual", params.dtype);
    params.w_up = in.w_up->data_ptr();
    params.up_stride = in.w_up->stride(0);
  } else {
    const Dim both = {"2 * ffn_dim", 2 * params.ffn_dim};
    args.floating("w_gate_up", in.w_gate_up, {both, hidden}, "residual", params.dtype);
    params.up_stride = params.gate_stride;
    params.w_up = static_cast<const char*>(params.w_gate) +
                  params.ffn_dim * params.gate_stride * size_of(params.dtype);
  }
  args.tensor("indices", in.indices, ScalarType::Int, {"max_rows"});
  args.contiguous("indices", in.indices);
  args.tensor("count", in.count, ScalarType::Int, {1});
  params.residual = in.residual.data_ptr();
  params.norm_weight = in.norm_weight.data_ptr();
  params.w_down = in.w_down.data_ptr();
  params.indices = data<int32_t>(in.indices);
  params.count = data<int32_t>(in.count);
  params.max_rows = in.indices.size(0);
  params.residual_stride = in.residual.stride(0);
  params.down_stride = in.w_down.stride(0);
  params.eps = static_cast<float>(eps);
  return params;
}

RmsNormCall rms_norm_call(const Arguments& args,
                          const Tensor& x,
                          const Tensor& weight,
                          double eps) {
  args.eps(eps);
  const DType dtype = args.floating("x", x, {"num_rows", "hidden_dim"});
  args.floating("weight", weight, {{"hidden_dim", x.size(1)}}, "x", dtype);
  const Tensor out = new_result(x, {x.size(0), x.size(1)});
  const GatherNormParams params = {
      .residual = x.data_ptr(),
      .weight = weight.data_ptr(),
      .indices = nullptr,
      .out = out.data_ptr(),
      .num_rows = x.size(0),
      .hidden_dim = x.size(1),
      .residual_stride = x.stride(0),
      .eps = static_cast<float>(eps),
      .dtype = dtype,
  };
  return {params, out};
}

namespace {

// Rows per pass at most: enough for the GEMMs to run at full speed, few enough that the workspace
// stays below 2 * ffn_dim + hidden_dim elements of 2048 rows (3 * ffn_dim when gate and up are
// one).
constexpr int64_t kMaxChunkRows = 2048;

// Passes of equal size: a short last one would cost more than its rows. In steps of 16, the rows of
// a GEMM's tile.
int64_t rows_per_chunk(int64_t num_rows) {
  const int64_t num_chunks = (num_rows + kMaxChunkRows - 1) / kMaxChunkRows;
  const int64_t rows = (num_rows + num_chunks - 1) / std::max<int64_t>(num_chunks, 1);
  return std::max<int64_t>((rows + 15) / 16 * 16, 16);
}

// What a pass computes, in memory that all passes of a call share: fresh memory costs a page fault
// per 4 KiB.
class FfnPasses {
 public:
  FfnPasses(const GatheredFfnParams& call, const FfnTensors& in, int64_t max_rows)
      : call_(call),
        in_(in),
        is_packed_(!in.w_up.has_value()),
        max_rows_(max_rows),
        hidden_(rows_of(call.hidden_dim)),
        gate_(rows_of(in.w_gate_up.size(0))),
        up_or_out_(rows_of(call.ffn_dim)) {}

  // Rows of the residual that indices[0, rows) name.
  void run(const int32_t* indices, int64_t rows) {
    const Executor executor = torch_executor();
    const Tensor hidden = torch::stable::narrow(hidden_, 0, 0, rows);
    const Tensor up_or_out = torch::stable::narrow(up_or_out_, 0, 0, rows);
    cpu::gather_norm(
        {
            .residual = call_.residual,
            .weight = call_.norm_weight,
            .indices = indices,
            .out = hidden.data_ptr(),
            .num_rows = rows,
            .hidden_dim = call_.hidden_dim,
            .residual_stride = call_.residual_stride,
            .eps = call_.eps,
            .dtype = call_.dtype,
        },
        executor);
    if (!gated_linear(hidden, up_or_out, executor)) gate_then_up(hidden, up_or_out, executor);
    linear_on_cpu(call_.dtype, up_or_out, in_.w_down, hidden);
    cpu::scatter_add(
        {
            .z = hidden.data_ptr(),
            .residual = call_.residual,
            .indices = indices,
            .num_rows = rows,
            .hidden_dim = call_.hidden_dim,
            .residual_stride = call_.residual_stride,
            .dtype = call_.dtype,
        },
        executor);
  }

 private:
  // Both products and the activation at once.
  bool gated_linear(const Tensor& hidden, const Tensor& out, const Executor& executor) const {
    return cpu::linear(
        {
            .x = hidden.data_ptr(),
            .w = call_.w_gate,
            .maybe_up = call_.w_up,
            .out = out.data_ptr(),
            .num_rows = hidden.size(0),
            .in_dim = call_.hidden_dim,
            .out_dim = call_.ffn_dim,
            .w_stride = call_.gate_stride,
            .up_stride = call_.up_stride,
            .out_stride = call_.ffn_dim,
            .activation = call_.activation,
            .dtype = call_.dtype,
        },
        executor);
  }

  void gate_then_up(const Tensor& hidden, const Tensor& up_or_out, const Executor& executor) {
    const Tensor gate = torch::stable::narrow(gate_, 0, 0, hidden.size(0));
    linear_on_cpu(call_.dtype, hidden, in_.w_gate_up, gate);
    if (!is_packed_) linear_on_cpu(call_.dtype, hidden, *in_.w_up, up_or_out);
    // Up lies behind the gate in each row when packed; else its own rows become the result.
    const int64_t up_offset = call_.ffn_dim * size_of(call_.dtype);
    cpu::gated_activation(
        {
            .gate = gate.data_ptr(),
            .up = is_packed_ ? static_cast<const char*>(gate.data_ptr()) + up_offset
                             : up_or_out.data_ptr(),
            .out = up_or_out.data_ptr(),
            .num_rows = hidden.size(0),
            .ffn_dim = call_.ffn_dim,
            .in_stride = gate.stride(0),
            .activation = call_.activation,
            .dtype = call_.dtype,
        },
        executor);
  }

  Tensor rows_of(int64_t columns) const { return new_result(in_.residual, {max_rows_, columns}); }

  const GatheredFfnParams& call_;
  const FfnTensors& in_;
  bool is_packed_;
  int64_t max_rows_;
  Tensor hidden_;  // the norm's output, then what is added to the residual
  Tensor gate_;
  Tensor up_or_out_;
};

// The count, once it and the indices it spans are known to be rows of the residual.
int64_t checked_count(const Arguments& args, const GatheredFfnParams& call) {
  const int64_t num_rows = *call.count;
  args.check(num_rows >= 0 && num_rows <= call.max_rows,
             "count must be within indices, got ",
             num_rows,
             " of ",
             call.max_rows);
  std::vector<bool> seen(call.num_tokens);
  for (int64_t i = 0; i < num_rows; ++i) {
    const int32_t row = call.indices[i];
    args.check(row >= 0 && row < call.num_tokens,
               "indices must be below num_tokens = ",
               call.num_tokens,
               ", got ",
               row,
               " at ",
               i);
    args.check(!seen[row], "indices must be unique, got ", row, " again at ", i);
    seen[row] = true;
  }
  return num_rows;
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
  const Arguments args("gathered_ffn");
  const FfnTensors in{residual, norm_weight, w_gate_up, w_up, w_down, indices, count};
  const GatheredFfnParams call = gathered_ffn_params(args, in, eps, activation);
  const int64_t num_rows = checked_count(args, call);
  if (num_rows == 0) return;
  const int64_t chunk_rows = rows_per_chunk(num_rows);
  FfnPasses passes(call, in, std::min(chunk_rows, num_rows));
  for (int64_t begin = 0; begin < num_rows; begin += chunk_rows) {
    passes.run(call.indices + begin, std::min(chunk_rows, num_rows - begin));
  }
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const RmsNormCall call = rms_norm_call(Arguments("rms_norm"), x, weight, eps);
  cpu::gather_norm(call.params, torch_executor());
  return call.out;
}

void add_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("gathered_ffn", TORCH_BOX(&gathered_ffn));
}

}  // namespace

RK_REGISTER_ON_CPU(add_ops)

}  // namespace redknot::binding
