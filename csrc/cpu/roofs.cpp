#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "redknot/cpu.h"

namespace redknot::cpu {

int64_t dot_roof(const DotRoofParams& params, const Executor& executor) {
  std::atomic<int64_t> flops{0};
  executor.parallel_for(executor.num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      flops += kernels().dot_roof(params.num_rounds, params.dtype);
    }
  });
  return flops;
}

float read_roof(const ReadRoofParams& params, const Executor& executor) {
  constexpr int64_t kChunkBytes = 1 << 20;
  constexpr int64_t kSideBySide = 4;
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / params.piece_bytes);
  std::atomic<float> checksum{0.0f};
  executor.parallel_for(params.num_reads, chunk, [&](int64_t begin, int64_t end) {
    const auto* data = static_cast<const char*>(params.data);
    float sum = 0.0f;
    for (int64_t i = begin; i < end; i += kSideBySide) {
      const void* pieces[kSideBySide];
      const int64_t count = std::min(kSideBySide, end - i);
      for (int64_t p = 0; p < count; ++p) {
        pieces[p] = data + params.order[i + p] * params.piece_bytes;
      }
      sum += kernels().read_roof(pieces, count, params.piece_bytes);
    }
    checksum = checksum + sum;
  });
  return checksum;
}

}  // namespace redknot::cpu
