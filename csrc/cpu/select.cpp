#include "redknot/select.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "redknot/cpu.h"

namespace redknot::cpu {
namespace {

// Marks the kept tokens of one sequence of n tokens.
void select_sequence(const SelectTokensParams& params,
                     const float* importance,
                     int64_t n,
                     std::vector<int32_t>* order,
                     uint8_t* keep) {
  std::fill(keep, keep + n, uint8_t{0});
  std::fill(keep + n - std::min(n, params.recent_n), keep + n, uint8_t{1});
  int64_t kept = std::min(n, params.recent_n);
  const auto add = [&](int32_t token) {
    kept += keep[token] == 0;
    keep[token] = 1;
  };
  if (params.mass >= 1.0) {
    std::fill(keep, keep + n, uint8_t{1});
    return;
  }
  order->resize(n);
  std::iota(order->begin(), order->end(), 0);
  std::sort(order->begin(), order->end(), [&](int32_t a, int32_t b) {
    return importance[a] != importance[b] ? importance[a] > importance[b] : a < b;
  });
  // Summed in double and in the order of selection, so that the total equals the last partial sum.
  double total = 0.0;
  for (const int32_t token : *order) total += importance[token];
  double sum = 0.0;
  int64_t rank = 0;
  for (; rank < n && sum < params.mass * total; ++rank) {
    sum += importance[(*order)[rank]];
    add((*order)[rank]);
  }
  for (; rank < n && kept < params.min_keep; ++rank) add((*order)[rank]);
}

}  // namespace

void token_importance(const TokenImportanceParams& params, const Executor& executor) {
  constexpr int64_t kGrainElements = 64 * 1024;
  const int64_t elements = params.num_q_heads * params.head_dim;
  executor.parallel_for(
      params.num_tokens, 1 + kGrainElements / (elements + 1), [&](int64_t begin, int64_t end) {
        kernels().token_importance(params, begin, end);
      });
}

void select_tokens(const SelectTokensParams& params, const Executor& executor) {
  std::vector<uint8_t> keep(params.num_tokens);
  executor.parallel_for(params.num_seqs, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> order;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = params.cu_seqlens[s];
      select_sequence(params,
                      params.importance + first,
                      params.cu_seqlens[s + 1] - first,
                      &order,
                      keep.data() + first);
    }
  });
  int32_t count = 0;
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    if (keep[t] != 0) params.indices[count++] = static_cast<int32_t>(t);
  }
  std::fill(params.indices + count, params.indices + params.num_tokens, -1);
  *params.count = count;
}

}  // namespace redknot::cpu
