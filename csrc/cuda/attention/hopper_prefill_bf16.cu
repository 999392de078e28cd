#include "cuda/attention/hopper_prefill_launch.cuh"

namespace redknot::gpu {

template cudaError_t hopper_prefill<__nv_bfloat16>(const SegPagedAttentionParams&,
                                                   const GpuPlanInput&,
                                                   cudaStream_t);

}  // namespace redknot::gpu
