#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "redknot/huge_pages.h"

namespace redknot::binding {

// An empty tensor for a result. Those of a long prompt are fresh memory in every layer, and on the
// CPU faulting it in by pages of 4 KiB takes a tenth of a prefill.
inline torch::stable::Tensor new_result(const torch::stable::Tensor& like,
                                        torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  constexpr int64_t kLargeBytes = int64_t{4} << 20;
  torch::stable::Tensor result = torch::stable::new_empty(like, sizes);
  const int64_t num_bytes = result.numel() * static_cast<int64_t>(result.element_size());
  if (result.is_cpu() && num_bytes >= kLargeBytes) {
    advise_huge_pages(reinterpret_cast<uintptr_t>(result.data_ptr()), num_bytes);
  }
  return result;
}

}  // namespace redknot::binding
