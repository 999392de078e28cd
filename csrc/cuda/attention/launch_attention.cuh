#pragma once

#include <algorithm>
#include <array>
#include <atomic>

#include "cuda/attention/attend.cuh"

// Launches of the attention kernels for one element type; one .cu file per type includes this.
namespace redknot::gpu {

// Blocks of a persistent grid: as many as the current device runs at once, asked for once per
// device and kernel.
template <auto kKernel>
cudaError_t resident_blocks(int threads, size_t smem_bytes, int* blocks) {
  constexpr int kMaxDevices = 64;
  static std::array<std::atomic<int>, kMaxDevices> known;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  *blocks = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (*blocks > 0) return cudaSuccess;

  int num_sms = 0, per_sm = 0;
  status = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kKernel, threads, smem_bytes);
  }
  if (status != cudaSuccess) return status;
  *blocks = std::max(1, num_sms * per_sm);
  if (device < kMaxDevices) known[device].store(*blocks, std::memory_order_relaxed);
  return cudaSuccess;
}

template <typename T, int kHeadDim, bool kIsPrefill>
cudaError_t launch_attend(const SegPagedAttentionParams& params,
                          const PlanShape& plan,
                          int64_t most_items,
                          cudaStream_t stream) {
  using Shape = TileShape<kHeadDim, kIsPrefill>;
  constexpr size_t kSmemBytes = sizeof(SharedMemory<T, kHeadDim, kIsPrefill>);
  constexpr auto kKernel = &attend_kernel<T, kHeadDim, kIsPrefill>;
  int blocks = 0;
  const cudaError_t status = resident_blocks<kKernel>(Shape::kThreads, kSmemBytes, &blocks);
  if (status != cudaSuccess) return status;
  const auto grid = static_cast<uint32_t>(std::min<int64_t>(blocks, most_items));
  attend_kernel<T, kHeadDim, kIsPrefill>
      <<<grid, Shape::kThreads, kSmemBytes, stream>>>(params, plan, ScoreScale(params));
  return cudaGetLastError();
}

// Prefill, decode, merge: which of them have work, only the device knows; a launch without any ends
// at once. What shapes alone rule out is not launched.
template <typename T, int kHeadDim>
cudaError_t launch_attention(const SegPagedAttentionParams& params,
                             const GpuPlanInput& input,
                             cudaStream_t stream) {
  const PlanShape plan(input);
  const int64_t most = max_items(input);
  const int64_t query_rows = params.num_tokens * params.group_size();
  cudaError_t status = cudaSuccess;
  if (query_rows > kDecodeRows) {
    status = launch_attend<T, kHeadDim, true>(params, plan, most, stream);
  }
  if (status == cudaSuccess && (params.num_seqs > 1 || query_rows <= kDecodeRows)) {
    status = launch_attend<T, kHeadDim, false>(params, plan, most, stream);
  }
  if (status != cudaSuccess) return status;
  constexpr uint32_t kMergeBlocks = 1024;
  merge_splits_kernel<T, kHeadDim>
      <<<std::min<int64_t>(kMergeBlocks, most), 128, 0, stream>>>(params, plan);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_attention_of(const SegPagedAttentionParams& params,
                                const GpuPlanInput& input,
                                cudaStream_t stream) {
  switch (params.pool.head_dim) {
    case 32:
      return launch_attention<T, 32>(params, input, stream);
    case 64:
      return launch_attention<T, 64>(params, input, stream);
    case 128:
      return launch_attention<T, 128>(params, input, stream);
    case 256:
      return launch_attention<T, 256>(params, input, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace redknot::gpu
