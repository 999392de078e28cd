#pragma once

#include <torch/csrc/stable/ops.h>

#include "redknot/parallel.h"

namespace redknot::binding {

// Torch's own threads: torch.set_num_threads holds here too.
inline Executor torch_executor() {
  return {
      .num_workers = torch::stable::get_num_threads(),
      .parallel_for =
          [](int64_t count, int64_t grain, const Executor::Body& body) {
            torch::stable::parallel_for(0, count, grain, body);
          },
  };
}

}  // namespace redknot::binding
