#include "redknot/kept_memory.h"

#include <algorithm>
#include <new>

#include "redknot/huge_pages.h"

namespace redknot {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr std::align_val_t kAlignment{kHugePage};
// A block serves what is not much smaller, so that small results leave the large blocks alone.
constexpr int64_t kMaxWaste = 2;

void release(void* data) { ::operator delete(data, kAlignment); }

}  // namespace

KeptMemory::~KeptMemory() {
  for (const Block& block : kept_) release(block.data);
}

void* KeptMemory::take(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto best = kept_.end();
  for (auto block = kept_.begin(); block != kept_.end(); ++block) {
    const bool fits = bytes <= block->bytes && block->bytes <= kMaxWaste * bytes;
    if (fits && (best == kept_.end() || block->bytes <= best->bytes)) best = block;
  }
  used_.reserve(used_.size() + 1);
  if (best != kept_.end()) {
    used_.push_back(*best);
    kept_.erase(best);
    kept_bytes_ -= used_.back().bytes;
  } else {
    const int64_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    used_.push_back({::operator new(whole, kAlignment), whole});
    advise_huge_pages(reinterpret_cast<uintptr_t>(used_.back().data), whole);
  }
  return used_.back().data;
}

void KeptMemory::give_back(void* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto block = std::find_if(
      used_.begin(), used_.end(), [data](const Block& used) { return used.data == data; });
  kept_bytes_ += block->bytes;
  kept_.push_back(*block);
  used_.erase(block);
  auto first = kept_.begin();
  for (; kept_bytes_ > max_bytes_; ++first) {
    kept_bytes_ -= first->bytes;
    release(first->data);
  }
  kept_.erase(kept_.begin(), first);
}

int64_t KeptMemory::kept_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return kept_bytes_;
}

}  // namespace redknot
