#pragma once

#include <cstdint>

// Sizes of the attention kernels, each with its reason; nothing here computes.
namespace redknot::gpu {

// Keys come in chunks of 16 slots of one page, one k-step of mma.m16n8k16; the last of a page may
// reach over its end, for no slot there is valid.
constexpr int kChunkKeys = 16;
// Pages hold a multiple of this; with 8, half of every chunk is empty.
constexpr int kPageSlots = 8;
constexpr int kWarpSize = 32;
constexpr int kMmaRows = 16;

constexpr int kDecodeRows = kMmaRows;

// A tile is kRows query rows (tokens x the query heads of one KV head) against blocks of kBlockKeys
// keys. Warps share the rows in prefill and the keys of a block in decode.
constexpr int kPrefillRows = 128;

// Decode is bound by reading pages: 16 rows hold the group of up to 16 query heads, each warp takes
// one chunk of a block, and stages keep the memory busy. With head_dim 128 a block has 64 KiB of
// stages and 48 KiB in flight; three fit on an SM of an H100, two on an A100, and HBM needs some
// 36 KiB per SM.
//
// Prefill is bound by tensor cores and, at 16 rows per warp, by reading K and V from shared memory:
// 32 rows per warp halve that. With head_dim 256 the sums of 32 rows would not fit in registers, so
// twice as many warps share them.
//
// A100 and H100 give a block 163 KiB of shared memory and more. GPUs of 8.6, 8.9 and 12.0 give 99:
// enough for all but prefill of 256, which has a compact form for them: blocks of one chunk, twice
// as many barriers.
constexpr int64_t kLeastSharedBytes = 99 * 1024;
constexpr int64_t kMostSharedBytes = 163 * 1024;
template <int kHeadDim>
constexpr bool kHasCompactPrefill = kHeadDim == 256;

template <int kHeadDim, bool kIsPrefill, bool kIsCompact = false>
struct TileShape {
  static_assert(!kIsCompact || (kIsPrefill && kHasCompactPrefill<kHeadDim>));
  static_assert(kHeadDim == 32 || kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256);
  static constexpr int kRowTiles = kIsPrefill && kHeadDim <= 128 ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kRows = kIsPrefill ? kPrefillRows : kDecodeRows;
  // 32 where the scores of 64 keys would not fit in registers beside the sums (prefill of 128), or
  // their stages in 99 KiB of shared memory.
  static constexpr int kBlockKeys = kIsCompact ? kChunkKeys : (kHeadDim >= 128 ? 32 : 64);
  static constexpr int kChunks = kBlockKeys / kChunkKeys;
  static constexpr int kWarpsOverRows = kRows / (kMmaRows * kRowTiles);
  static constexpr int kWarpsOverKeys = kIsPrefill ? 1 : kChunks;
  static constexpr int kThreads = kWarpSize * kWarpsOverRows * kWarpsOverKeys;
  static constexpr int kKeysPerWarp = kBlockKeys / kWarpsOverKeys;
  static constexpr int kStages =
      kIsPrefill ? (kHeadDim == 128 ? 3 : 2) : (kHeadDim == 256 ? 2 : (kHeadDim == 32 ? 5 : 4));
  // 65,536 registers of an SM: 255 for each of 256 threads.
  static constexpr int kBlocksPerSm = kThreads > 128 ? 1 : 2;
};

}  // namespace redknot::gpu
