#pragma once

#include "cuda/ffn/row_gemm.h"
#include "cuda/ptx/tensor_map.h"

// The products of gathered_ffn as the kernel of Hopper sees them: besides the arguments, how the
// copy engine reads A and B.
namespace redknot::gpu {

// Two warpgroups multiply 64 rows each, a thread of a third has the copies made.
struct HopperTile {
  static constexpr TileSize kSize{128, 256, 64};
  static constexpr int kStages = 4;
  static constexpr int kBoxRows = 128;  // of A, and of each half of B
};
constexpr int kHopperThreads = kGemmThreads + 128;
// The third warpgroup gives registers to the others: a quarter of a multiprocessor has 512 for one
// thread of each of its three warps.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 512);

struct HopperGemm {
  RowGemm gemm;
  TensorMap a;
  TensorMap b;
  TensorMap b_up;  // kGated
};

// False where there is no map of A or B (tensor_map.h).
[[nodiscard]] inline bool make_hopper_gemm(const RowGemm& gemm, DType dtype, HopperGemm* made) {
  made->gemm = gemm;
  const auto encode = [&](const void* base, int64_t rows, int64_t stride, TensorMap* map) {
    TensorLayout layout;
    layout.base = base;
    layout.dtype = dtype;
    layout.size[0] = static_cast<uint64_t>(gemm.depth);
    layout.size[1] = static_cast<uint64_t>(rows);
    layout.stride[1] = static_cast<uint64_t>(stride);
    layout.box[1] = HopperTile::kBoxRows;
    return encode_tensor_map(layout, map);
  };
  const void* b_up = gemm.b_up == nullptr ? gemm.b : gemm.b_up;
  const int64_t up_stride = gemm.b_up == nullptr ? gemm.b_stride : gemm.b_up_stride;
  return encode(gemm.a, gemm.max_rows, gemm.a_stride, &made->a) &&
         encode(gemm.b, gemm.columns, gemm.b_stride, &made->b) &&
         encode(b_up, gemm.columns, up_stride, &made->b_up);
}

}  // namespace redknot::gpu
