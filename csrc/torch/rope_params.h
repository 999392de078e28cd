#pragma once

#include <optional>

#include "arguments.h"
#include "redknot/rope.h"

// From the arguments of a call to the struct of its kernel, on whichever device: shapes, dtypes,
// strides and devices are checked; values of index tensors are not read.
namespace redknot::binding {

RopeRealignParams rope_realign_params(const Tensor& k,
                                      int64_t offset,
                                      const Tensor& inv_freq,
                                      bool interleaved,
                                      const std::optional<Tensor>& offsets,
                                      const Tensor& out);
RopeRealignPagesParams rope_realign_pages_params(const Tensor& k_cache,
                                                 const Tensor& page_refs,
                                                 const Tensor& inv_freq,
                                                 bool interleaved);

}  // namespace redknot::binding
