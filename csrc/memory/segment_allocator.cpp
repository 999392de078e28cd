#include "redknot/segment_allocator.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

#include "allocator_impl.h"

namespace redknot {

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
      const int64_t page = pages[token / page_size];
      slots[token * num_heads + head] =
          page == memory::kNoPage ? -1 : page * page_size + token % page_size;
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
  impl_->require_whole("expire", session, found);
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
  for (size_t index = 0; index < found.rows.size(); ++index) {
    const auto layer = static_cast<int64_t>(index) / impl_->config.num_kv_heads;
    if (!found.rows[index].can_truncate(found.length_of(layer), length)) return false;
  }
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
  found.num_ahead = 0;
  found.num_layers_ahead = 0;
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
  const int64_t length = found.length_of(layer);
  require(num_tokens >= 0 && num_tokens <= length,
          "tail_slots: num_tokens must be in [0, ",
          length,
          "], got ",
          num_tokens);
  std::vector<int64_t> positions(num_tokens);
  std::iota(positions.begin(), positions.end(), length - num_tokens);
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
