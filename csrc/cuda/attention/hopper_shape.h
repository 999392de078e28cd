#pragma once

#include "cuda/attention/tile_shape.h"
#include "cuda/common/check_value.h"
#include "cuda/ptx/tensor_map.h"

// Sizes of the attention kernels for Hopper, each with its reason; nothing here computes.
namespace redknot::gpu {

// --- prefill ------------------------------------------------------------------------------------
// A tile is kPrefillRows query rows, so that both kernels take one work list. Two warpgroups have
// 64 of them each, the rows of one wgmma; a third one loads.
constexpr int kWarpgroup = 128;
constexpr int kGroupRows = 64;
constexpr int kGroups = kPrefillRows / kGroupRows;
constexpr int kHopperThreads = (1 + kGroups) * kWarpgroup;

// 65,536 registers: a thread of the loader walks pages with 40, which leaves 232 to those that hold
// sums [64, head_dim] and scores [64, keys] of their group, a row of which is in four lanes. Checks
// of values are calls, which need more.
constexpr int kLoaderRegisters = kChecksValues ? 72 : 40;
constexpr int kGroupRegisters = kChecksValues ? 216 : 232;
static_assert(kWarpgroup * (kLoaderRegisters + kGroups * kGroupRegisters) <= 65536);

// Scores of 128 keys take 64 registers, sums of 128 dimensions as many, of 256 twice as many: then
// only 64 keys fit beside them. Two stages overlap the load of a block with the products of the
// block before; at 64 dimensions four cost no more than two at 128.
template <int kHeadDim>
struct HopperShape {
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256);
  static constexpr int kPanels = kHeadDim / kBoxColumns;
  static constexpr int kBlockKeys = kHeadDim == 256 ? 64 : 128;
  static constexpr int kChunks = kBlockKeys / kChunkKeys;
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2;
  static constexpr int kPanelBytes = kBlockKeys * 128;  // of keys or values
  static constexpr int kBlockBytes = kPanels * kPanelBytes;
  static constexpr int kQueryPanelBytes = kPrefillRows * 128;
};

// --- decode -------------------------------------------------------------------------------------
// Bound by reading pages: 4.8 TB/s for some 800 ns are 29 KiB under way per SM of an H200. The
// stages of an SM hold 192 KiB, and are filled ahead of the item at hand, so that neither its
// queries nor its result are waited for. Small blocks, as many as fit, hide the beginnings and ends
// of each other's items. Four warps take a chunk each of every block of keys.
template <int kHeadDim>
struct HopperDecodeShape {
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256);
  static constexpr int kPanels = kHeadDim / kBoxColumns;
  static constexpr int kWarps = 4;  // and one that loads
  static constexpr int kThreads = (kWarps + 1) * kWarpSize;
  static constexpr int kChunks = kWarps;
  static constexpr int kBlockKeys = kChunks * kChunkKeys;
  static constexpr int kPanelBytes = kBlockKeys * 128;
  static constexpr int kBlockBytes = kPanels * kPanelBytes;  // of keys or values
  static constexpr int kStages = kHeadDim == 64 ? 4 : 3;
  static constexpr int kBlocksPerSm = kHeadDim == 256 ? 1 : kHeadDim == 128 ? 2 : 3;
};

// head_dim 32 has rows of half a swizzle.
constexpr bool has_hopper_attention(int64_t head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}

}  // namespace redknot::gpu
