#include <cuda_runtime_api.h>

#include <atomic>

#include "cuda/common/architecture.h"

namespace redknot::gpu {
namespace {

std::atomic<bool> hopper_is_allowed{true};

}  // namespace

void allow_hopper(bool is_allowed) { hopper_is_allowed.store(is_allowed); }
bool is_hopper_allowed() { return hopper_is_allowed.load(); }

bool chooses_hopper() {
#ifdef REDKNOT_HOPPER
  int device = 0, major = 0, minor = 0;
  return is_hopper_allowed() && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
#else
  return false;
#endif
}

}  // namespace redknot::gpu
