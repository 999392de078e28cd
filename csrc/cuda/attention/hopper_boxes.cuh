#pragma once

#include "cuda/attention/key_walker.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/matrix_descriptor.h"

// Which boxes of pages make up a block of keys. A warp copies a block, lane c what chunk c begins.
namespace redknot::gpu {

constexpr uint32_t kChunkBytes = kChunkKeys * ptx::kSwizzleRowBytes;  // of one panel

enum class Box { kNone, kRun, kChunk };

// Full chunks that follow each other in a page are copied in runs as far as they go. run_chunks is
// a power of two.
template <int kChunks>
__device__ Box box_of(const KeyBlock<kChunks>& block, int run_chunks) {
  const int c = threadIdx.x % kWarpSize;
  const bool is_full = c < kChunks && block.num_valid[c] == kChunkKeys;
  const bool goes_on = is_full && c > 0 && block.num_valid[c - 1] == kChunkKeys &&
                       block.page[c] == block.page[c - 1] &&
                       block.slot[c] == block.slot[c - 1] + kChunkKeys;
  const uint32_t begins = __ballot_sync(0xffffffffu, !goes_on);
  const uint32_t up_to_here = (2u << c) - 1;
  const int begin = 31 - __clz(begins & up_to_here);
  const uint32_t behind = begins & ~up_to_here;
  const int end = behind == 0 ? kWarpSize : __ffs(behind) - 1;
  if (c >= kChunks || block.num_valid[c] == 0) return Box::kNone;
  const int below_run = run_chunks - 1;
  const int in_runs = (end - begin) & ~below_run;
  if (!is_full || c - begin >= in_runs) return Box::kChunk;
  return ((c - begin) & below_run) == 0 ? Box::kRun : Box::kNone;
}

// Whether the chunk's page goes on behind its last token: those slots, which may be NaN, would be
// copied too. Behind the end of a page the engine writes zeros.
template <int kChunks>
__device__ bool is_cut(const KeyBlock<kChunks>& block, int chunk, int64_t page_size) {
  const int32_t num_valid = block.num_valid[chunk];
  return num_valid > 0 && num_valid < kChunkKeys && block.slot[chunk] + num_valid < page_size;
}

// Every panel of a box that begins at `slot` of `page`.
template <typename Shape>
__device__ void load_panels(
    unsigned char* to, const TensorMap& map, uint64_t* barrier, int32_t slot, int32_t page) {
#pragma unroll 1
  for (int panel = 0; panel < Shape::kPanels; ++panel) {
    ptx::load_box(to + panel * Shape::kPanelBytes, map, barrier, panel * kBoxColumns, slot, page);
  }
}

}  // namespace redknot::gpu
