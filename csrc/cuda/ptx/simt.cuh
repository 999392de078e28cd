#pragma once

// The kernels of this room are compiled twice: by nvcc for a GPU, and with -DRK_SIMT by the host
// compiler for the executor in tests/simt, which runs them without one. Whatever differs stands in
// this folder: PTX beside its twin. A static __shared__ array would become a local of each thread
// there, so shared memory is dynamic only. It begins at a multiple of 1,024 bytes, where the
// pattern of the 128-byte swizzle begins.
#ifdef RK_SIMT
#include <simt.hpp>
#define __grid_constant__
#define RK_DYNAMIC_SMEM(name) unsigned char* name = ::simt::dynamic_smem()
// The place of the call, for the executor's messages.
#define RK_WHERE , const ::simt::Where& where = ::simt::Where::current()
#else
#include <cuda_runtime.h>
#define RK_DYNAMIC_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#define RK_WHERE
#endif
