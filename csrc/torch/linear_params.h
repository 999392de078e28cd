#pragma once

#include <optional>

#include "arguments.h"
#include "redknot/ffn.h"

// From the arguments of gathered_linear to the struct of its kernels, on whichever device `args`
// allows; values of tensors are not read, params.out is the caller's to fill in.
namespace redknot::binding {

struct LinearTensors {
  const Tensor& x;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& norm_weight;
  const std::optional<Tensor>& indices;
  const std::optional<Tensor>& count;
};
GatheredLinearParams gathered_linear_params(const Arguments& args,
                                            const LinearTensors& in,
                                            double eps);

// out [num_rows, out_dim] = x [num_rows, in_dim] w [out_dim, in_dim]^T, as torch.nn.Linear does; x
// and out are contiguous.
void linear_on_cpu(DType dtype, const Tensor& x, const Tensor& w, const Tensor& out);

}  // namespace redknot::binding
