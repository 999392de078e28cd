#include <torch/csrc/stable/library.h>

#include <string>

#include "redknot/check.h"
#include "redknot/cpu.h"

#ifdef REDKNOT_WITH_CUDA
#include "cuda/common/architecture.h"
#endif

namespace redknot::binding {
namespace {

std::string cpu_isa(std::string isa) {
  RK_CHECK(isa.empty() || cpu::use_isa(isa.c_str()),
           "_cpu_isa: isa must be one that this machine has, got \"",
           isa,
           "\"");
  return cpu::isa_name();
}

#ifdef REDKNOT_WITH_CUDA
std::string cuda_arch(std::string arch) {
  RK_CHECK(arch.empty() || arch == "sm_80" || arch == "sm_90a",
           "_cuda_arch: arch must be sm_80 or sm_90a, got \"",
           arch,
           "\"");
  if (!arch.empty()) gpu::allow_hopper(arch == "sm_90a");
  return gpu::is_hopper_allowed() ? "sm_90a" : "sm_80";
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
#ifdef REDKNOT_WITH_CUDA
  m.impl("_cuda_arch", TORCH_BOX(&cuda_arch));
#endif
}

}  // namespace redknot::binding
