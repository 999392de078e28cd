#include <torch/csrc/stable/library.h>

#include <string>

#include "redknot/check.h"
#include "redknot/cpu.h"

namespace redknot::binding {
namespace {

std::string cpu_isa(std::string isa) {
  RK_CHECK(isa.empty() || cpu::use_isa(isa.c_str()),
           "_cpu_isa: isa must be one that this machine has, got \"",
           isa,
           "\"");
  return cpu::isa_name();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace redknot::binding
