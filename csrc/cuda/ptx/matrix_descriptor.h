#pragma once

#include <cstdint>

#include "cuda/common/host_device.h"

// How wgmma is told where a matrix of 16-bit elements lies in shared memory: rows of 64 elements
// (128 bytes) with the 128-byte swizzle, eight rows to a pattern of 1,024 bytes. A matrix of more
// columns is several panels of 64 columns.
//
//   bits 0-13 address / 16, 16-29 leading byte offset / 16, 32-45 stride byte offset / 16,
//   bits 62-63 the swizzle, 1 = 128 bytes
namespace redknot::gpu::ptx {

constexpr uint32_t kSwizzleRowBytes = 128;
constexpr uint32_t kSwizzlePatternBytes = 1024;

// Where 16-byte vector `vector` (0 to 7) of row `row` lies, from the panel's beginning, which is a
// multiple of kSwizzlePatternBytes.
RK_HOST_DEVICE constexpr uint32_t swizzled_offset(uint32_t row, uint32_t vector) {
  return row * kSwizzleRowBytes + ((vector ^ row % 8) << 4);
}

RK_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address,
                                                    uint32_t leading_bytes,
                                                    uint32_t stride_bytes) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{leading_bytes >> 4} << 16 |
         uint64_t{stride_bytes >> 4} << 32 | uint64_t{1} << 62;
}

// The same matrix `bytes`, a multiple of 16, further on.
RK_HOST_DEVICE constexpr uint64_t moved_by(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Rows of the panel are rows of A, or columns of B; its columns are k (K-major). The 16 of one
// wgmma begin at column 16 * step of the panel, step 0 to 3. The leading offset is not used.
RK_HOST_DEVICE constexpr uint64_t k_major(uint32_t panel, int step) {
  return matrix_descriptor(panel + 32u * static_cast<uint32_t>(step), 16, kSwizzlePatternBytes);
}

// Rows of the panel are k, its columns are columns of B (MN-major); a B of more than 64 columns
// goes on in the next panel, panel_bytes on. The 16 rows of one wgmma begin at row 16 * step.
RK_HOST_DEVICE constexpr uint64_t mn_major(uint32_t panel, uint32_t panel_bytes, int step) {
  return matrix_descriptor(panel + 2 * kSwizzlePatternBytes * static_cast<uint32_t>(step),
                           panel_bytes,
                           kSwizzlePatternBytes);
}

// Which element of d [64, N] float i of a thread of the warpgroup is; and which of a [64, 16]
// element i of its four registers.
RK_HOST_DEVICE constexpr int fragment_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
RK_HOST_DEVICE constexpr int fragment_column(int thread, int i) {
  return thread % 4 * 2 + i % 2 + i / 4 * 8;
}

}  // namespace redknot::gpu::ptx
