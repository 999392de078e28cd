// Growing a session: segments by reference, new tokens into pages of its own.
#include <algorithm>

#include "allocator_impl.h"
#include "redknot/segment_allocator.h"

namespace redknot {

using memory::ceil_div;
using memory::end_position;
using memory::kMaxLength;
using memory::PageExchange;
using memory::require;
using memory::Row;
using memory::Segment;
using memory::Session;

int64_t SegmentAllocator::Impl::room_in_tail(const Row& row, int64_t length) const {
  if (row.size() == 0) return 0;
  const PageRef& tail = row.back();
  if (tail.rotation_offset != 0 || end_position(tail) != length) return 0;
  if (!memory::is_absent(tail) && in_segment[tail.page]) return 0;
  return config.page_size - tail.num_valid;
}

void SegmentAllocator::Impl::find_batch(const char* caller,
                                        const std::vector<SessionId>& ids,
                                        bool swapped_too) {
  ++num_batches;
  batch.clear();
  for (const SessionId id : ids) {
    Session& session = swapped_too ? find_any_session(caller, id) : find_session(caller, id);
    require(session.last_batch != num_batches, caller, ": session ", id, " is given twice");
    session.last_batch = num_batches;
    batch.push_back(&session);
  }
}

void SegmentAllocator::append_segment(SessionId session, SegmentId segment) {
  const std::lock_guard lock(impl_->mutex);
  Session& found = impl_->find_session("append_segment", session);
  impl_->require_whole("append_segment", session, found);
  const Segment& source = impl_->find_segment("append_segment", segment);
  require(source.num_tokens <= kMaxLength - found.length,
          "append_segment: a session holds at most ",
          kMaxLength,
          " tokens, got ",
          found.length,
          " + ",
          source.num_tokens);

  for (Row& row : found.rows) row.reserve_back(source.pages_per_row);
  const int32_t* page = source.pages.data();
  const int64_t page_size = impl_->config.page_size;
  for (Row& row : found.rows) {
    for (int64_t index = 0; index < source.pages_per_row; ++index, ++page) {
      const int32_t shared = *page == memory::kNoPage ? impl_->hole : *page;
      impl_->pool.retain(shared);
      row.push_back(
          {.page = shared,
           .first_position = static_cast<int32_t>(found.length + index * page_size),
           .num_valid = source.num_valid(index, page_size),
           .rotation_offset = static_cast<int32_t>(found.length - source.first_position)});
    }
  }
  found.length += source.num_tokens;
}

AllocResult SegmentAllocator::append_tokens(const std::vector<SessionId>& sessions,
                                            const std::vector<int64_t>& num_tokens,
                                            bool expire_first,
                                            std::vector<PageCopy>* copies) {
  copies->clear();
  require(sessions.size() == num_tokens.size(),
          "append_tokens: num_tokens must have one entry per session, got ",
          num_tokens.size(),
          " for ",
          sessions.size(),
          " sessions");
  const std::lock_guard lock(impl_->mutex);
  Impl& impl = *impl_;
  impl.find_batch("append_tokens", sessions);
  for (size_t i = 0; i < num_tokens.size(); ++i) {
    impl.require_whole("append_tokens", sessions[i], *impl.batch[i]);
    require(
        num_tokens[i] >= 0, "append_tokens: num_tokens[", i, "] must be >= 0, got ", num_tokens[i]);
    require(num_tokens[i] <= kMaxLength - impl.batch[i]->length,
            "append_tokens: a session holds at most ",
            kMaxLength,
            " tokens, got ",
            impl.batch[i]->length,
            " + ",
            num_tokens[i]);
  }
  const int64_t page_size = impl.config.page_size;
  const auto num_expired = [&](const Row& row, int64_t length) {
    return expire_first ? row.expired(length).size() : 0;
  };
  // Tokens that go to the last page, when it survives the expiry.
  const auto fill_tail = [&](const Row& row, int64_t length, int64_t wanted) {
    if (row.tail_expires(num_expired(row, length))) return int64_t{0};
    return std::min(wanted, impl.room_in_tail(row, length));
  };

  // Everybody's expiry is weighed first: a page of two forks is free once both have let go.
  PageExchange exchange(impl.pool);
  if (expire_first) {
    for (const Session* session : impl.batch) {
      for (const Row& row : session->rows) {
        for (const PageRef& ref : row.expired(session->length)) exchange.drop(ref.page);
      }
    }
  }
  // Then the need. Of the sessions that share a tail, the last one to append keeps it.
  impl.copied_tails.clear();
  for (size_t i = 0; i < impl.batch.size(); ++i) {
    const int64_t length = impl.batch[i]->length;
    for (Row& row : impl.batch[i]->rows) {
      const int64_t in_tail = fill_tail(row, length, num_tokens[i]);
      if (in_tail > 0 && impl.pool.ref_count(row.back().page) > 1) {
        impl.copied_tails.push_back(&row);
        exchange.drop(row.back().page);
        exchange.need(1);
      }
      if (in_tail == num_tokens[i]) continue;
      const int64_t num_new = ceil_div(num_tokens[i] - in_tail, page_size);
      exchange.need(num_new);
      // Never more than the pool has: a senseless request must not exhaust the host's memory.
      if (exchange.fits()) row.reserve_back(num_new);
    }
  }
  copies->reserve(impl.copied_tails.size());
  const AllocResult result = exchange.settle();
  if (result.status != AllocStatus::kOk) return result;

  // From here on nothing can fail: room is reserved and the pages are there.
  auto copied_tail = impl.copied_tails.begin();
  for (size_t i = 0; i < impl.batch.size(); ++i) {
    Session& session = *impl.batch[i];
    for (Row& row : session.rows) {
      const int64_t in_tail = fill_tail(row, session.length, num_tokens[i]);
      row.drop_expired(num_expired(row, session.length));
      if (copied_tail != impl.copied_tails.end() && *copied_tail == &row) {
        const int32_t page = impl.pool.take();
        copies->push_back({.source = row.back().page, .destination = page});
        row.back().page = page;
        ++copied_tail;
      }
      if (in_tail > 0) row.back().num_valid += static_cast<int32_t>(in_tail);
      for (int64_t done = in_tail; done < num_tokens[i]; done += page_size) {
        row.push_back({.page = impl.pool.take(),
                       .first_position = static_cast<int32_t>(session.length + done),
                       .num_valid = static_cast<int32_t>(std::min(page_size, num_tokens[i] - done)),
                       .rotation_offset = 0});
      }
    }
    session.length += num_tokens[i];
  }
  return result;
}

}  // namespace redknot
