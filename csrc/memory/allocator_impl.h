#pragma once

#include <cstdint>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "page_pool.h"
#include "redknot/segment_allocator.h"
#include "require.h"
#include "row.h"

namespace redknot {

namespace memory {

// Positions are int32 in a PageRef.
constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();

struct Segment {
  int64_t num_tokens = 0;
  int64_t first_position = 0;
  int64_t pages_per_row = 0;
  std::vector<int32_t> pages;  // [num_layers * num_kv_heads, pages_per_row]

  // Tokens in the page; only the last one may be partly filled.
  int32_t num_valid(int64_t index_in_row, int64_t page_size) const {
    const int64_t rest = num_tokens - index_in_row * page_size;
    return static_cast<int32_t>(rest < page_size ? rest : page_size);
  }
};

struct Session {
  std::vector<Row> rows;  // [num_layers * num_kv_heads], layer-major
  int64_t length = 0;     // logical tokens
  uint64_t last_batch = 0;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace memory

// The state behind the lock. The calls are spread over segment_allocator.cpp (segments, sessions,
// reading), append.cpp (growing), make_writable.cpp and statistics.cpp.
struct SegmentAllocator::Impl {
  explicit Impl(AllocatorConfig given)
      : config(std::move(given)),
        pool(config.num_pages, config.poison),
        in_segment(config.num_pages, 0),
        tally(config.num_pages, 0) {}

  int64_t num_rows() const { return int64_t{config.num_layers} * config.num_kv_heads; }

  memory::Segment& find_segment(const char* caller, SegmentId id) {
    return find(caller, "segment", segments, id);
  }
  memory::Session& find_session(const char* caller, SessionId id) {
    return find(caller, "session", sessions, id);
  }
  // Points `batch` at the sessions; one that is given twice is an error.
  void find_batch(const char* caller, const std::vector<SessionId>& ids);
  void require_layer(const char* caller, int64_t layer) const {
    memory::require(layer >= 0 && layer < config.num_layers,
                    caller,
                    ": layer must be in [0, ",
                    config.num_layers,
                    "), got ",
                    layer);
  }
  // Slots of rising positions in every row of one layer: [positions.size(), num_kv_heads].
  std::vector<int64_t> layer_slots(const memory::Session& session,
                                   int64_t layer,
                                   const std::vector<int64_t>& positions) const;

  struct PageCount {
    int64_t held = 0;
    int64_t held_alone = 0;
  };
  PageCount count_pages(const memory::Session& session);

  const AllocatorConfig config;
  std::mutex mutex;
  memory::PagePool pool;
  std::vector<uint8_t> in_segment;  // [num_pages], whether a segment holds the page
  std::unordered_map<SegmentId, memory::Segment> segments;
  std::unordered_map<SessionId, memory::Session> sessions;
  // One counter for both kinds, so that an id of the wrong kind is never taken for another.
  int64_t next_id = 1;

  // Scratch, kept for its capacity: a decode step allocates nothing.
  uint64_t num_batches = 0;
  std::vector<memory::Session*> batch;
  std::vector<const memory::Row*> copied_tails;
  std::vector<int32_t> tally;  // [num_pages], all zero between calls

 private:
  template <typename Map>
  typename Map::mapped_type& find(const char* caller, const char* kind, Map& map, int64_t id) {
    const auto found = map.find(id);
    memory::require(found != map.end(),
                    caller,
                    ": ",
                    kind,
                    " ",
                    id,
                    " is unknown (never created, or already released)");
    return found->second;
  }
};

}  // namespace redknot
