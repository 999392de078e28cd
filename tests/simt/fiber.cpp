#include "fiber.hpp"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <vector>

namespace simt {
namespace {

std::vector<char*>& stacks() {
  static std::vector<char*> all;
  return all;
}

}  // namespace

#ifdef SIMT_UCONTEXT

void Context::prepare(char* stack_end, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_end - kStackBytes;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}
void Context::switch_to(Context& to) { swapcontext(&context_, &to.context_); }

#else

extern "C" void simt_switch(void** save_stack_pointer, void* load_stack_pointer);
// The six registers that a function must preserve, and the stack pointer.
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

void Context::prepare(char* stack_end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack_end);
  *--top = nullptr;  // the return address of `entry`: none
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}
void Context::switch_to(Context& to) { simt_switch(&stack_pointer_, to.stack_pointer_); }

#endif

char* stack_end(size_t index) {
  while (stacks().size() <= index) {
    void* memory = mmap(nullptr,
                        kGuardBytes + kStackBytes,
                        PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1,
                        0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);
    stacks().push_back(static_cast<char*>(memory));
  }
  return stacks()[index] + kGuardBytes + kStackBytes;
}

bool is_stack_guard(const void* address) {
  const char* at = static_cast<const char*>(address);
  for (const char* stack : stacks()) {
    if (at >= stack && at < stack + kGuardBytes) return true;
  }
  return false;
}

}  // namespace simt
