#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/simt.cuh"

// Tensor-core products of 16-bit elements and the loads of their fragments (sm_80).
//
// Fragments, lane = 4 * group + member, each register two neighbouring elements:
//   A 16x16: a[0] (row group, columns 2 member), a[1] (row group + 8), a[2], a[3]: columns + 8
//   B 16x8:  b[0] (rows 2 member.., column group), b[1]: rows + 8
//   C 16x8:  c[0..1] (row group, columns 2 member..), c[2..3]: row group + 8
namespace redknot::gpu::ptx {

// Four 8x8 matrices; lane l gives where row l % 8 of matrix l / 8 is, in bytes from a base that all
// lanes share: offsets are 32-bit sums, pointers would be 64-bit ones. Register i is matrix i:
// row lane / 4, columns 2 (lane % 4) and the next.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&registers)[4],
                                               const void* base,
                                               int bytes = 0 RK_WHERE) {
#ifdef RK_SIMT
  ::simt::load_matrix_x4(registers, static_cast<const char*>(base) + bytes, false, where);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(base)) + bytes)
               : "memory");
#endif
}

// The same, each matrix transposed: register i is column lane / 4, rows 2 (lane % 4) and the next.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&registers)[4],
                                                          const void* base,
                                                          int bytes = 0 RK_WHERE) {
#ifdef RK_SIMT
  ::simt::load_matrix_x4(registers, static_cast<const char*>(base) + bytes, true, where);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(base)) + bytes)
               : "memory");
#endif
}

// d += a b with fp32 sums, T is __nv_bfloat16 or __half.
template <typename T>
__device__ __forceinline__ void mma_16816(float (&d)[4],
                                          const uint32_t (&a)[4],
                                          const uint32_t (&b)[2] RK_WHERE) {
  constexpr bool kIsBFloat16 = std::is_same_v<T, __nv_bfloat16>;
#ifdef RK_SIMT
  ::simt::mma_16816(d, a, b, kIsBFloat16 ? ::simt::Half::kBFloat16 : ::simt::Half::kFloat16, where);
#else
  if constexpr (kIsBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace redknot::gpu::ptx
