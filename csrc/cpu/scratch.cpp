#include "scratch.h"

#include <cstddef>
#include <memory>
#include <new>

#include "redknot/huge_pages.h"

namespace redknot::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
  void operator()(std::byte* memory) const { ::operator delete[](memory, kAlignment); }
};

class Memory {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > capacity_) {
      memory_.reset();
      capacity_ = 0;
      memory_.reset(new (kAlignment) std::byte[bytes]);
      advise_huge_pages(reinterpret_cast<uintptr_t>(memory_.get()), bytes);
      capacity_ = bytes;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<std::byte[], AlignedDelete> memory_;
  int64_t capacity_ = 0;
};

}  // namespace

void* thread_scratch(int64_t bytes) {
  thread_local Memory memory;
  return memory.at_least(bytes);
}

void* shared_scratch(int64_t bytes) {
  thread_local Memory memory;
  return memory.at_least(bytes);
}

}  // namespace redknot::cpu
