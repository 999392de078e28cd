#pragma once

#include <cstdint>

namespace redknot::cpu {

// At least `bytes` of this thread's own memory, 64-byte aligned, contents undefined, valid until
// the thread's next call. It grows and stays: a decode step must not fault in fresh pages per
// layer.
void* thread_scratch(int64_t bytes);
// Other memory of this thread, for what it shares with those that it wakes.
void* shared_scratch(int64_t bytes);

}  // namespace redknot::cpu
