#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace redknot::binding {

// Empty tensors for results, where `like` is: of its dtype, or of fp32. On the CPU memory of large
// ones is kept for later ones (see KeptMemory).
torch::stable::Tensor new_result(const torch::stable::Tensor& like,
                                 torch::headeronly::IntHeaderOnlyArrayRef sizes);
torch::stable::Tensor new_floats(const torch::stable::Tensor& like,
                                 torch::headeronly::IntHeaderOnlyArrayRef sizes);

}  // namespace redknot::binding
