// What rows keep: another rule for a whole session, and how much more a session can come to hold.
#include <algorithm>

#include "allocator_impl.h"
#include "redknot/segment_allocator.h"

namespace redknot {

using memory::ceil_div;
using memory::require;
using memory::Row;
using memory::Session;

void SegmentAllocator::Impl::require_rules(const char* caller,
                                           const std::vector<HeadRule>& rules) const {
  require(static_cast<int64_t>(rules.size()) == num_rows(),
          caller,
          ": rules must be [num_layers * num_kv_heads] = [",
          num_rows(),
          "], got [",
          rules.size(),
          "]");
  for (size_t row = 0; row < rules.size(); ++row) {
    const int64_t layer = static_cast<int64_t>(row) / config.num_kv_heads;
    const int64_t head = static_cast<int64_t>(row) % config.num_kv_heads;
    require(rules[row].window != 0,
            caller,
            ": window must be >= 1 (it counts the token itself) or negative (a global head), got 0 "
            "in layer ",
            layer,
            ", head ",
            head);
    require(rules[row].sink >= 0,
            caller,
            ": sink must be >= 0, got ",
            rules[row].sink,
            " in layer ",
            layer,
            ", head ",
            head);
  }
}

int64_t SegmentAllocator::change_rules(SessionId session,
                                       const std::vector<HeadRule>& rules,
                                       int64_t* num_freed) {
  impl_->require_rules("change_rules", rules);
  const std::lock_guard lock(impl_->mutex);
  Session& found = impl_->find_session("change_rules", session);
  impl_->require_whole("change_rules", session, found);
  for (size_t row = 0; row < rules.size(); ++row) {
    if (!found.rows[row].can_follow(rules[row], found.length)) return static_cast<int64_t>(row);
  }
  *num_freed = 0;
  for (size_t index = 0; index < rules.size(); ++index) {
    Row& row = found.rows[index];
    row.follow(rules[index]);
    const std::span<const PageRef> expired = row.expired(found.length);
    for (const PageRef& ref : expired) *num_freed += impl_->pool.release(ref.page);
    row.drop_expired(expired.size());
  }
  return -1;
}

int64_t SegmentAllocator::Impl::most_at_once(const Row& row, int64_t begin, int64_t num_new) const {
  if (row.is_global()) return num_new;
  const int64_t page_size = config.page_size;
  const HeadRule& rule = row.rule();
  const int64_t num_pinned = ceil_div(std::max<int64_t>(rule.sink - begin, 0), page_size);
  const std::span<const PageRef> refs = row.refs();
  size_t next = 0;
  int64_t freed = 0;
  int64_t most = 0;
  for (int64_t taken = 1; taken <= num_new; ++taken) {
    // The first token of page `taken` finds the row at this length, and expires for it.
    const int64_t first_seen = begin + (taken - 1) * page_size - rule.window + 1;
    for (; next < refs.size(); ++next) {
      const PageRef& ref = refs[next];
      if (ref.first_position < rule.sink) continue;
      // The last page is filled up before another one is taken.
      const int64_t end = next + 1 == refs.size() ? begin : memory::end_position(ref);
      if (end > first_seen) break;
      // A page that somebody shares is not free when this row lets go.
      freed += memory::is_absent(ref) ? slots.holders[memory::slot_of(ref.page)] == 1
                                      : pool.ref_count(ref.page) == 1;
    }
    const int64_t own_expired = std::max<int64_t>(first_seen - begin, 0) / page_size - num_pinned;
    most = std::max(most, taken - freed - std::max<int64_t>(own_expired, 0));
  }
  return most;
}

int64_t SegmentAllocator::growth_pages(const std::vector<SessionId>& sessions,
                                       const std::vector<int64_t>& num_tokens) const {
  require(sessions.size() == num_tokens.size(),
          "growth_pages: num_tokens must have one entry per session, got ",
          num_tokens.size(),
          " for ",
          sessions.size(),
          " sessions");
  const std::lock_guard lock(impl_->mutex);
  const int64_t page_size = impl_->config.page_size;
  int64_t num_pages = 0;
  for (size_t i = 0; i < sessions.size(); ++i) {
    require(
        num_tokens[i] >= 0, "growth_pages: num_tokens[", i, "] must be >= 0, got ", num_tokens[i]);
    const Session& found = impl_->find_any_session("growth_pages", sessions[i]);
    for (const Row& row : found.rows) {
      if (num_tokens[i] == 0) continue;
      const int64_t room = impl_->room_in_tail(row, found.length);
      const bool copies_tail =
          room > 0 && !memory::is_absent(row.back()) && impl_->pool.ref_count(row.back().page) > 1;
      const int64_t appended = ceil_div(std::max<int64_t>(num_tokens[i] - room, 0), page_size);
      num_pages += copies_tail + impl_->most_at_once(row, found.length + room, appended);
    }
  }
  return num_pages;
}

}  // namespace redknot
