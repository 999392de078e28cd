#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/kernels_cuda.h"
#include "launch.h"
#include "merge_params.h"

namespace redknot::binding {
namespace {

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a,
                                        const Tensor& lse_a,
                                        const Tensor& out_b,
                                        const Tensor& lse_b) {
  const MergeStatesCall call =
      merge_states_call(Arguments("merge_states", out_a), out_a, lse_a, out_b, lse_b);
  launch_on_device_of(out_a, "merge_states", [&](cudaStream_t stream) {
    return gpu::merge_states(call.params, stream);
  });
  return {call.out, call.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) { m.impl("merge_states", TORCH_BOX(&merge_states)); }

}  // namespace redknot::binding
