#include "cuda/common/alignment.h"
#include "cuda/common/launch_shape.h"
#include "cuda/kernels_cuda.h"
#include "cuda/pages/move_rows.cuh"

namespace redknot::gpu {
namespace {

template <typename Access, typename Rows>
cudaError_t launch(const Rows& rows, cudaStream_t stream) {
  const PagePool& pool = rows.params.pool;
  const int64_t row_bytes = pool.head_dim * size_of(pool.dtype);
  const LaunchShape shape =
      streaming_shape(rows.num_rows(), row_bytes / static_cast<int64_t>(sizeof(Access)));
  move_rows_kernel<Access><<<shape.blocks, dim3(shape.lanes, shape.rows), 0, stream>>>(rows);
  return cudaGetLastError();
}

template <typename Rows>
cudaError_t move_rows(const Rows& rows, bool is_aligned, cudaStream_t stream) {
  if (rows.num_rows() == 0 || rows.params.pool.head_dim == 0) return cudaSuccess;
  if (is_aligned) return launch<uint4>(rows, stream);
  if (rows.params.pool.dtype == DType::kFloat32) return launch<uint32_t>(rows, stream);
  return launch<uint16_t>(rows, stream);
}

bool is_pool_aligned(const PagePool& pool) {
  return are_vectors_aligned(
      {pool.k, pool.v},
      {pool.k_page_stride, pool.k_slot_stride, pool.v_page_stride, pool.v_slot_stride},
      size_of(pool.dtype));
}

}  // namespace

cudaError_t write_pages(const WritePagesParams& params, cudaStream_t stream) {
  const bool is_source_aligned = are_vectors_aligned(
      {params.k, params.v},
      {params.k_token_stride, params.k_head_stride, params.v_token_stride, params.v_head_stride},
      size_of(params.pool.dtype));
  return move_rows(WriteRows{params}, is_source_aligned && is_pool_aligned(params.pool), stream);
}

cudaError_t copy_pages(const CopyPagesParams& params, cudaStream_t stream) {
  return move_rows(CopyRows{params}, is_pool_aligned(params.pool), stream);
}

}  // namespace redknot::gpu
