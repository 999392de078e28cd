#include "cuda/attention/hopper_decode_launch.cuh"

namespace redknot::gpu {

template cudaError_t hopper_decode<__nv_bfloat16>(const SegPagedAttentionParams&,
                                                  const GpuPlanInput&,
                                                  cudaStream_t);

}  // namespace redknot::gpu
