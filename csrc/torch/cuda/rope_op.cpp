// The values of index tensors are trusted here: reading them would wait for the device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/kernels_cuda.h"
#include "launch.h"
#include "rope_params.h"

namespace redknot::binding {
namespace {

void rope_realign_out(const Tensor& k,
                      int64_t offset,
                      const Tensor& inv_freq,
                      bool interleaved,
                      std::optional<Tensor> offsets,
                      const Tensor& out) {
  const RopeRealignParams params =
      rope_realign_params(k, offset, inv_freq, interleaved, offsets, out);
  launch_on_device_of(
      k, "rope_realign", [&](cudaStream_t stream) { return gpu::rope_realign(params, stream); });
}

Tensor rope_realign(const Tensor& k,
                    int64_t offset,
                    const Tensor& inv_freq,
                    bool interleaved,
                    std::optional<Tensor> offsets) {
  const Tensor out = torch::stable::new_empty(k, k.sizes());
  rope_realign_out(k, offset, inv_freq, interleaved, offsets, out);
  return out;
}

void rope_realign_pages(const Tensor& k_cache,
                        const Tensor& page_refs,
                        const Tensor& inv_freq,
                        bool interleaved) {
  const RopeRealignPagesParams params =
      rope_realign_pages_params(k_cache, page_refs, inv_freq, interleaved);
  launch_on_device_of(k_cache, "rope_realign_pages", [&](cudaStream_t stream) {
    return gpu::rope_realign_pages(params, stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) {
  m.impl("rope_realign", TORCH_BOX(&rope_realign));
  m.impl("rope_realign_out", TORCH_BOX(&rope_realign_out));
  m.impl("rope_realign_pages", TORCH_BOX(&rope_realign_pages));
}

}  // namespace redknot::binding
