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
  const int64_t num_chunks = params.num_bytes / kChunkBytes;
  std::atomic<float> checksum{0.0f};
  executor.parallel_for(num_chunks, 1, [&](int64_t begin, int64_t end) {
    const auto* from = static_cast<const char*>(params.data) + begin * kChunkBytes;
    checksum = checksum + kernels().read_roof(from, (end - begin) * kChunkBytes);
  });
  return checksum;
}

}  // namespace redknot::cpu
