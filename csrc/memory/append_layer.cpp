// A first prompt layer by layer: while one layer attends, its local heads hold the whole prompt,
// and those of the layers before it only what later tokens will see.
#include <algorithm>

#include "allocator_impl.h"
#include "redknot/segment_allocator.h"

namespace redknot {

using memory::ceil_div;
using memory::kMaxLength;
using memory::require;
using memory::Row;
using memory::Session;

void SegmentAllocator::Impl::find_empty_batch(const char* caller,
                                              const std::vector<SessionId>& sessions,
                                              const std::vector<int64_t>& num_tokens) {
  require(sessions.size() == num_tokens.size(),
          caller,
          ": num_tokens must have one entry per session, got ",
          num_tokens.size(),
          " for ",
          sessions.size(),
          " sessions");
  find_batch(caller, sessions);
  for (size_t i = 0; i < batch.size(); ++i) {
    require(batch[i]->length == 0,
            caller,
            ": session ",
            sessions[i],
            " must be empty, it has ",
            batch[i]->length,
            " tokens");
    require(num_tokens[i] >= 0 && num_tokens[i] <= kMaxLength,
            caller,
            ": num_tokens[",
            i,
            "] must be in [0, ",
            kMaxLength,
            "], got ",
            num_tokens[i]);
  }
}

AllocResult SegmentAllocator::append_layer(const std::vector<SessionId>& sessions,
                                           const std::vector<int64_t>& num_tokens,
                                           int64_t layer) {
  const std::lock_guard lock(impl_->mutex);
  Impl& impl = *impl_;
  impl.find_empty_batch("append_layer", sessions, num_tokens);
  impl.require_layer("append_layer", layer);
  AllocResult result;
  const int64_t num_heads = impl.config.num_kv_heads;
  const int64_t page_size = impl.config.page_size;
  for (size_t i = 0; i < sessions.size(); ++i) {
    const Session& session = *impl.batch[i];
    require(session.num_layers_ahead == layer,
            "append_layer: session ",
            sessions[i],
            " has come to layer ",
            session.num_layers_ahead,
            ", got layer ",
            layer);
    require(layer == 0 || session.num_ahead == num_tokens[i],
            "append_layer: num_tokens[",
            i,
            "] must be ",
            session.num_ahead,
            " as in layer 0, got ",
            num_tokens[i]);
    result.pages_needed += num_heads * ceil_div(num_tokens[i], page_size);
  }
  result.pages_free = impl.pool.num_free();
  if (result.pages_needed > result.pages_free) {
    result.status = AllocStatus::kOutOfPages;
    return result;
  }
  for (size_t i = 0; i < sessions.size(); ++i) {
    Session& session = *impl.batch[i];
    for (int64_t head = 0; head < num_heads; ++head) {
      Row& row = session.rows[layer * num_heads + head];
      row.reserve_back(ceil_div(num_tokens[i], page_size));
      for (int64_t done = 0; done < num_tokens[i]; done += page_size) {
        row.push_back({.page = impl.pool.take(),
                       .first_position = static_cast<int32_t>(done),
                       .num_valid = static_cast<int32_t>(std::min(page_size, num_tokens[i] - done)),
                       .rotation_offset = 0});
      }
    }
    session.num_ahead = num_tokens[i];
    session.num_layers_ahead = layer + 1;
    if (layer + 1 == impl.config.num_layers) {
      session.length = session.num_ahead;
      session.num_ahead = 0;
      session.num_layers_ahead = 0;
    }
  }
  return result;
}

int64_t SegmentAllocator::expire_layer(SessionId session, int64_t layer) {
  const std::lock_guard lock(impl_->mutex);
  impl_->require_layer("expire_layer", layer);
  Session& found = impl_->find_session("expire_layer", session);
  const int64_t num_heads = impl_->config.num_kv_heads;
  int64_t num_freed = 0;
  for (int64_t head = 0; head < num_heads; ++head) {
    Row& row = found.rows[layer * num_heads + head];
    const std::span<const PageRef> expired = row.expired(found.length_of(layer));
    for (const PageRef& ref : expired) num_freed += impl_->pool.release(ref.page);
    row.drop_expired(expired.size());
  }
  return num_freed;
}

int64_t SegmentAllocator::layerwise_pages(const std::vector<SessionId>& sessions,
                                          const std::vector<int64_t>& num_tokens) const {
  const std::lock_guard lock(impl_->mutex);
  Impl& impl = *impl_;
  impl.find_empty_batch("layerwise_pages", sessions, num_tokens);
  const int64_t num_heads = impl.config.num_kv_heads;
  const int64_t page_size = impl.config.page_size;
  int64_t kept = 0;
  int64_t most = 0;
  for (int64_t layer = 0; layer < impl.config.num_layers; ++layer) {
    int64_t whole = 0;
    int64_t stays = 0;
    for (size_t i = 0; i < sessions.size(); ++i) {
      const int64_t num_pages = ceil_div(num_tokens[i], page_size);
      for (int64_t head = 0; head < num_heads; ++head) {
        const HeadRule& rule = impl.batch[i]->rows[layer * num_heads + head].rule();
        whole += num_pages;
        if (rule.window < 0) {
          stays += num_pages;
          continue;
        }
        // Pages that end before what the next token sees go, unless they hold a sink position.
        const int64_t first_seen = std::max<int64_t>(num_tokens[i] - rule.window + 1, 0);
        const int64_t pinned = std::min(ceil_div(rule.sink, page_size), num_pages);
        stays += num_pages - std::max<int64_t>(first_seen / page_size - pinned, 0);
      }
    }
    most = std::max(most, kept + whole);
    kept += stays;
  }
  return std::max(most, kept);
}

}  // namespace redknot
