#pragma once

#include "cuda/attention/check_item.cuh"
#include "cuda/attention/hopper_params.h"
#include "cuda/attention/hopper_shared.cuh"

namespace redknot::gpu {

// The warp that walks a work item's pages, describes blocks of keys and has the copy engine load
// them. Values lag a block behind keys, for they are needed later. A block without chunks ends an
// item.
//
// The engine fills nothing in within a page: keys behind a page's last token may be NaN, which the
// mask takes away, but 0 * NaN would poison the sums over values. So values of a chunk that has
// only some tokens are copied slot by slot, and what is not valid is copied from a page that does
// not exist, which the engine makes zeros.
template <typename T, int kHeadDim>
class HopperLoader {
 public:
  using Shape = HopperShape<kHeadDim>;
  using Shared = HopperShared<T, kHeadDim>;
  using Block = KeyBlock<Shape::kChunks>;

  __device__ HopperLoader(const HopperParams& params, Shared& shared)
      : params_(params), shared_(shared) {
    if (lane() == 0) {
      ptx::prefetch_map(params.key_chunk);
      ptx::prefetch_map(params.key_run);
      ptx::prefetch_map(params.value_slot);
      ptx::prefetch_map(params.value_chunk);
      ptx::prefetch_map(params.value_run);
    }
  }

  __device__ void run(const WorkItem& item) {
    const SegPagedAttentionParams& call = params_.call;
    check_item(call, item, kWarpSize);
    KeyWalker<Shape::kChunks> walker;
    walker.start(call.page_refs,
                 item.ref_begin,
                 item.ref_end,
                 {call.q_positions[item.q_begin],
                  call.q_positions[item.q_end - 1],
                  call.row_window[item.row],
                  call.row_sink[item.row]});
    const Block* before = nullptr;
    while (true) {
      ptx::wait(&shared_.keys_empty[keys_.stage], keys_.parity ^ 1);
      Block& block = shared_.blocks[described_];
      described_ = described_ + 1 == Shared::kDescribed ? 0 : described_ + 1;
      walker.next(&block);
      __syncwarp();
      load_keys(block);
      keys_.next();
      if (before != nullptr) {
        ptx::wait(&shared_.values_empty[values_.stage], values_.parity ^ 1);
        load_values(*before);
        values_.next();
      }
      if (block.num_chunks == 0) return;
      before = &block;
    }
  }

 private:
  static constexpr uint32_t kAllLanes = 0xffffffffu;
  static constexpr uint32_t kChunkBytes = kChunkKeys * ptx::kSwizzleRowBytes;  // of one panel

  // What a lane copies of the chunk that it stands for.
  enum class Box { kNone, kRun, kChunk };

  __device__ static int lane() { return threadIdx.x % kWarpSize; }

  // Full chunks that follow each other in a page are copied in runs as far as they go.
  __device__ Box box_of(const Block& block) const {
    const int c = lane();
    const bool is_full = c < Shape::kChunks && block.num_valid[c] == kChunkKeys;
    const bool goes_on = is_full && c > 0 && block.num_valid[c - 1] == kChunkKeys &&
                         block.page[c] == block.page[c - 1] &&
                         block.slot[c] == block.slot[c - 1] + kChunkKeys;
    const uint32_t begins = __ballot_sync(kAllLanes, !goes_on);
    const uint32_t up_to_here = (2u << c) - 1;
    const int begin = 31 - __clz(begins & up_to_here);
    const uint32_t behind = begins & ~up_to_here;
    const int end = behind == 0 ? kWarpSize : __ffs(behind) - 1;
    if (c >= Shape::kChunks || block.num_valid[c] == 0) return Box::kNone;
    const int below_run = params_.run_chunks - 1;  // a run is a power of two
    const int in_runs = (end - begin) & ~below_run;
    if (!is_full || c - begin >= in_runs) return Box::kChunk;
    return ((c - begin) & below_run) == 0 ? Box::kRun : Box::kNone;
  }

  __device__ void load_keys(const Block& block) const {
    uint64_t* full = &shared_.keys_full[keys_.stage];
    if (lane() == 0) {
      if (block.num_chunks > 0) {
        ptx::arrive_expecting(full, block.num_chunks * Shape::kPanels * kChunkBytes);
      } else {
        ptx::arrive(full);
      }
    }
    __syncwarp();
    const Box box = box_of(block);
    if (box == Box::kNone) return;
    const TensorMap& map = box == Box::kRun ? params_.key_run : params_.key_chunk;
    unsigned char* to = shared_.keys[keys_.stage] + lane() * kChunkBytes;
#pragma unroll 1
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      ptx::load_box(to + panel * Shape::kPanelBytes,
                    map,
                    full,
                    panel * kBoxColumns,
                    block.slot[lane()],
                    block.page[lane()]);
    }
  }

  __device__ void load_values(const Block& block) const {
    uint64_t* full = &shared_.values_full[values_.stage];
    unsigned char* stage = shared_.values[values_.stage];
    if (lane() == 0) ptx::arrive_expecting(full, Shape::kBlockBytes);
    __syncwarp();
    const auto no_page = static_cast<int32_t>(params_.call.pool.num_pages);
    const bool is_chunk = lane() < Shape::kChunks;
    const int32_t num_valid = is_chunk ? block.num_valid[lane()] : 0;
    const bool is_partial = num_valid > 0 && num_valid < kChunkKeys;
    const Box box = box_of(block);
    if (is_chunk && !is_partial && (num_valid == 0 || box != Box::kNone)) {
      const TensorMap& map = box == Box::kRun ? params_.value_run : params_.value_chunk;
#pragma unroll 1
      for (int panel = 0; panel < Shape::kPanels; ++panel) {
        ptx::load_box(stage + lane() * kChunkBytes + panel * Shape::kPanelBytes,
                      map,
                      full,
                      panel * kBoxColumns,
                      num_valid > 0 ? block.slot[lane()] : 0,
                      num_valid > 0 ? block.page[lane()] : no_page);
      }
    }
    uint32_t partial = __ballot_sync(kAllLanes, is_partial);
    while (partial != 0) {
      const int c = __ffs(partial) - 1;
      partial &= partial - 1;
#pragma unroll 1
      for (int i = lane(); i < kChunkKeys * Shape::kPanels; i += kWarpSize) {
        const int slot = i % kChunkKeys, panel = i / kChunkKeys;
        const bool is_valid = slot < block.num_valid[c];
        ptx::load_box(
            stage + c * kChunkBytes + slot * ptx::kSwizzleRowBytes + panel * Shape::kPanelBytes,
            params_.value_slot,
            full,
            panel * kBoxColumns,
            is_valid ? block.slot[c] + slot : 0,
            is_valid ? block.page[c] : no_page);
      }
    }
  }

  const HopperParams& params_;
  Shared& shared_;
  Place<Shape::kStages> keys_, values_;
  int described_ = 0;
};

}  // namespace redknot::gpu
