#pragma once

// What ThreadSanitizer must be told, in the build for it (SIMT_TSAN): fibers are threads, a switch
// orders nothing, barriers and __syncwarp do. Shuffles and matrix operations exchange registers
// and, as on the hardware, order no memory.
namespace simt::tsan {

#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long num_bytes);
void __tsan_write_range(void* address, unsigned long num_bytes);
}
constexpr unsigned kNoSynchronisation = 1;

inline void create_fiber(void** fiber) { *fiber = __tsan_create_fiber(0); }
inline void destroy_fiber(void** fiber) {
  if (*fiber != nullptr) __tsan_destroy_fiber(*fiber);
  *fiber = nullptr;
}
inline void current_fiber(void** fiber) { *fiber = __tsan_get_current_fiber(); }
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, kNoSynchronisation); }
inline void acquire(const void* object) { __tsan_acquire(const_cast<void*>(object)); }
inline void release(const void* object) { __tsan_release(const_cast<void*>(object)); }
// What the executor, which is not instrumented, does to memory in a thread's name.
inline void read(const void* address, int bytes) {
  __tsan_read_range(const_cast<void*>(address), bytes);
}
inline void write(void* address, int bytes) { __tsan_write_range(address, bytes); }
#else
inline void create_fiber(void**) {}
inline void destroy_fiber(void**) {}
inline void current_fiber(void**) {}
inline void switch_to(void*) {}
inline void acquire(const void*) {}
inline void release(const void*) {}
inline void read(const void*, int) {}
inline void write(void*, int) {}
#endif

}  // namespace simt::tsan
