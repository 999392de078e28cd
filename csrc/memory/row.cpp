#include "row.h"

#include <algorithm>

namespace redknot::memory {

void Row::reserve_back(size_t count) {
  const size_t needed = storage_.size() + count;
  if (needed <= storage_.capacity()) return;
  if (begin_ >= storage_.size() - begin_) {
    storage_.erase(storage_.begin(), storage_.begin() + static_cast<ptrdiff_t>(begin_));
    begin_ = 0;
    if (storage_.size() + count <= storage_.capacity()) return;
  }
  storage_.reserve(std::max(storage_.size() + count, 2 * storage_.capacity()));
}

void Row::push_back(const PageRef& ref) noexcept {
  storage_.push_back(ref);
  // Positions rise, so a page with a sink position comes before all others.
  if (ref.first_position < rule_.sink) ++num_pinned_;
}

void Row::pop_back() noexcept {
  storage_.pop_back();
  num_pinned_ = std::min(num_pinned_, size());
}

std::span<const PageRef> Row::expired(int64_t length) const {
  if (is_global()) return {};
  const std::span<const PageRef> ring = refs().subspan(num_pinned_);
  // The query at position `length` sees j > length - window.
  const int64_t first_seen = length - rule_.window + 1;
  size_t count = 0;
  while (count < ring.size() && end_position(ring[count]) <= first_seen) ++count;
  return ring.first(count);
}

void Row::drop_expired(size_t count) noexcept {
  if (count == 0) return;
  const auto first = storage_.begin() + static_cast<ptrdiff_t>(begin_);
  const auto pinned_end = first + static_cast<ptrdiff_t>(num_pinned_);
  std::move_backward(first, pinned_end, pinned_end + static_cast<ptrdiff_t>(count));
  begin_ += count;
}

bool Row::can_truncate(int64_t length, int64_t new_length) const {
  if (is_global()) return true;
  const std::span<const PageRef> all = refs();
  const int64_t gap_begin = num_pinned_ == 0 ? 0 : end_position(all[num_pinned_ - 1]);
  const int64_t gap_end = num_pinned_ == all.size() ? length : all[num_pinned_].first_position;
  const int64_t first_seen = new_length - rule_.window + 1;
  return std::max(gap_begin, first_seen) >= std::min(gap_end, new_length);
}

bool Row::can_follow(const HeadRule& rule, int64_t length) const {
  const std::span<const PageRef> all = refs();
  const int64_t gap_begin = num_pinned_ == 0 ? 0 : end_position(all[num_pinned_ - 1]);
  const int64_t gap_end = num_pinned_ == all.size() ? length : all[num_pinned_].first_position;
  if (gap_begin >= gap_end) return true;
  return rule.window >= 0 && rule.sink <= gap_begin && length - rule.window + 1 >= gap_end;
}

void Row::follow(const HeadRule& rule) noexcept {
  rule_ = rule;
  num_pinned_ = 0;
  for (const PageRef& ref : refs()) num_pinned_ += ref.first_position < rule.sink;
}

void Row::find_slots(std::span<const int64_t> positions,
                     int64_t page_size,
                     int64_t* slots,
                     int64_t stride) const {
  const std::span<const PageRef> all = refs();
  auto ref = all.begin();
  for (const int64_t position : positions) {
    if (ref != all.end() && end_position(*ref) <= position) {
      ref = std::partition_point(
          ref + 1, all.end(), [&](const PageRef& r) { return end_position(r) <= position; });
    }
    const bool held = ref != all.end() && ref->first_position <= position;
    *slots = held ? ref->page * page_size + (position - ref->first_position) : -1;
    slots += stride;
  }
}

}  // namespace redknot::memory
