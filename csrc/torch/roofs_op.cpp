#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "executor.h"
#include "redknot/cpu.h"

namespace redknot::binding {
namespace {

// Floating-point operations done in the dtype of `like`, by all threads together.
int64_t cpu_dot_roof(const Tensor& like, int64_t num_rounds) {
  const Arguments args("_cpu_dot_roof");
  const DType dtype = args.floating("like", like, {"any"});
  args.check(num_rounds >= 0, "num_rounds must not be negative, got ", num_rounds);
  return cpu::dot_roof({.num_rounds = num_rounds, .dtype = dtype}, torch_executor());
}

// Reads the tensor's whole MiBs; the result is of no use but to need them.
double cpu_read_roof(const Tensor& data) {
  const Arguments args("_cpu_read_roof");
  args.tensor("data", data, ScalarType::Float, {"num_elements"});
  args.contiguous("data", data);
  return cpu::read_roof({.data = data.data_ptr(), .num_bytes = data.numel() * 4}, torch_executor());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CPU, m) {
  m.impl("_cpu_dot_roof", TORCH_BOX(&cpu_dot_roof));
  m.impl("_cpu_read_roof", TORCH_BOX(&cpu_read_roof));
}

}  // namespace redknot::binding
