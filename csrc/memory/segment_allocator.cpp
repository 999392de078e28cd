#include "redknot/segment_allocator.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

#include "allocator_impl.h"

namespace redknot {

using memory::ceil_div;
using memory::end_position;
using memory::kMaxLength;
using memory::require;
using memory::Row;
using memory::Segment;
using memory::Session;

namespace {

AllocatorConfig checked(AllocatorConfig config) {
  require(
      config.num_layers >= 1, "SegmentAllocator: num_layers must be >= 1, got ", config.num_layers);
  require(config.num_kv_heads >= 1,
          "SegmentAllocator: num_kv_heads must be >= 1, got ",
          config.num_kv_heads);
  require(
      config.num_pages >= 1, "SegmentAllocator: num_pages must be >= 1, got ", config.num_pages);
  require(
      config.page_size >= 1, "SegmentAllocator: page_size must be >= 1, got ", config.page_size);
  require(config.bytes_per_page >= 0,
          "SegmentAllocator: bytes_per_page must be >= 0, got ",
          config.bytes_per_page);
  return config;
}

}  // namespace

bool poisons_freed_pages_by_default() {
#ifdef REDKNOT_POISON_FREED_PAGES
  return true;
#else
  return false;
#endif
}

SegmentAllocator::SegmentAllocator(AllocatorConfig config)
    : impl_(std::make_unique<Impl>(checked(std::move(config)))) {}

SegmentAllocator::~SegmentAllocator() = default;

// --- segments -----------------------------------------------------------------------------------

AllocResult SegmentAllocator::create_segment(int64_t num_tokens,
                                             int64_t first_position,
                                             SegmentId* segment) {
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

  Segment made;
  made.num_tokens = num_tokens;
  made.first_position = first_position;
  made.pages_per_row = ceil_div(num_tokens, impl_->config.page_size);
  AllocResult result;
  result.pages_needed = impl_->num_rows() * made.pages_per_row;
  result.pages_free = impl_->pool.num_free();
  if (result.pages_needed > result.pages_free) {
    result.status = AllocStatus::kOutOfPages;
    return result;
  }
  made.pages.resize(result.pages_needed);
  std::vector<int32_t>& pages =
      impl_->segments.emplace(impl_->next_id, std::move(made)).first->second.pages;
  for (int32_t& page : pages) {
    page = impl_->pool.take();
    impl_->in_segment[page] = 1;
  }
  *segment = impl_->next_id++;
  return result;
}

void SegmentAllocator::release_segment(SegmentId segment) {
  const std::lock_guard lock(impl_->mutex);
  for (const int32_t page : impl_->find_segment("release_segment", segment).pages) {
    impl_->in_segment[page] = 0;
    impl_->pool.release(page);
  }
  impl_->segments.erase(segment);
}

std::vector<int64_t> SegmentAllocator::segment_slots(SegmentId segment, int64_t layer) const {
  const std::lock_guard lock(impl_->mutex);
  const Segment& found = impl_->find_segment("segment_slots", segment);
  impl_->require_layer("segment_slots", layer);
  const int64_t num_heads = impl_->config.num_kv_heads;
  const int64_t page_size = impl_->config.page_size;
  std::vector<int64_t> slots(found.num_tokens * num_heads);
  for (int64_t head = 0; head < num_heads; ++head) {
    const int32_t* pages = &found.pages[(layer * num_heads + head) * found.pages_per_row];
    for (int64_t token = 0; token < found.num_tokens; ++token) {
      slots[token * num_heads + head] = pages[token / page_size] * page_size + token % page_size;
    }
  }
  return slots;
}

// --- sessions -----------------------------------------------------------------------------------

SessionId SegmentAllocator::create_session(const std::vector<HeadRule>& rules) {
  impl_->require_rules("create_session", rules);
  Session made;
  made.rows.reserve(rules.size());
  for (const HeadRule& rule : rules) made.rows.emplace_back(rule);
  const std::lock_guard lock(impl_->mutex);
  impl_->sessions.emplace(impl_->next_id, std::move(made));
  return impl_->next_id++;
}

void SegmentAllocator::release_session(SessionId session) {
  const std::lock_guard lock(impl_->mutex);
  for (const Row& row : impl_->find_any_session("release_session", session).rows) {
    for (const PageRef& ref : row.refs()) {
      if (memory::is_absent(ref)) {
        impl_->slots.release(memory::slot_of(ref.page));
      } else {
        impl_->pool.release(ref.page);
      }
    }
  }
  impl_->sessions.erase(session);
}

SessionId SegmentAllocator::fork_session(SessionId session) {
  const std::lock_guard lock(impl_->mutex);
  Session copy = impl_->find_session("fork_session", session);
  const Session& fork = impl_->sessions.emplace(impl_->next_id, std::move(copy)).first->second;
  for (const Row& row : fork.rows) {
    for (const PageRef& ref : row.refs()) impl_->pool.retain(ref.page);
  }
  return impl_->next_id++;
}

int64_t SegmentAllocator::session_length(SessionId session) const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->find_any_session("session_length", session).length;
}

int64_t SegmentAllocator::expire(SessionId session) {
  const std::lock_guard lock(impl_->mutex);
  Session& found = impl_->find_session("expire", session);
  int64_t num_freed = 0;
  for (Row& row : found.rows) {
    const std::span<const PageRef> expired = row.expired(found.length);
    for (const PageRef& ref : expired) num_freed += impl_->pool.release(ref.page);
    row.drop_expired(expired.size());
  }
  return num_freed;
}

bool SegmentAllocator::truncate(SessionId session, int64_t length) {
  const std::lock_guard lock(impl_->mutex);
  Session& found = impl_->find_session("truncate", session);
  require(length >= 0 && length <= found.length,
          "truncate: length must be in [0, ",
          found.length,
          "], got ",
          length);
  const bool possible = std::all_of(found.rows.begin(), found.rows.end(), [&](const Row& row) {
    return row.can_truncate(found.length, length);
  });
  if (!possible) return false;
  for (Row& row : found.rows) {
    while (row.size() > 0 && row.back().first_position >= length) {
      impl_->pool.release(row.back().page);
      row.pop_back();
    }
    if (row.size() > 0 && end_position(row.back()) > length) {
      row.back().num_valid = static_cast<int32_t>(length - row.back().first_position);
    }
  }
  found.length = length;
  return true;
}

// --- reading ------------------------------------------------------------------------------------

std::vector<int64_t> SegmentAllocator::Impl::layer_slots(
    const Session& session, int64_t layer, const std::vector<int64_t>& positions) const {
  const int64_t num_heads = config.num_kv_heads;
  std::vector<int64_t> slots(positions.size() * num_heads);
  for (int64_t head = 0; head < num_heads; ++head) {
    session.rows[layer * num_heads + head].find_slots(
        positions, config.page_size, slots.data() + head, num_heads);
  }
  return slots;
}

std::vector<int64_t> SegmentAllocator::tail_slots(SessionId session,
                                                  int64_t layer,
                                                  int64_t num_tokens) const {
  const std::lock_guard lock(impl_->mutex);
  const Session& found = impl_->find_session("tail_slots", session);
  impl_->require_layer("tail_slots", layer);
  require(num_tokens >= 0 && num_tokens <= found.length,
          "tail_slots: num_tokens must be in [0, ",
          found.length,
          "], got ",
          num_tokens);
  std::vector<int64_t> positions(num_tokens);
  std::iota(positions.begin(), positions.end(), found.length - num_tokens);
  return impl_->layer_slots(found, layer, positions);
}

std::vector<int64_t> SegmentAllocator::position_slots(SessionId session,
                                                      int64_t layer,
                                                      const std::vector<int64_t>& positions) const {
  const std::lock_guard lock(impl_->mutex);
  const Session& found = impl_->find_session("position_slots", session);
  impl_->require_layer("position_slots", layer);
  memory::require_positions("position_slots", positions, found.length);
  return impl_->layer_slots(found, layer, positions);
}

RowTable SegmentAllocator::rows(const std::vector<SessionId>& sessions, int64_t layer) const {
  const std::lock_guard lock(impl_->mutex);
  impl_->require_layer("rows", layer);
  const int64_t num_heads = impl_->config.num_kv_heads;
  RowTable table;
  table.row_indptr.reserve(sessions.size() * num_heads + 1);
  table.row_indptr.push_back(0);
  int64_t num_refs = 0;
  for (const SessionId id : sessions) {
    const Session& session = impl_->find_session("rows", id);
    for (int64_t head = 0; head < num_heads; ++head) {
      num_refs += static_cast<int64_t>(session.rows[layer * num_heads + head].size());
      require(num_refs <= kMaxLength,
              "rows: the sessions hold more than ",
              kMaxLength,
              " page references in layer ",
              layer);
      table.row_indptr.push_back(static_cast<int32_t>(num_refs));
    }
  }
  table.page_refs.reserve(num_refs);
  for (const SessionId id : sessions) {
    const Session& session = impl_->sessions.at(id);
    for (int64_t head = 0; head < num_heads; ++head) {
      const std::span<const PageRef> refs = session.rows[layer * num_heads + head].refs();
      table.page_refs.insert(table.page_refs.end(), refs.begin(), refs.end());
    }
  }
  return table;
}

}  // namespace redknot
