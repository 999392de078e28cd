#pragma once

#include <algorithm>

#include "cuda/attention/attend.cuh"
#include "cuda/attention/hopper.h"
#include "cuda/common/architecture.h"
#include "cuda/common/resident_blocks.cuh"

// Launches of the attention kernels for one element type; one .cu file per type includes this.
namespace redknot::gpu {

template <typename T, int kHeadDim, bool kIsPrefill, bool kIsCompact = false>
cudaError_t launch_attend(const SegPagedAttentionParams& params,
                          const PlanShape& plan,
                          int64_t most_items,
                          cudaStream_t stream) {
  using Shape = TileShape<kHeadDim, kIsPrefill, kIsCompact>;
  constexpr size_t kSmemBytes = sizeof(SharedMemory<T, kHeadDim, kIsPrefill, kIsCompact>);
  constexpr auto kKernel = &attend_kernel<T, kHeadDim, kIsPrefill, kIsCompact>;
  int blocks = 0;
  const cudaError_t status = resident_blocks<kKernel>(Shape::kThreads, kSmemBytes, &blocks);
  if (status != cudaSuccess) return status;
  const auto grid = static_cast<uint32_t>(std::min<int64_t>(blocks, most_items));
  attend_kernel<T, kHeadDim, kIsPrefill, kIsCompact>
      <<<grid, Shape::kThreads, kSmemBytes, stream>>>(params, plan, ScoreScale(params));
  return cudaGetLastError();
}

// The kernel of Hopper where there is one for this call, else that of sm_80, in the form that this
// GPU has the shared memory for.
template <typename T, int kHeadDim, bool kIsPrefill>
cudaError_t launch_tiles(const SegPagedAttentionParams& params,
                         const GpuPlanInput& input,
                         cudaStream_t stream) {
#ifdef REDKNOT_HOPPER
  if (chooses_hopper()) {
    const cudaError_t status = kIsPrefill ? hopper_prefill<T>(params, input, stream)
                                          : hopper_decode<T>(params, input, stream);
    if (status != cudaErrorNotSupported) return status;
  }
#endif
  const PlanShape plan(input);
  const int64_t most_items = max_items(input);
  if constexpr (kIsPrefill && kHasCompactPrefill<kHeadDim>) {
    int device = 0, given = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) {
      status = cudaDeviceGetAttribute(&given, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (status != cudaSuccess) return status;
    if (given < static_cast<int>(sizeof(SharedMemory<T, kHeadDim, true>))) {
      return launch_attend<T, kHeadDim, true, true>(params, plan, most_items, stream);
    }
  }
  return launch_attend<T, kHeadDim, kIsPrefill>(params, plan, most_items, stream);
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
    status = launch_tiles<T, kHeadDim, true>(params, input, stream);
  }
  if (status == cudaSuccess && (params.num_seqs > 1 || query_rows <= kDecodeRows)) {
    status = launch_tiles<T, kHeadDim, false>(params, input, stream);
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
