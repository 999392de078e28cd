#pragma once

// Marks what the kernels and the C++ tests of the host both compile.
#ifdef __CUDACC__
#define RK_HOST_DEVICE __host__ __device__
#else
#define RK_HOST_DEVICE
#endif
