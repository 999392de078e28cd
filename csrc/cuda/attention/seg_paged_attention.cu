// seg_paged_attention and seg_paged_plan as the host calls them.
#include "cuda/attention/attention.h"
#include "cuda/attention/plan_kernel.cuh"
#include "cuda/kernels_cuda.h"

namespace redknot::gpu {

cudaError_t seg_paged_plan(const GpuPlanInput& input,
                           int64_t num_layers,
                           int32_t* plans,
                           cudaStream_t stream) {
  if (num_layers == 0) return cudaSuccess;
  plan_kernel<<<static_cast<uint32_t>(num_layers), kPlanThreads, sizeof(PlanShared), stream>>>(
      input, plans);
  return cudaGetLastError();
}

cudaError_t seg_paged_attention(const SegPagedAttentionParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  const GpuPlanInput input = plan_input(params);
  return params.pool.dtype == DType::kBFloat16 ? attend_bf16(params, input, stream)
                                               : attend_fp16(params, input, stream);
}

}  // namespace redknot::gpu
