// Preemption: the pages that only some sessions hold leave the pool, and come back.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "allocator_impl.h"
#include "redknot/segment_allocator.h"

namespace redknot {

using memory::absent_page;
using memory::is_absent;
using memory::require;
using memory::Row;
using memory::Session;
using memory::slot_of;

void SegmentAllocator::Impl::tally_batch() {
  for (const Session* session : batch) {
    for (const Row& row : session->rows) {
      for (const PageRef& ref : row.refs()) {
        if (!is_absent(ref)) ++tally[ref.page];
      }
    }
  }
}

void SegmentAllocator::Impl::clear_tally() { std::fill(tally.begin(), tally.end(), 0); }

std::vector<int32_t> SegmentAllocator::exclusive_pages(
    const std::vector<SessionId>& sessions) const {
  const std::lock_guard lock(impl_->mutex);
  impl_->find_batch("exclusive_pages", sessions, /*swapped_too=*/true);
  impl_->tally_batch();
  std::vector<int32_t> pages;
  for (int32_t page = 0; page < impl_->config.num_pages; ++page) {
    if (impl_->tally[page] > 0 && impl_->tally[page] == impl_->pool.ref_count(page)) {
      pages.push_back(page);
    }
  }
  impl_->clear_tally();
  return pages;
}

std::vector<int32_t> SegmentAllocator::swap_out(const std::vector<SessionId>& sessions,
                                                const std::vector<int32_t>& pages) {
  const std::lock_guard lock(impl_->mutex);
  Impl& impl = *impl_;
  impl.find_batch("swap_out", sessions, /*swapped_too=*/true);
  impl.tally_batch();
  int64_t num_wrong = -1;
  for (size_t i = 0; i < pages.size() && num_wrong < 0; ++i) {
    const int32_t page = pages[i];
    const bool exclusive = page >= 0 && page < impl.config.num_pages && impl.tally[page] > 0 &&
                           impl.tally[page] == impl.pool.ref_count(page);
    if (!exclusive || (i > 0 && pages[i - 1] >= page)) num_wrong = static_cast<int64_t>(i);
  }
  impl.clear_tally();
  require(num_wrong < 0,
          "swap_out: pages must be rising and held by the given sessions alone, got ",
          num_wrong < 0 ? 0 : pages[num_wrong],
          " at index ",
          num_wrong);

  std::vector<int32_t> slots;
  slots.reserve(pages.size());
  for (const int32_t page : pages) {
    slots.push_back(impl.slots.take(impl.pool.ref_count(page)));
    impl.tally[page] = absent_page(slots.back());  // negative where a page leaves
  }
  for (Session* session : impl.batch) {
    for (Row& row : session->rows) {
      for (PageRef& ref : row.refs()) {
        if (is_absent(ref) || impl.tally[ref.page] == 0) continue;
        const int32_t page = ref.page;
        ref.page = impl.tally[page];
        ++session->num_absent;
        impl.pool.release(page);
      }
    }
  }
  impl.clear_tally();
  return slots;
}

AllocResult SegmentAllocator::swap_in(SessionId session, std::vector<SlotMove>* moves) {
  moves->clear();
  const std::lock_guard lock(impl_->mutex);
  Impl& impl = *impl_;
  const Session& wanted = impl.find_any_session("swap_in", session);
  std::unordered_map<int32_t, int32_t> page_of;  // by slot
  for (const Row& row : wanted.rows) {
    for (const PageRef& ref : row.refs()) {
      if (is_absent(ref)) page_of.emplace(slot_of(ref.page), -1);
    }
  }
  AllocResult result;
  result.pages_needed = static_cast<int64_t>(page_of.size());
  result.pages_free = impl.pool.num_free();
  if (result.pages_needed > result.pages_free) {
    result.status = AllocStatus::kOutOfPages;
    return result;
  }
  moves->reserve(page_of.size());
  for (const auto& [slot, unset] : page_of) moves->push_back({.slot = slot, .page = -1});
  std::sort(moves->begin(), moves->end(), [](auto& a, auto& b) { return a.slot < b.slot; });
  for (SlotMove& move : *moves) {
    move.page = impl.pool.take();
    page_of[move.slot] = move.page;
    for (int32_t i = 1; i < impl.slots.holders[move.slot]; ++i) impl.pool.retain(move.page);
  }
  for (auto& [id, other] : impl.sessions) {
    if (other.num_absent == 0) continue;
    for (Row& row : other.rows) {
      for (PageRef& ref : row.refs()) {
        if (!is_absent(ref)) continue;
        const auto found = page_of.find(slot_of(ref.page));
        if (found == page_of.end()) continue;
        impl.slots.release(found->first);
        ref.page = found->second;
        --other.num_absent;
      }
    }
  }
  return result;
}

int64_t SegmentAllocator::session_swapped_pages(SessionId session) const {
  const std::lock_guard lock(impl_->mutex);
  std::unordered_set<int32_t> pages;
  for (const Row& row : impl_->find_any_session("session_swapped_pages", session).rows) {
    for (const PageRef& ref : row.refs()) {
      if (is_absent(ref)) pages.insert(ref.page);
    }
  }
  return static_cast<int64_t>(pages.size());
}

void SegmentAllocator::grow(int32_t num_pages, std::function<void(int32_t page)> poison) {
  const std::lock_guard lock(impl_->mutex);
  require(num_pages >= impl_->config.num_pages,
          "grow: num_pages must be >= ",
          impl_->config.num_pages,
          ", got ",
          num_pages);
  impl_->in_segment.resize(num_pages, 0);
  impl_->tally.resize(num_pages, 0);
  impl_->pool.grow(num_pages, std::move(poison));
  impl_->config.num_pages = num_pages;
}

}  // namespace redknot
