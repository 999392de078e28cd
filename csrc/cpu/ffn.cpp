#include "redknot/ffn.h"

#include "dispatch.h"
#include "redknot/cpu.h"

namespace redknot::cpu {
namespace {

// Rows that are worth waking a thread for.
int64_t grain(int64_t elements_per_row) {
  constexpr int64_t kGrainElements = 32 * 1024;
  return 1 + kGrainElements / (elements_per_row + 1);
}

}  // namespace

void gather_norm(const GatherNormParams& params, const Executor& executor) {
  executor.parallel_for(params.num_rows, grain(params.hidden_dim), [&](int64_t begin, int64_t end) {
    kernels().gather_norm(params, begin, end);
  });
}

void gated_activation(const GatedActivationParams& params, const Executor& executor) {
  executor.parallel_for(params.num_rows, grain(params.ffn_dim), [&](int64_t begin, int64_t end) {
    kernels().gated_activation(params, begin, end);
  });
}

void add_bias(const AddBiasParams& params, const Executor& executor) {
  executor.parallel_for(params.num_rows, grain(params.dim), [&](int64_t begin, int64_t end) {
    kernels().add_bias(params, begin, end);
  });
}

void scatter_add(const ScatterAddParams& params, const Executor& executor) {
  executor.parallel_for(params.num_rows, grain(params.hidden_dim), [&](int64_t begin, int64_t end) {
    kernels().scatter_add(params, begin, end);
  });
}

}  // namespace redknot::cpu
