#include <algorithm>

#include "cuda/common/alignment.h"
#include "cuda/common/launch_shape.h"
#include "cuda/kernels_cuda.h"
#include "cuda/merge/merge_states.cuh"

namespace redknot::gpu {

cudaError_t merge_states(const MergeStatesParams& params, cudaStream_t stream) {
  const int64_t num_rows = params.num_tokens * params.num_q_heads;
  if (num_rows == 0) return cudaSuccess;
  const bool is_aligned = are_vectors_aligned({params.out_a, params.out_b, params.out},
                                              {params.a_token_stride,
                                               params.a_head_stride,
                                               params.b_token_stride,
                                               params.b_head_stride,
                                               params.head_dim},
                                              size_of(params.dtype));
  return with_element(params.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    constexpr int kVectorSize = kVectorBytes / sizeof(T);
    const int64_t num_vectors = num_rows * params.head_dim / (is_aligned ? kVectorSize : 1);
    const auto blocks = static_cast<uint32_t>(
        std::min((num_vectors + kThreadsPerBlock - 1) / kThreadsPerBlock, kMaxBlocks));
    const auto kernel =
        is_aligned ? merge_states_kernel<T, kVectorSize> : merge_states_kernel<T, 1>;
    kernel<<<blocks, kThreadsPerBlock, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace redknot::gpu
