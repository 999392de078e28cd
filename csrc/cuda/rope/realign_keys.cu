#include "cuda/common/alignment.h"
#include "cuda/common/launch_shape.h"
#include "cuda/kernels_cuda.h"
#include "cuda/rope/realign_keys.cuh"

namespace redknot::gpu {
namespace {

template <typename T, int kSize, typename Keys>
cudaError_t launch(const Keys& keys, cudaStream_t stream) {
  const auto& params = keys.params;
  const int64_t columns = (params.head_dim - params.rotary_dim / 2) / kSize;
  const LaunchShape shape = streaming_shape(keys.num_groups(), columns);
  const dim3 grid(shape.blocks, static_cast<uint32_t>(keys.num_runs()));
  realign_keys_kernel<T, kSize><<<grid, dim3(shape.lanes, shape.rows), 0, stream>>>(keys);
  return cudaGetLastError();
}

template <typename Keys>
cudaError_t realign(const Keys& keys, bool is_aligned, cudaStream_t stream) {
  const auto& params = keys.params;
  if (keys.num_groups() == 0 || keys.num_runs() == 0 || params.head_dim == 0) return cudaSuccess;
  // The second half of the rotated part must begin on a vector too.
  is_aligned = is_aligned && !params.interleaved &&
               params.rotary_dim / 2 * size_of(params.dtype) % kVectorBytes == 0;
  return with_element(params.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    constexpr int kVectorSize = kVectorBytes / sizeof(T);
    return is_aligned ? launch<T, kVectorSize>(keys, stream) : launch<T, 1>(keys, stream);
  });
}

}  // namespace

cudaError_t rope_realign(const RopeRealignParams& params, cudaStream_t stream) {
  const bool is_aligned = are_vectors_aligned({params.k, params.out},
                                              {params.k_token_stride,
                                               params.k_head_stride,
                                               params.out_token_stride,
                                               params.out_head_stride},
                                              size_of(params.dtype));
  return realign(TokenKeys{params}, is_aligned, stream);
}

cudaError_t rope_realign_pages(const RopeRealignPagesParams& params, cudaStream_t stream) {
  const bool is_aligned = are_vectors_aligned(
      {params.k_cache}, {params.k_page_stride, params.k_slot_stride}, size_of(params.dtype));
  return realign(PageKeys{params}, is_aligned, stream);
}

}  // namespace redknot::gpu
