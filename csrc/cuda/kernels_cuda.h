#pragma once

#include <cuda_runtime_api.h>

#include "redknot/pages.h"
#include "redknot/rope.h"

// Every kernel of this room, as the host calls it: arguments are checked already, pointers are of
// the current device, the work is queued on `stream` and not waited for.
namespace redknot::gpu {

[[nodiscard]] cudaError_t write_pages(const WritePagesParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t copy_pages(const CopyPagesParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t rope_realign(const RopeRealignParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t rope_realign_pages(const RopeRealignPagesParams& params,
                                             cudaStream_t stream);

}  // namespace redknot::gpu
