#pragma once

// write_pages and copy_pages: pool[to(row)] = source[from(row)], K and V.
//
// Both move rows of head_dim elements without looking into them, so one kernel serves every element
// type; a map (row_moves.h) says from where to where. A block is as many lanes wide as a row has
// accesses and 256 / lanes rows high. A lane has its K and its V load in flight together: 64 KiB
// per SM with 16-byte accesses, about three times what hides the latency of HBM. Nothing is shared
// between rows. Without 16-byte alignment a lane moves one element at a time.
#include "cuda/common/launch_shape.h"
#include "cuda/pages/row_moves.h"
#include "cuda/ptx/simt.cuh"

namespace redknot::gpu {

template <typename Access>
__device__ const Access* source_at(const void* base, int64_t element, int64_t element_bytes) {
  return reinterpret_cast<const Access*>(static_cast<const char*>(base) + element * element_bytes);
}

template <typename Access>
__device__ Access* destination_at(void* base, int64_t element, int64_t element_bytes) {
  return reinterpret_cast<Access*>(static_cast<char*>(base) + element * element_bytes);
}

template <typename Access, typename Rows>
__global__ void __launch_bounds__(kThreadsPerBlock) move_rows_kernel(Rows rows) {
  const PagePool& pool = rows.params.pool;
  const int64_t element_bytes = size_of(pool.dtype);
  const auto accesses_per_row =
      static_cast<int32_t>(pool.head_dim * element_bytes / static_cast<int64_t>(sizeof(Access)));
  const int64_t num_rows = rows.num_rows();
  const int64_t row_step = int64_t{gridDim.x} * blockDim.y;

  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < num_rows;
       row += row_step) {
    const RowMove move = rows(row);
    if (move.skip) continue;
    const Access* k_from = source_at<Access>(rows.k_source(), move.k_from, element_bytes);
    const Access* v_from = source_at<Access>(rows.v_source(), move.v_from, element_bytes);
    Access* k_to = destination_at<Access>(pool.k, move.k_to, element_bytes);
    Access* v_to = destination_at<Access>(pool.v, move.v_to, element_bytes);
    for (int32_t i = threadIdx.x; i < accesses_per_row; i += blockDim.x) {
      const Access k = k_from[i];
      const Access v = v_from[i];
      k_to[i] = k;
      v_to[i] = v;
    }
  }
}

}  // namespace redknot::gpu
