#pragma once

// Checks of the values of index tensors, for which nothing waits in other builds: made in Debug
// builds, with -DREDKNOT_CHECK_VALUES=ON, and by the executor of tests/simt. What fails ends the
// launch; on a GPU with a line on stderr, and an error that the op raises with its name.
#if defined(RK_SIMT)
#include "cuda/ptx/simt.cuh"
#define RK_CHECK_VALUE(condition, message) ::simt::check(condition, message)
#else
#if defined(REDKNOT_CHECK_VALUES)
#undef NDEBUG
#endif
#include <cassert>
#if defined(NDEBUG)
#define RK_CHECK_VALUE(condition, message) static_cast<void>(sizeof((condition) ? 1 : 0))
#else
#define RK_CHECK_VALUE(condition, message) assert((condition) && message)
#endif
#endif

namespace redknot::gpu {

#if defined(RK_SIMT) || !defined(NDEBUG)
constexpr bool kChecksValues = true;
#else
constexpr bool kChecksValues = false;
#endif

}  // namespace redknot::gpu
