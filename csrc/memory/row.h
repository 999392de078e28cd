#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "redknot/paged_kv.h"
#include "redknot/segment_allocator.h"

namespace redknot::memory {

// First position behind the page's tokens.
constexpr int64_t end_position(const PageRef& ref) {
  return int64_t{ref.first_position} + ref.num_valid;
}

// The pages of one (session, layer, KV head), by rising position: first those that hold a sink
// position, pinned; then a ring of the window's pages (all pages of a global head). Positions can
// only miss between the two parts, where pages have expired.
//
// The ring lives in a vector with dead entries in front. Expiry moves the few pinned references
// next to the surviving ones, so that a row is always one contiguous span; an append that finds
// the vector full slides the row back to the start when at least half of it is dead (each
// reference then pays for one move), else doubles it. Append is O(1) amortised, expiry
// O(expired + pinned).
class Row {
 public:
  explicit Row(HeadRule rule) : rule_(rule) {}

  bool is_global() const { return rule_.window < 0; }
  size_t size() const { return storage_.size() - begin_; }
  std::span<const PageRef> refs() const { return {storage_.data() + begin_, size()}; }
  std::span<PageRef> refs() { return {storage_.data() + begin_, size()}; }
  PageRef& back() { return storage_.back(); }
  const PageRef& back() const { return storage_.back(); }

  // Room for `count` more references: push_back needs it, and then cannot fail.
  void reserve_back(size_t count);
  void push_back(const PageRef& ref) noexcept;
  void pop_back() noexcept;

  // The references that no query at position `length` or later can see; none in a global row.
  std::span<const PageRef> expired(int64_t length) const;
  // Removes the first `count` references behind the pinned ones.
  void drop_expired(size_t count) noexcept;
  // Whether the last page is among the first `num_expired` behind the pinned ones.
  bool tail_expires(size_t num_expired) const {
    return num_expired > 0 && num_pinned_ + num_expired == size();
  }

  // Whether a query at position `new_length` would find everything it may see, in a row that
  // stands at `length` >= new_length.
  bool can_truncate(int64_t length, int64_t new_length) const;

  const HeadRule& rule() const { return rule_; }
  // Whether the row holds everything that `rule` shows to the query at position `length`.
  bool can_follow(const HeadRule& rule, int64_t length) const;
  // Needs can_follow; expired() must be dropped right after it, so that only the middle misses.
  void follow(const HeadRule& rule) noexcept;

  // The slot (page * page_size + index in the page) of each position, -1 where the row does not
  // hold it. Positions rise; the results go to slots[0], slots[stride], ...
  void find_slots(std::span<const int64_t> positions,
                  int64_t page_size,
                  int64_t* slots,
                  int64_t stride) const;

 private:
  HeadRule rule_;
  std::vector<PageRef> storage_;  // the row is [begin_, storage_.size())
  size_t begin_ = 0;
  size_t num_pinned_ = 0;
};

}  // namespace redknot::memory
