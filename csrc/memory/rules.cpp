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
      const int64_t appended =
          copies_tail + ceil_div(std::max<int64_t>(num_tokens[i] - room, 0), page_size);
      // A window of w tokens lies in at most this many pages of the ring, plus sink pages.
      const int64_t kept =
          ceil_div(row.rule().window, page_size) + 1 + ceil_div(row.rule().sink, page_size);
      num_pages += row.is_global() ? appended : std::min(appended, kept);
    }
  }
  return num_pages;
}

}  // namespace redknot
