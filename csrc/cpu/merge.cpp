#include "redknot/merge.h"

#include "dispatch.h"
#include "redknot/cpu.h"

namespace redknot::cpu {

void merge_states(const MergeStatesParams& params, const Executor& executor) {
  constexpr int64_t kGrainElements = 32 * 1024;
  executor.parallel_for(
      params.num_tokens * params.num_q_heads,
      1 + kGrainElements / (params.head_dim + 1),
      [&](int64_t begin, int64_t end) { kernels().merge_states(params, begin, end); });
}

}  // namespace redknot::cpu
