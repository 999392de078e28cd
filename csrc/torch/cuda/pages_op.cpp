// The values of index tensors are trusted here: reading them would wait for the device.
#include <torch/csrc/stable/library.h>

#include "cuda/kernels_cuda.h"
#include "launch.h"
#include "pages_params.h"

namespace redknot::binding {
namespace {

void write_pages(const Tensor& k,
                 const Tensor& v,
                 const Tensor& k_cache,
                 const Tensor& v_cache,
                 const Tensor& slots) {
  const WritePagesParams params = write_pages_params(k, v, k_cache, v_cache, slots);
  launch_on_device_of(k_cache, "write_pages", [&](cudaStream_t stream) {
    return gpu::write_pages(params, stream);
  });
}

void copy_pages(const Tensor& k_cache, const Tensor& v_cache, const Tensor& copies) {
  const CopyPagesParams params = copy_pages_params(k_cache, v_cache, copies);
  launch_on_device_of(
      k_cache, "copy_pages", [&](cudaStream_t stream) { return gpu::copy_pages(params, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) {
  m.impl("write_pages", TORCH_BOX(&write_pages));
  m.impl("copy_pages", TORCH_BOX(&copy_pages));
}

}  // namespace redknot::binding
