#pragma once

#include "cuda/attention/hopper_boxes.cuh"
#include "cuda/attention/hopper_params.h"
#include "cuda/attention/hopper_shared.cuh"
#include "cuda/attention/items.cuh"

namespace redknot::gpu {

// The warp that walks a work item's pages, describes blocks of keys and has the copy engine load
// them. Values lag a block behind keys, for they are needed later. A block without chunks ends an
// item.
//
// The engine fills nothing in within a page: keys behind a page's last token may be NaN, which the
// mask takes away, but 0 * NaN would poison the sums over values. So values of a chunk that such
// keys belong to are copied slot by slot, and what is not valid is copied from a page that does not
// exist, which the engine makes zeros.
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
    walker.start(call, item);
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
  __device__ static int lane() { return threadIdx.x % kWarpSize; }

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
    const Box box = box_of(block, params_.run_chunks);
    if (box == Box::kNone) return;
    load_panels<Shape>(shared_.keys[keys_.stage] + lane() * kChunkBytes,
                       box == Box::kRun ? params_.key_run : params_.key_chunk,
                       full,
                       block.slot[lane()],
                       block.page[lane()]);
  }

  __device__ void load_values(const Block& block) const {
    uint64_t* full = &shared_.values_full[values_.stage];
    unsigned char* stage = shared_.values[values_.stage];
    if (lane() == 0) ptx::arrive_expecting(full, Shape::kBlockBytes);
    __syncwarp();
    const auto no_page = static_cast<int32_t>(params_.call.pool.num_pages);
    const bool is_chunk = lane() < Shape::kChunks;
    const bool is_empty = is_chunk && block.num_valid[lane()] == 0;
    const bool is_slotwise = is_chunk && is_cut(block, lane(), params_.call.pool.page_size);
    const Box box = box_of(block, params_.run_chunks);
    if (is_empty || (box != Box::kNone && !is_slotwise)) {
      load_panels<Shape>(stage + lane() * kChunkBytes,
                         box == Box::kRun ? params_.value_run : params_.value_chunk,
                         full,
                         is_empty ? 0 : block.slot[lane()],
                         is_empty ? no_page : block.page[lane()]);
    }
    uint32_t slotwise = __ballot_sync(0xffffffffu, is_slotwise);
    while (slotwise != 0) {
      const int c = __ffs(slotwise) - 1;
      slotwise &= slotwise - 1;
      if (lane() >= kChunkKeys) continue;
      const bool is_valid = lane() < block.num_valid[c];
      load_panels<Shape>(stage + c * kChunkBytes + lane() * ptx::kSwizzleRowBytes,
                         params_.value_slot,
                         full,
                         is_valid ? block.slot[c] + lane() : 0,
                         is_valid ? block.page[c] : no_page);
    }
  }

  const HopperParams& params_;
  Shared& shared_;
  Place<Shape::kStages> keys_, values_;
  int described_ = 0;
};

}  // namespace redknot::gpu
