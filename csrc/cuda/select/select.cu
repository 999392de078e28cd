#include <algorithm>

#include "cuda/common/alignment.h"
#include "cuda/common/launch_shape.h"
#include "cuda/kernels_cuda.h"
#include "cuda/select/select_tokens.cuh"
#include "cuda/select/token_importance.cuh"

namespace redknot::gpu {
namespace {

// A sequence is one block's: as many threads as an SM gives one, to have its loads in flight.
constexpr int kSelectThreads = 1024;

}  // namespace

cudaError_t token_importance(const TokenImportanceParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  const bool is_aligned =
      are_vectors_aligned({params.attn_out},
                          {params.token_stride, params.head_stride, params.head_dim},
                          size_of(params.dtype));
  return with_element(params.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    constexpr int kVectorSize = kVectorBytes / sizeof(T);
    const int64_t warps = kThreadsPerBlock / 32;
    const auto blocks =
        static_cast<uint32_t>(std::min((params.num_tokens + warps - 1) / warps, kMaxBlocks));
    const auto kernel =
        is_aligned ? token_importance_kernel<T, kVectorSize> : token_importance_kernel<T, 1>;
    kernel<<<blocks, kThreadsPerBlock, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

int64_t select_tokens_workspace(int64_t num_tokens, int64_t num_seqs) {
  return num_tokens + num_seqs;
}

cudaError_t select_tokens(const SelectTokensParams& params,
                          int32_t* workspace,
                          cudaStream_t stream) {
  const KeptTokens kept = {workspace, workspace + params.num_tokens};
  if (params.num_seqs > 0) {
    keep_tokens_kernel<kSelectThreads>
        <<<static_cast<uint32_t>(params.num_seqs), kSelectThreads, sizeof(KeepScratch), stream>>>(
            params, kept);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  const auto blocks = static_cast<uint32_t>(std::max<int64_t>(params.num_seqs, 1));
  gather_kept_kernel<kThreadsPerBlock>
      <<<blocks, kThreadsPerBlock, 32 * sizeof(uint32_t), stream>>>(params, kept);
  return cudaGetLastError();
}

}  // namespace redknot::gpu
