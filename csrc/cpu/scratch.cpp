#include "scratch.h"

#include <cstddef>
#include <memory>
#include <new>

namespace redknot::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
  void operator()(std::byte* memory) const { ::operator delete[](memory, kAlignment); }
};

}  // namespace

void* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<std::byte[], AlignedDelete> memory;
  thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();
    memory.reset(new (kAlignment) std::byte[bytes]);
    capacity = bytes;
  }
  return memory.get();
}

}  // namespace redknot::cpu
