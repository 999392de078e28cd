#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "redknot/check.h"

// Weak: it lives in torch's CUDA library, so that _ops.so with CUDA in it also loads under a torch
// that has none. The stable Stream hands out its native handle only from torch 2.13 on.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace redknot::binding {

// Calls launch(stream) with torch's current stream of the tensor's device, that device being the
// current one meanwhile; a launch that CUDA refuses becomes an error that names the op.
template <typename Launch>
void launch_on_device_of(const torch::stable::Tensor& tensor, const char* op, Launch&& launch) {
  RK_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch has no CUDA");
  const int32_t device = tensor.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t status = launch(cuda_stream);
#if defined(REDKNOT_CHECK_VALUES)
  // Kernels check values in this build: the call waits, so that the error is this op's.
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (status == cudaSuccess) status = cudaStreamIsCapturing(cuda_stream, &capture);
  if (status == cudaSuccess && capture == cudaStreamCaptureStatusNone) {
    status = cudaStreamSynchronize(cuda_stream);
  }
#endif
  RK_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

}  // namespace redknot::binding
