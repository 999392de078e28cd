#include "page_pool.h"

#include <utility>

namespace redknot::memory {

PagePool::PagePool(int32_t num_pages, std::function<void(int32_t page)> poison)
    : ref_counts_(num_pages, 0), free_(num_pages), poison_(std::move(poison)) {
  // The lowest number on top: a fresh pool hands out neighbouring pages in rising order.
  for (int32_t page = 0; page < num_pages; ++page) free_[page] = num_pages - 1 - page;
}

bool PagePool::release(int32_t page) {
  if (--ref_counts_[page] > 0) return false;
  free_.push_back(page);
  if (poison_) poison_(page);
  return true;
}

void PagePool::grow(int32_t num_pages, std::function<void(int32_t page)> poison) {
  const int32_t num_old = this->num_pages();
  free_.reserve(num_pages);
  ref_counts_.resize(num_pages, 0);
  std::vector<int32_t> added(num_pages - num_old);
  for (int32_t i = 0; i < num_pages - num_old; ++i) added[i] = num_pages - 1 - i;
  free_.insert(free_.begin(), added.begin(), added.end());
  poison_ = std::move(poison);
}

void PageExchange::drop(int32_t page) {
  pool_.dropped_.push_back(page);
  if (--pool_.ref_counts_[page] > 0) return;
  pool_.free_.push_back(page);
  ++num_freed_;
}

AllocResult PageExchange::settle() {
  AllocResult result;
  result.pages_needed = num_needed_ - num_freed_;
  result.pages_free = pool_.num_free() - num_freed_;
  if (!fits()) {
    result.status = AllocStatus::kOutOfPages;
    return result;
  }
  settled_ = true;
  pool_.dropped_.clear();
  if (pool_.poison_) {
    for (int64_t i = pool_.num_free() - num_freed_; i < pool_.num_free(); ++i) {
      pool_.poison_(pool_.free_[i]);
    }
  }
  return result;
}

void PageExchange::undo() noexcept {
  pool_.free_.resize(pool_.free_.size() - num_freed_);
  for (const int32_t page : pool_.dropped_) ++pool_.ref_counts_[page];
  pool_.dropped_.clear();
}

}  // namespace redknot::memory
