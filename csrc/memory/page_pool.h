#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "redknot/segment_allocator.h"

namespace redknot::memory {

// The pages of one device: which are free, and how many holders each of the others has.
// Invariant: a page is in the free list exactly when its reference count is 0.
class PagePool {
 public:
  PagePool(int32_t num_pages, std::function<void(int32_t page)> poison);

  int32_t num_pages() const { return static_cast<int32_t>(ref_counts_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int32_t ref_count(int32_t page) const { return ref_counts_[page]; }

  // The caller has checked num_free(): there is a page, with one holder from now on.
  int32_t take() noexcept {
    const int32_t page = free_.back();
    free_.pop_back();
    ref_counts_[page] = 1;
    return page;
  }
  void retain(int32_t page) noexcept { ++ref_counts_[page]; }
  // Returns whether the page became free.
  bool release(int32_t page);
  // More pages, used after those that are free already.
  void grow(int32_t num_pages, std::function<void(int32_t page)> poison);

 private:
  friend class PageExchange;

  std::vector<int32_t> ref_counts_;  // [num_pages]
  // A stack: the page freed last is the warmest. Its capacity is num_pages, so it never allocates.
  std::vector<int32_t> free_;
  std::vector<int32_t> dropped_;  // the log of the PageExchange in progress, kept for its capacity
  std::function<void(int32_t page)> poison_;
};

// What one call gives back and what it takes, weighed before anything is final. Counts of dropped
// pages go down at once, so that two rows of one call see each other; without a successful
// settle() the destructor puts them back and nothing has happened. One at a time per pool, and no
// take() before settle().
class PageExchange {
 public:
  explicit PageExchange(PagePool& pool) : pool_(pool) {}
  ~PageExchange() {
    if (!settled_) undo();
  }
  PageExchange(const PageExchange&) = delete;
  PageExchange& operator=(const PageExchange&) = delete;

  // Gives up one reference to the page.
  void drop(int32_t page);
  // Asks for pages; the caller takes exactly as many after settle().
  void need(int64_t num_pages) { num_needed_ += num_pages; }
  bool fits() const { return num_needed_ <= pool_.num_free(); }
  // kOk: dropped pages without a holder are free, and the pages asked for can be taken.
  AllocResult settle();

 private:
  void undo() noexcept;

  PagePool& pool_;
  int64_t num_needed_ = 0;
  int64_t num_freed_ = 0;  // they are the last entries of the free list
  bool settled_ = false;
};

}  // namespace redknot::memory
