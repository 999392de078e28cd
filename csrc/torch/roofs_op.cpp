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

// Reads the pieces that `order` names; the result is of no use but to need them.
double cpu_read_roof(const Tensor& data, const Tensor& order) {
  const Arguments args("_cpu_read_roof");
  args.tensor("data", data, ScalarType::Float, {"num_pieces", "piece_size"});
  args.contiguous("data", data);
  args.tensor("order", order, ScalarType::Int, {"num_reads"});
  args.contiguous("order", order);
  const ReadRoofParams params = {
      .data = data.data_ptr(),
      .order = binding::data<int32_t>(order),
      .num_reads = order.numel(),
      .piece_bytes = data.size(1) * int64_t{sizeof(float)},
  };
  for (int64_t i = 0; i < params.num_reads; ++i) {
    args.check(0 <= params.order[i] && params.order[i] < data.size(0),
               "order must name pieces below num_pieces = ",
               data.size(0),
               ", got ",
               params.order[i]);
  }
  return cpu::read_roof(params, torch_executor());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CPU, m) {
  m.impl("_cpu_dot_roof", TORCH_BOX(&cpu_dot_roof));
  m.impl("_cpu_read_roof", TORCH_BOX(&cpu_read_roof));
}

}  // namespace redknot::binding
