#pragma once

#include <optional>
#include <string>

#include "arguments.h"
#include "redknot/ffn.h"

// From the arguments of a call to the struct of its kernels, on whichever device `args` allows;
// values of tensors are not read.
namespace redknot::binding {

struct FfnTensors {
  const Tensor& residual;
  const Tensor& norm_weight;
  const Tensor& w_gate_up;
  const std::optional<Tensor>& w_up;
  const Tensor& w_down;
  const Tensor& indices;
  const Tensor& count;
};
GatheredFfnParams gathered_ffn_params(const Arguments& args,
                                      const FfnTensors& in,
                                      double eps,
                                      const std::string& activation);

struct RmsNormCall {
  GatherNormParams params;
  Tensor out;
};
RmsNormCall rms_norm_call(const Arguments& args, const Tensor& x, const Tensor& weight, double eps);

}  // namespace redknot::binding
