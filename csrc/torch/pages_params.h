#pragma once

#include "arguments.h"
#include "redknot/pages.h"

// From the arguments of a call to the struct of its kernel, on whichever device: shapes, dtypes,
// strides and devices are checked; values of index tensors are not read.
namespace redknot::binding {

WritePagesParams write_pages_params(const Tensor& k,
                                    const Tensor& v,
                                    const Tensor& k_cache,
                                    const Tensor& v_cache,
                                    const Tensor& slots);
CopyPagesParams copy_pages_params(const Tensor& k_cache,
                                  const Tensor& v_cache,
                                  const Tensor& copies);

}  // namespace redknot::binding
