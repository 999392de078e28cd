#pragma once

#include "cuda/attention/hopper_loader.cuh"
#include "cuda/attention/hopper_state.cuh"
#include "cuda/attention/result.cuh"

// seg_paged_attention on Hopper, for tiles of more rows than decode has: what attend.cuh computes,
// from the same work list, by wgmma and the copy engine.
//
// A block of threads is three warpgroups. One warp of the first walks pages and keeps stages of
// shared memory filled (hopper_loader.cuh). The other two have 64 query rows of the tile each, and
// go through the same blocks of keys; while one multiplies, the other computes its softmax, and
// they take turns (sync_named). Within a group the scores of a block are multiplied together with
// the values of the block before, whose sums nobody waits for until the softmax is done.
//
// Assumed, beside what attend.cuh assumes: tensor maps of the pool (hopper_params.h).
namespace redknot::gpu {

// Named barriers: of the threads of a group, and of whose turn it is.
constexpr int kGroupBarrier = 1;
constexpr int kTurnBarrier = kGroupBarrier + kGroups;

// The threads of the group that the caller belongs to.
struct GroupThreads {
  static constexpr int kCount = kWarpgroup;
  __device__ static int group() { return static_cast<int>(threadIdx.x) / kWarpgroup - 1; }
  __device__ static int index() { return static_cast<int>(threadIdx.x) % kWarpgroup; }
  __device__ static void sync() { ptx::sync_named(kGroupBarrier + group(), kWarpgroup); }
};

template <typename T, int kHeadDim>
class HopperAttend {
 public:
  using Shape = HopperShape<kHeadDim>;
  using Shared = HopperShared<T, kHeadDim>;
  using State = HopperState<T, kHeadDim>;
  using Block = KeyBlock<Shape::kChunks>;
  static_assert(sizeof(Shared) <= 227 * 1024);

  __device__ HopperAttend(const HopperParams& params, Shared& shared)
      : params_(params), shared_(shared) {}

  // The first turn is group 0's.
  __device__ static void begin() {
    if (GroupThreads::group() == 1) give_turn();
  }
  // The turn that was given last is nobody's.
  __device__ static void end() {
    if (GroupThreads::group() == 0) take_turn();
  }

  __device__ void run(const WorkItem& item) {
    const SegPagedAttentionParams& call = params_.call;
    const int first_row = GroupThreads::group() * kGroupRows;
    GroupThreads::sync();  // the item before this one is done with the group's rows
    if (GroupThreads::index() < kGroupRows) {
      const int row = first_row + GroupThreads::index();
      shared_.positions[row] = row < num_rows(item)
                                   ? call.q_positions[item.q_begin + row / params_.plan.group_size]
                                   : -1;
    }
    if (GroupThreads::index() == 0) {
      shared_.reach[GroupThreads::group()] = reach_of(call, item);
    }
    int32_t rotation_offset = 0;
    load_queries_turned(item, rotation_offset);

    State state;
    typename State::Scores scores;
    typename State::Weights weights;
    float shrink[2];
    state.clear();
    const Block* block = take_keys();
    if (block->num_chunks > 0) {
      turn_queries(item, *block, &rotation_offset);
      ptx::wgmma_fence();
      State::multiply_keys(queries(), keys(), scores);
      ptx::wgmma_wait<0>();
      release_keys();
      soften(*block, &state, scores, shrink);
      State::round_weights(scores, weights);
      while (true) {
        block = take_keys();
        if (block->num_chunks == 0) break;
        turn_queries(item, *block, &rotation_offset);
        take_turn();
        ptx::wgmma_fence();
        State::multiply_keys(queries(), keys(), scores);
        ptx::wait(&shared_.values_full[values_.stage], values_.parity);
        ptx::wgmma_fence();
        state.multiply_values(weights, values());
        give_turn();
        ptx::wgmma_wait<1>();
        release_keys();
        soften(*block, &state, scores, shrink);
        ptx::wgmma_wait<0>();
        release_values();
        state.scale_sums(shrink);
        State::round_weights(scores, weights);
      }
      ptx::wait(&shared_.values_full[values_.stage], values_.parity);
      ptx::wgmma_fence();
      state.multiply_values(weights, values());
      ptx::wgmma_wait<0>();
      release_values();
    }
    __syncwarp();
    release_keys();  // the block without chunks

    GroupThreads::sync();  // no product reads the queries any more
    write_rows<T, kHeadDim>(
        call,
        {item.q_begin, first_head(item), params_.plan.group_size, num_rows(item), item.partial},
        state,
        PanelMatrix<T, kPrefillRows>{shared_.queries},
        first_row + GroupThreads::index() / kWarpSize * kMmaRows);
  }

 private:
  __device__ static void take_turn() {
    ptx::sync_named(kTurnBarrier + GroupThreads::group(), kGroups * kWarpgroup);
  }
  __device__ static void give_turn() {
    ptx::arrive_named(kTurnBarrier + 1 - GroupThreads::group(), kGroups * kWarpgroup);
  }

  __device__ int32_t first_head(const WorkItem& item) const {
    return item.row % static_cast<int32_t>(params_.call.num_kv_heads) * params_.plan.group_size;
  }
  __device__ int32_t num_rows(const WorkItem& item) const {
    return (item.q_end - item.q_begin) * params_.plan.group_size;
  }

  __device__ uint32_t queries() const {
    return ptx::uniform(ptx::shared_address(shared_.queries) +
                        GroupThreads::group() * kGroupRows * ptx::kSwizzleRowBytes);
  }
  __device__ uint32_t keys() const {
    return ptx::uniform(ptx::shared_address(shared_.keys[keys_.stage]));
  }
  __device__ uint32_t values() const {
    return ptx::uniform(ptx::shared_address(shared_.values[values_.stage]));
  }

  __device__ const Block* take_keys() {
    ptx::wait(&shared_.keys_full[keys_.stage], keys_.parity);
    const Block* block = &shared_.blocks[described_];
    described_ = described_ + 1 == Shared::kDescribed ? 0 : described_ + 1;
    return block;
  }
  // The warp's lanes are done with them: they come from a wait for products.
  __device__ void release_keys() {
    if (threadIdx.x % kWarpSize == 0) ptx::arrive(&shared_.keys_empty[keys_.stage]);
    keys_.next();
  }
  __device__ void release_values() {
    if (threadIdx.x % kWarpSize == 0) ptx::arrive(&shared_.values_empty[values_.stage]);
    values_.next();
  }

  // The group's rows of the queries. No product that reads them may be under way.
  __device__ void load_queries_turned(const WorkItem& item, int32_t rotation_offset) const {
    const SegPagedAttentionParams& call = params_.call;
    const int first_row = GroupThreads::group() * kGroupRows;
    const int rows_left = num_rows(item) - first_row;
    const QueryRows<T> rows{static_cast<const T*>(call.q) + item.q_begin * call.q_token_stride +
                                first_head(item) * call.q_head_stride,
                            call.q_token_stride,
                            call.q_head_stride,
                            params_.plan.group_size,
                            rows_left < kGroupRows ? rows_left : kGroupRows,
                            first_row};
    load_queries<T, kHeadDim, kGroupRows, GroupThreads>(
        rows,
        PanelMatrix<T, kPrefillRows>{shared_.queries + first_row * kBoxColumns},
        call.maybe_inv_freq,
        call.maybe_inv_freq == nullptr ? 0 : static_cast<int32_t>(call.rotary_dim),
        call.rope_interleaved,
        rotation_offset);
    ptx::fence_async_proxy();
    GroupThreads::sync();
  }
  __device__ void turn_queries(const WorkItem& item, const Block& block, int32_t* offset) const {
    if (block.rotation_offset == *offset) return;
    *offset = block.rotation_offset;
    GroupThreads::sync();  // the products of all warps have read them
    load_queries_turned(item, *offset);
  }

  __device__ void soften(const Block& block,
                         State* state,
                         typename State::Scores& scores,
                         float (&shrink)[2]) const {
    if (params_.scale.inside_tanh != 0.0f) cap_scores(params_.scale.inside_tanh, scores);
    if (block.is_partial) {
      const int first_row = (static_cast<int>(threadIdx.x) - kWarpgroup) / kWarpSize * kMmaRows;
      mask_scores(
          block, shared_.positions + first_row, shared_.reach[GroupThreads::group()], 0, scores);
    }
    state->exponentiate(params_.scale.log2, scores, shrink);
  }

  const HopperParams& params_;
  Shared& shared_;
  Place<Shape::kStages> keys_, values_;
  int described_ = 0;
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_attend_kernel(const __grid_constant__ HopperParams params) {
  RK_DYNAMIC_SMEM(smem);
  auto& shared = *reinterpret_cast<HopperShared<T, kHeadDim>*>(smem);
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const auto each = [&](auto&& run) { each_item<true>(params.call.plan, params.plan.items, run); };
  if (threadIdx.x < kWarpgroup) {
    ptx::give_registers<kLoaderRegisters>();
    if (threadIdx.x < kWarpSize) {
      HopperLoader<T, kHeadDim> loader(params, shared);
      each([&](const WorkItem& item) { loader.run(item); });
    }
  } else {
    ptx::take_registers<kGroupRegisters>();
    HopperAttend<T, kHeadDim> attend(params, shared);
    attend.begin();
    each([&](const WorkItem& item) { attend.run(item); });
    attend.end();
  }
}

}  // namespace redknot::gpu
