#pragma once

#include "cuda/attention/hopper_boxes.cuh"
#include "cuda/attention/hopper_params.h"
#include "cuda/attention/hopper_shared.cuh"
#include "cuda/attention/items.cuh"
#include "cuda/attention/result.cuh"

// seg_paged_attention on Hopper, for tiles of at most kDecodeRows rows: what attend.cuh computes of
// them, from the same work list and into the same partial results.
//
// One warp walks pages and has the copy engine keep the stages of shared memory full, through the
// ends of items; it runs ahead of the products by as much as the stages hold. Each of the other
// warps takes one chunk of 16 keys of every block, by mma.sync, with an online softmax of its own:
// they wait for nothing but pages until their states are merged.
//
// Why not wgmma with keys as its 64 rows: pages pass through shared memory once in either way, and
// that is what takes the time. 16 rows cost mma.sync some 300 FLOP per clock of an SM at 4.8 TB/s,
// an eighth of what it does; 8 rows instead of 16 would save nothing that is scarce. But then the
// warps would share every maximum, and weights would go through shared memory, with two barriers
// and a fence per block of keys.
//
// Assumed, beside what attend.cuh assumes: tensor maps of the pool (hopper_params.h).
namespace redknot::gpu {

template <typename T, int kHeadDim>
struct HopperDecodeShared {
  using Shape = HopperDecodeShape<kHeadDim>;

  alignas(1024) unsigned char keys[Shape::kStages][Shape::kBlockBytes];
  unsigned char values[Shape::kStages][Shape::kBlockBytes];
  T queries[kDecodeRows * kHeadDim];
  WarpState<kHeadDim / 8> state[1];  // on its way to warp 0
  // A full one waits for the loader and its bytes, an empty one for every warp that multiplies.
  uint64_t full[Shape::kStages], empty[Shape::kStages];
  KeyBlock<Shape::kChunks> blocks[Shape::kStages];
  int32_t positions[kDecodeRows];  // of the queries; -1 behind the last one
  Reach reach;

  __device__ void init() {
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      ptx::init_barrier(&full[stage], 1);
      ptx::init_barrier(&empty[stage], Shape::kWarps);
    }
    ptx::fence_barrier_init();
  }
};

// The warp that describes blocks of keys and loads them; a block without chunks ends an item.
template <typename T, int kHeadDim>
class HopperDecodeLoader {
 public:
  using Shape = HopperDecodeShape<kHeadDim>;
  using Shared = HopperDecodeShared<T, kHeadDim>;
  using Block = KeyBlock<Shape::kChunks>;

  __device__ HopperDecodeLoader(const HopperParams& params, Shared& shared)
      : params_(params), shared_(shared) {
    if (lane() == 0) {
      ptx::prefetch_map(params.key_chunk);
      ptx::prefetch_map(params.key_run);
      ptx::prefetch_map(params.value_chunk);
      ptx::prefetch_map(params.value_run);
    }
  }

  __device__ void run(const WorkItem& item) {
    const SegPagedAttentionParams& call = params_.call;
    check_item(call, item, kWarpSize);
    KeyWalker<Shape::kChunks> walker;
    walker.start(call, item);
    bool has_keys = true;
    while (has_keys) {
      ptx::wait(&shared_.empty[place_.stage], place_.parity ^ 1);
      Block& block = shared_.blocks[place_.stage];
      walker.next(&block);
      __syncwarp();
      load(block);
      has_keys = block.num_chunks > 0;
      place_.next();
    }
  }

 private:
  __device__ static int lane() { return threadIdx.x % kWarpSize; }

  __device__ void load(const Block& block) const {
    uint64_t* full = &shared_.full[place_.stage];
    if (lane() == 0) {
      ptx::arrive_expecting(full, block.num_chunks * 2 * Shape::kPanels * kChunkBytes);
    }
    __syncwarp();
    const Box box = box_of(block, params_.run_chunks);
    if (box == Box::kNone) return;
    const bool is_run = box == Box::kRun;
    const uint32_t begin = lane() * kChunkBytes;
    const int32_t slot = block.slot[lane()], page = block.page[lane()];
    load_panels<Shape>(shared_.keys[place_.stage] + begin,
                       is_run ? params_.key_run : params_.key_chunk,
                       full,
                       slot,
                       page);
    load_panels<Shape>(shared_.values[place_.stage] + begin,
                       is_run ? params_.value_run : params_.value_chunk,
                       full,
                       slot,
                       page);
  }

  const HopperParams& params_;
  Shared& shared_;
  Place<Shape::kStages> place_;
};

// The warps that multiply.
template <typename T, int kHeadDim>
class HopperDecode {
 public:
  using Shape = HopperDecodeShape<kHeadDim>;
  using Shared = HopperDecodeShared<T, kHeadDim>;
  using Block = KeyBlock<Shape::kChunks>;
  using Queries = SharedMatrix<T, kHeadDim>;
  using Keys = PanelMatrix<T, Shape::kBlockKeys>;
  static_assert(sizeof(Shared) <= 227 * 1024);
  static_assert(Shape::kBlocksPerSm * (sizeof(Shared) + 1024) <= 228 * 1024);

  struct Threads {
    static constexpr int kCount = Shape::kWarps * kWarpSize;
    __device__ static int index() { return threadIdx.x; }
    __device__ static void sync() { ptx::sync_named(1, kCount); }
  };

  __device__ HopperDecode(const HopperParams& params, Shared& shared)
      : params_(params), shared_(shared) {}

  __device__ void run(const WorkItem& item) {
    const SegPagedAttentionParams& call = params_.call;
    Threads::sync();  // the item before this one is done with shared memory
    if (threadIdx.x < kDecodeRows) {
      const int row = threadIdx.x;
      shared_.positions[row] = row < num_rows(item)
                                   ? call.q_positions[item.q_begin + row / params_.plan.group_size]
                                   : -1;
    }
    if (threadIdx.x == 0) shared_.reach = reach_of(call, item);
    int32_t rotation_offset = 0;
    load_queries_turned(item, rotation_offset);

    SoftmaxState<T, kHeadDim, 1, kChunkKeys> state;
    state.clear();
    while (true) {
      ptx::wait(&shared_.full[place_.stage], place_.parity);
      const Block& block = shared_.blocks[place_.stage];
      const int32_t num_chunks = block.num_chunks;
      if (num_chunks > 0 && block.rotation_offset != rotation_offset) {
        rotation_offset = block.rotation_offset;
        Threads::sync();  // all warps have multiplied with them
        load_queries_turned(item, rotation_offset);
      }
      if (warp() < num_chunks) {
        const Keys values = matrix(shared_.values);
        clear_behind_last_token(block, values);
        state.add_block(Queries{shared_.queries},
                        matrix(shared_.keys),
                        values,
                        block,
                        shared_.positions,
                        shared_.reach,
                        params_.scale,
                        0,
                        warp() * kChunkKeys);
      }
      __syncwarp();
      if (threadIdx.x % kWarpSize == 0) ptx::arrive(&shared_.empty[place_.stage]);
      place_.next();
      if (num_chunks == 0) break;
    }

    merge_warps<Threads, Shape::kWarps>(state, shared_.state);
    if (warp() != 0) return;
    write_rows<T, kHeadDim>(
        call,
        {item.q_begin, first_head(item), params_.plan.group_size, num_rows(item), item.partial},
        state,
        Queries{shared_.queries},
        0);
  }

 private:
  __device__ static int warp() { return threadIdx.x / kWarpSize; }

  __device__ int32_t first_head(const WorkItem& item) const {
    return item.row % static_cast<int32_t>(params_.call.num_kv_heads) * params_.plan.group_size;
  }
  __device__ int32_t num_rows(const WorkItem& item) const {
    return (item.q_end - item.q_begin) * params_.plan.group_size;
  }
  __device__ Keys matrix(unsigned char (&stages)[Shape::kStages][Shape::kBlockBytes]) const {
    return {reinterpret_cast<T*>(stages[place_.stage])};
  }

  __device__ void load_queries_turned(const WorkItem& item, int32_t rotation_offset) const {
    const SegPagedAttentionParams& call = params_.call;
    const QueryRows<T> rows{static_cast<const T*>(call.q) + item.q_begin * call.q_token_stride +
                                first_head(item) * call.q_head_stride,
                            call.q_token_stride,
                            call.q_head_stride,
                            params_.plan.group_size,
                            num_rows(item)};
    load_queries<T, kHeadDim, kDecodeRows, Threads>(
        rows,
        Queries{shared_.queries},
        call.maybe_inv_freq,
        call.maybe_inv_freq == nullptr ? 0 : static_cast<int32_t>(call.rotary_dim),
        call.rope_interleaved,
        rotation_offset);
    Threads::sync();
  }

  // What is copied of a page behind its last token may be NaN: the mask takes such keys away, but
  // their weight 0 times NaN would poison the sums over values.
  __device__ void clear_behind_last_token(const Block& block, const Keys& values) const {
    if (!is_cut(block, warp(), params_.call.pool.page_size)) return;
    constexpr int kVectors = kHeadDim / kVectorElements;
    const int lane = threadIdx.x % kWarpSize;
    const int num_valid = block.num_valid[warp()];
    for (int i = lane; i < (kChunkKeys - num_valid) * kVectors; i += kWarpSize) {
      const int row = warp() * kChunkKeys + num_valid + i / kVectors;
      *reinterpret_cast<Vector<T, kVectorElements>*>(values.vector_at(row, i % kVectors)) = {};
    }
    ptx::fence_async_proxy();  // the engine writes here next
    __syncwarp();
  }

  const HopperParams& params_;
  Shared& shared_;
  Place<Shape::kStages> place_;
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(HopperDecodeShape<kHeadDim>::kThreads,
                                  HopperDecodeShape<kHeadDim>::kBlocksPerSm)
    hopper_decode_kernel(const __grid_constant__ HopperParams params) {
  RK_DYNAMIC_SMEM(smem);
  auto& shared = *reinterpret_cast<HopperDecodeShared<T, kHeadDim>*>(smem);
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const auto each = [&](auto&& run) { each_item<false>(params.call.plan, params.plan.items, run); };
  if (threadIdx.x >= HopperDecode<T, kHeadDim>::Threads::kCount) {
    HopperDecodeLoader<T, kHeadDim> loader(params, shared);
    each([&](const WorkItem& item) { loader.run(item); });
  } else {
    HopperDecode<T, kHeadDim> decode(params, shared);
    each([&](const WorkItem& item) { decode.run(item); });
  }
}

}  // namespace redknot::gpu
