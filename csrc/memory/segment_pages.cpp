// Pages of a segment that come and go: what nobody reads need not lie in the pool.
//
// Where a segment has no page, sessions that attach it refer to the *hole*, one page that is never
// written and belongs to the allocator for good; so rows stay what they are everywhere else.
#include <algorithm>
#include <functional>
#include <utility>

#include "allocator_impl.h"
#include "redknot/segment_allocator.h"

namespace redknot {

using memory::ceil_div;
using memory::kMaxLength;
using memory::require;
using memory::Segment;

void SegmentAllocator::Impl::require_page_mask(const char* caller,
                                               const Segment& segment,
                                               const std::vector<uint8_t>& mask) const {
  const auto expected = static_cast<size_t>(num_rows() * segment.pages_per_row);
  require(mask.size() == expected,
          caller,
          ": pages must be [num_layers * num_kv_heads * ",
          segment.pages_per_row,
          "] = [",
          expected,
          "], got [",
          mask.size(),
          "]");
}

void SegmentAllocator::Impl::make_hole() {
  if (hole >= 0) return;
  hole = pool.take();
  in_segment[hole] = 1;
}

AllocResult SegmentAllocator::create_segment(int64_t num_tokens,
                                             int64_t first_position,
                                             SegmentId* segment,
                                             const std::vector<uint8_t>& present) {
  require(num_tokens >= 1, "create_segment: num_tokens must be >= 1, got ", num_tokens);
  require(first_position >= 0, "create_segment: first_position must be >= 0, got ", first_position);
  require(num_tokens <= kMaxLength && first_position <= kMaxLength - num_tokens,
          "create_segment: first_position + num_tokens must be <= ",
          kMaxLength,
          ", got ",
          first_position,
          " + ",
          num_tokens);
  const std::lock_guard lock(impl_->mutex);
  Impl& impl = *impl_;

  Segment made;
  made.num_tokens = num_tokens;
  made.first_position = first_position;
  made.pages_per_row = ceil_div(num_tokens, impl.config.page_size);
  const int64_t num_all = impl.num_rows() * made.pages_per_row;
  if (!present.empty()) impl.require_page_mask("create_segment", made, present);
  int64_t num_present = num_all;
  if (!present.empty())
    num_present = std::count_if(present.begin(), present.end(), std::identity{});
  AllocResult result;
  result.pages_needed = num_present + (num_present < num_all && impl.hole < 0);
  result.pages_free = impl.pool.num_free();
  if (result.pages_needed > result.pages_free) {
    result.status = AllocStatus::kOutOfPages;
    return result;
  }
  made.pages.resize(num_all, memory::kNoPage);
  std::vector<int32_t>& pages =
      impl.segments.emplace(impl.next_id, std::move(made)).first->second.pages;
  if (num_present < num_all) impl.make_hole();
  for (int64_t index = 0; index < num_all; ++index) {
    if (!present.empty() && !present[index]) continue;
    pages[index] = impl.pool.take();
    impl.in_segment[pages[index]] = 1;
  }
  *segment = impl.next_id++;
  return result;
}

void SegmentAllocator::release_segment(SegmentId segment) {
  const std::lock_guard lock(impl_->mutex);
  for (const int32_t page : impl_->find_segment("release_segment", segment).pages) {
    if (page == memory::kNoPage) continue;
    impl_->in_segment[page] = 0;
    impl_->pool.release(page);
  }
  impl_->segments.erase(segment);
}

int64_t SegmentAllocator::drop_segment_pages(SegmentId segment, const std::vector<uint8_t>& mask) {
  const std::lock_guard lock(impl_->mutex);
  Impl& impl = *impl_;
  std::vector<int32_t>& pages = impl.find_segment("drop_segment_pages", segment).pages;
  impl.require_page_mask("drop_segment_pages", impl.segments.at(segment), mask);
  const auto goes = [&](size_t index) { return mask[index] && pages[index] != memory::kNoPage; };
  if (impl.hole < 0 && impl.pool.num_free() == 0) {
    // The hole takes one of the pages, so one of them must become free.
    bool frees = false;
    for (size_t index = 0; index < pages.size(); ++index) {
      frees |= goes(index) && impl.pool.ref_count(pages[index]) == 1;
    }
    if (!frees) return 0;
  }
  int64_t num_freed = 0;
  bool dropped = false;
  for (size_t index = 0; index < pages.size(); ++index) {
    if (!goes(index)) continue;
    impl.in_segment[pages[index]] = 0;
    num_freed += impl.pool.release(pages[index]);
    pages[index] = memory::kNoPage;
    dropped = true;
  }
  if (dropped && impl.hole < 0) {
    impl.make_hole();
    --num_freed;
  }
  return num_freed;
}

AllocResult SegmentAllocator::restore_segment_pages(SegmentId segment,
                                                    const std::vector<uint8_t>& mask) {
  const std::lock_guard lock(impl_->mutex);
  Impl& impl = *impl_;
  std::vector<int32_t>& pages = impl.find_segment("restore_segment_pages", segment).pages;
  impl.require_page_mask("restore_segment_pages", impl.segments.at(segment), mask);
  AllocResult result;
  for (size_t index = 0; index < pages.size(); ++index) {
    result.pages_needed += mask[index] && pages[index] == memory::kNoPage;
  }
  result.pages_free = impl.pool.num_free();
  if (result.pages_needed > result.pages_free) {
    result.status = AllocStatus::kOutOfPages;
    return result;
  }
  for (size_t index = 0; index < pages.size(); ++index) {
    if (!mask[index] || pages[index] != memory::kNoPage) continue;
    pages[index] = impl.pool.take();
    impl.in_segment[pages[index]] = 1;
  }
  return result;
}

int32_t SegmentAllocator::hole_page() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->hole;
}

}  // namespace redknot
