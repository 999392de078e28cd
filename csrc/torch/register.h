#pragma once

#include <torch/csrc/stable/library.h>

// Registers what add_ops(library) adds on the CPU; in a build without CUDA on CUDA too, where the
// checks of arguments then refuse them by name.
#if defined(REDKNOT_WITH_CUDA)
#define RK_REGISTER_ON_CPU(add_ops) \
  STABLE_TORCH_LIBRARY_IMPL(redknot, CPU, m) { add_ops(m); }
#else
#define RK_REGISTER_ON_CPU(add_ops)                          \
  STABLE_TORCH_LIBRARY_IMPL(redknot, CPU, m) { add_ops(m); } \
  STABLE_TORCH_LIBRARY_IMPL(redknot, CUDA, m) { add_ops(m); }
#endif
