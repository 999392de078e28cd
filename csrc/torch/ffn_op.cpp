#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "executor.h"
#include "redknot/cpu.h"

namespace redknot::binding {
namespace {

// Rows per pass at most: enough for the GEMMs to run at full speed, few enough that the workspace
// stays below 3 * ffn_dim + 2 * hidden_dim elements of 1024 rows.
constexpr int64_t kMaxChunkRows = 1024;

// Passes of equal size: a short last one would cost more than its rows. In steps of 16, the rows of
// a GEMM's tile.
int64_t rows_per_chunk(int64_t num_rows) {
  const int64_t num_chunks = (num_rows + kMaxChunkRows - 1) / kMaxChunkRows;
  const int64_t rows = (num_rows + num_chunks - 1) / std::max<int64_t>(num_chunks, 1);
  return std::max<int64_t>((rows + 15) / 16 * 16, 16);
}

struct FfnShape {
  int64_t hidden_dim;
  int64_t ffn_dim;
  DType dtype;
};

Tensor rows_like(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns});
}

// x [rows, k] times w [n, k] transposed, as torch.nn.Linear does.
Tensor linear(const FfnShape& shape, const Tensor& x, const Tensor& w) {
  const Tensor out = rows_like(x, x.size(0), w.size(0));
  const bool done = cpu::few_row_linear(
      {
          .x = x.data_ptr(),
          .w = w.data_ptr(),
          .out = out.data_ptr(),
          .num_rows = x.size(0),
          .in_dim = x.size(1),
          .out_dim = w.size(0),
          .w_stride = w.stride(0),
          .out_stride = out.stride(0),
          .dtype = shape.dtype,
      },
      torch_executor());
  if (done) return out;
  return torch::stable::matmul(x, torch::stable::transpose(w, 0, 1));
}

void ffn_chunk(const FfnShape& shape,
               const Tensor& residual,
               const Tensor& norm_weight,
               double eps,
               const Tensor& w_gate,
               const std::optional<Tensor>& w_up,
               const Tensor& w_down,
               const int32_t* indices,
               int64_t rows) {
  const Executor executor = torch_executor();
  const Tensor normed = rows_like(residual, rows, shape.hidden_dim);
  cpu::gather_norm(
      {
          .residual = residual.data_ptr(),
          .weight = norm_weight.data_ptr(),
          .indices = indices,
          .out = normed.data_ptr(),
          .num_rows = rows,
          .hidden_dim = shape.hidden_dim,
          .residual_stride = residual.stride(0),
          .eps = static_cast<float>(eps),
          .dtype = shape.dtype,
      },
      executor);
  const Tensor gate = linear(shape, normed, w_gate);  // with up behind it in each row when packed
  const Tensor up = w_up.has_value() ? linear(shape, normed, *w_up) : gate;
  const int64_t up_offset = w_up.has_value() ? 0 : shape.ffn_dim * size_of(shape.dtype);
  const Tensor activated = rows_like(residual, rows, shape.ffn_dim);
  cpu::gated_silu(
      {
          .gate = gate.data_ptr(),
          .up = static_cast<const char*>(up.data_ptr()) + up_offset,
          .out = activated.data_ptr(),
          .num_rows = rows,
          .ffn_dim = shape.ffn_dim,
          .in_stride = gate.stride(0),
          .dtype = shape.dtype,
      },
      executor);
  const Tensor z = linear(shape, activated, w_down);
  cpu::scatter_add(
      {
          .z = z.data_ptr(),
          .residual = residual.data_ptr(),
          .indices = indices,
          .num_rows = rows,
          .hidden_dim = shape.hidden_dim,
          .residual_stride = residual.stride(0),
          .dtype = shape.dtype,
      },
      executor);
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
  args.check(activation == "silu", "activation must be \"silu\", got \"", activation, "\"");
  FfnShape shape{};
  shape.dtype = args.floating("residual", residual, {"num_tokens", "hidden_dim"});
  args.writable("residual", residual);
  const int64_t num_tokens = residual.size(0);
  shape.hidden_dim = residual.size(1);
  const Dim hidden = {"hidden_dim", shape.hidden_dim};
  args.floating("norm_weight", norm_weight, {hidden}, "residual", shape.dtype);
  args.floating("w_down", w_down, {hidden, "ffn_dim"}, "residual", shape.dtype);
  shape.ffn_dim = w_down.size(1);
  if (w_up.has_value()) {
    const Dim ffn = {"ffn_dim", shape.ffn_dim};
    args.floating("w_gate_up", w_gate_up, {ffn, hidden}, "residual", shape.dtype);
    args.floating("w_up", *w_up, {ffn, hidden}, "residual", shape.dtype);
  } else {
    args.floating("w_gate_up",
                  w_gate_up,
                  {{"2 * ffn_dim", 2 * shape.ffn_dim}, hidden},
                  "residual",
                  shape.dtype);
  }
  args.tensor("indices", indices, ScalarType::Int, {"max_rows"});
  args.contiguous("indices", indices);
  args.tensor("count", count, ScalarType::Int, {1});

  const int64_t num_rows = *data<int32_t>(count);
  args.check(num_rows >= 0 && num_rows <= indices.size(0),
             "count must be within indices, got ",
             num_rows,
             " of ",
             indices.size(0));
  const auto* rows = data<int32_t>(indices);
  std::vector<bool> seen(num_tokens);
  for (int64_t i = 0; i < num_rows; ++i) {
    args.check(rows[i] >= 0 && rows[i] < num_tokens,
               "indices must be below num_tokens = ",
               num_tokens,
               ", got ",
               rows[i],
               " at ",
               i);
    args.check(!seen[rows[i]], "indices must be unique, got ", rows[i], " again at ", i);
    seen[rows[i]] = true;
  }
  const int64_t chunk_rows = rows_per_chunk(num_rows);
  for (int64_t begin = 0; begin < num_rows; begin += chunk_rows) {
    ffn_chunk(shape,
              residual,
              norm_weight,
              eps,
              w_gate_up,
              w_up,
              w_down,
              rows + begin,
              std::min(chunk_rows, num_rows - begin));
  }
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Arguments args("rms_norm");
  const DType dtype = args.floating("x", x, {"num_rows", "hidden_dim"});
  args.floating("weight", weight, {{"hidden_dim", x.size(1)}}, "x", dtype);
  const Tensor out = rows_like(x, x.size(0), x.size(1));
  cpu::gather_norm(
      {
          .residual = x.data_ptr(),
          .weight = weight.data_ptr(),
          .indices = nullptr,
          .out = out.data_ptr(),
          .num_rows = x.size(0),
          .hidden_dim = x.size(1),
          .residual_stride = x.stride(0),
          .eps = static_cast<float>(eps),
          .dtype = dtype,
      },
      torch_executor());
  return out;
}

void add_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("gathered_ffn", TORCH_BOX(&gathered_ffn));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CPU, m) { add_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) { add_ops(m); }  // refuses its arguments by name

}  // namespace redknot::binding
