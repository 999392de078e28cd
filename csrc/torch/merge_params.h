#pragma once

#include "arguments.h"
#include "redknot/merge.h"

// From the arguments of a call to the struct of its kernel, on whichever device `args` allows.
namespace redknot::binding {

struct MergeStatesCall {
  MergeStatesParams params;
  Tensor out;
  Tensor lse;
};

MergeStatesCall merge_states_call(const Arguments& args,
                                  const Tensor& out_a,
                                  const Tensor& lse_a,
                                  const Tensor& out_b,
                                  const Tensor& lse_b);

}  // namespace redknot::binding
