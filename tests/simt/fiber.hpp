#pragma once

// A stack of its own and the way to it and back. x86-64 has a switch of a dozen instructions;
// elsewhere (or with SIMT_UCONTEXT) ucontext does it, through the kernel and some 30 times slower.
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 4096;
// What a kernel's frames reach at most; only this much is poisoned again for every block.
constexpr size_t kPoisonedStackBytes = 12 << 10;

class Context {
 public:
  // Prepares `entry` to run on the stack that ends at `stack_end`; it must never return.
  void prepare(char* stack_end, void (*entry)());
  // Stores the running context here and goes on with `to`.
  void switch_to(Context& to);

 private:
#ifdef SIMT_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

// Memory for `count` stacks, each with an inaccessible page below it; kept for later launches.
char* stack_end(size_t index);
bool is_stack_guard(const void* address);

}  // namespace simt
