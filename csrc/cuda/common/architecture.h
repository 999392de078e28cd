#pragma once

namespace redknot::gpu {

// Whether to launch the kernels for Hopper: they were built, the current device is one (9.0), and
// allow_hopper(false) was not called last. Those of sm_80 run on every device and do everything.
[[nodiscard]] bool chooses_hopper();

// For tests and benchmarks, which compare the two on one device; of the whole process.
void allow_hopper(bool is_allowed);
[[nodiscard]] bool is_hopper_allowed();

}  // namespace redknot::gpu
