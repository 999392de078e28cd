// Who holds how many pages. Exact, by counting; nothing is kept up to date on the hot path.
#include <vector>

#include "allocator_impl.h"
#include "redknot/segment_allocator.h"

namespace redknot {

using memory::Row;
using memory::Session;

int64_t SegmentAllocator::free_pages() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->pool.num_free();
}

int64_t SegmentAllocator::session_pages(SessionId session) const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->count_pages(impl_->find_any_session("session_pages", session)).held;
}

int64_t SegmentAllocator::session_private_pages(SessionId session) const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->count_pages(impl_->find_any_session("session_private_pages", session)).held_alone;
}

// A session can hold a page twice: a segment that it appended at two places.
SegmentAllocator::Impl::PageCount SegmentAllocator::Impl::count_pages(const Session& session) {
  for (const Row& row : session.rows) {
    for (const PageRef& ref : row.refs()) {
      if (!memory::is_absent(ref)) ++tally[ref.page];
    }
  }
  PageCount count;
  for (const Row& row : session.rows) {
    for (const PageRef& ref : row.refs()) {
      if (memory::is_absent(ref) || ref.page == hole || tally[ref.page] == 0) continue;
      ++count.held;
      if (tally[ref.page] == pool.ref_count(ref.page)) ++count.held_alone;
      tally[ref.page] = 0;
    }
  }
  if (hole >= 0) tally[hole] = 0;
  return count;
}

AllocatorStats SegmentAllocator::stats() const {
  const std::lock_guard lock(impl_->mutex);
  const Impl& impl = *impl_;
  struct Use {
    SessionId last_session = 0;
    int32_t num_owners = 0;  // the segment and each session count once
    bool in_global_row = false;
  };
  std::vector<Use> uses(impl.config.num_pages);
  for (const auto& [id, session] : impl.sessions) {
    for (const Row& row : session.rows) {
      for (const PageRef& ref : row.refs()) {
        if (memory::is_absent(ref)) continue;
        Use& use = uses[ref.page];
        if (use.last_session != id) ++use.num_owners;
        use.last_session = id;
        use.in_global_row |= row.is_global();
      }
    }
  }
  AllocatorStats stats{};
  for (size_t page = 0; page < uses.size(); ++page) {
    const bool in_segment = impl.in_segment[page];
    if (in_segment) {
      ++stats.segment_pages;
    } else if (uses[page].num_owners > 0) {
      ++(uses[page].in_global_row ? stats.session_global_pages : stats.session_local_pages);
    }
    if (uses[page].num_owners + in_segment > 1) ++stats.shared_pages;
  }
  stats.swapped_pages = static_cast<int64_t>(impl.slots.holders.size() - impl.slots.free.size());
  stats.num_pages = impl.config.num_pages;
  stats.num_free_pages = impl.pool.num_free();
  stats.num_segments = static_cast<int64_t>(impl.segments.size());
  stats.num_sessions = static_cast<int64_t>(impl.sessions.size());
  stats.bytes_per_page = impl.config.bytes_per_page;
  return stats;
}

}  // namespace redknot
