#pragma once

#include "cuda/attention/hopper_shape.h"
#include "cuda/attention/key_walker.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/matrix_descriptor.h"

namespace redknot::gpu {

// A matrix of kHeadDim columns as panels of 64 columns with the 128-byte swizzle, kPanelRows rows
// each; it may begin at any row that is a multiple of 8.
template <typename T, int kPanelRows>
struct PanelMatrix {
  T* base;

  __device__ static int byte_offset(int row, int vector) {
    const uint32_t panel = vector / 8 * kPanelRows * ptx::kSwizzleRowBytes;
    return static_cast<int>(panel + ptx::swizzled_offset(row, vector % 8));
  }
  __device__ T* vector_at(int row, int vector) const {
    return base + byte_offset(row, vector) / static_cast<int>(sizeof(T));
  }
  __device__ T& at(int row, int column) const { return vector_at(row, column / 8)[column % 8]; }
};

template <typename T, int kHeadDim>
struct HopperShared {
  using Shape = HopperShape<kHeadDim>;
  // Blocks that are described: those in stages, and one whose keys are done but not its mask.
  static constexpr int kDescribed = Shape::kStages + 1;

  alignas(1024) T queries[kPrefillRows * kHeadDim];
  alignas(1024) unsigned char keys[Shape::kStages][Shape::kBlockBytes];
  alignas(1024) unsigned char values[Shape::kStages][Shape::kBlockBytes];
  // A full one waits for the loader and its bytes, an empty one for every warp that multiplies.
  uint64_t keys_full[Shape::kStages], keys_empty[Shape::kStages];
  uint64_t values_full[Shape::kStages], values_empty[Shape::kStages];
  KeyBlock<Shape::kChunks> blocks[kDescribed];
  int32_t positions[kPrefillRows];  // of the queries; -1 behind the last one
  Reach reach[kGroups];

  // An H100 gives a block 227 KiB.
  __device__ void init() {
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      ptx::init_barrier(&keys_full[stage], 1);
      ptx::init_barrier(&values_full[stage], 1);
      ptx::init_barrier(&keys_empty[stage], kGroups * kWarpgroup / kWarpSize);
      ptx::init_barrier(&values_empty[stage], kGroups * kWarpgroup / kWarpSize);
    }
    ptx::fence_barrier_init();
  }
};

// A place in a ring of stages; who goes round it the n-th time finds parity n % 2.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace redknot::gpu
