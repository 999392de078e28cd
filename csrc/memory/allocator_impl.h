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

constexpr int32_t kNoPage = -1;  // in a segment: nothing of it lies in the pool

struct Segment {
  int64_t num_tokens = 0;
  int64_t first_position = 0;
  int64_t pages_per_row = 0;
  std::vector<int32_t> pages;  // [num_layers * num_kv_heads, pages_per_row], or kNoPage

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
  int64_t num_absent = 0;  // references whose page is swapped out
  // In the middle of append_layer: so many tokens more, in the first so many layers.
  int64_t num_ahead = 0;
  int64_t num_layers_ahead = 0;

  int64_t length_of(int64_t layer) const {
    return length + (layer < num_layers_ahead ? num_ahead : 0);
  }
};

// A reference to swapped contents: its page is the slot, told from a page by its sign.
constexpr int32_t absent_page(int32_t slot) { return -1 - slot; }
constexpr int32_t slot_of(int32_t page) { return -1 - page; }
constexpr bool is_absent(const PageRef& ref) { return ref.page < 0; }

// Numbers for contents outside the pool, each with as many holders as the page had.
struct SlotCounts {
  std::vector<int32_t> holders;
  std::vector<int32_t> free;

  int32_t take(int32_t num_holders) {
    if (free.empty()) {
      free.push_back(static_cast<int32_t>(holders.size()));
      holders.push_back(0);
    }
    const int32_t slot = free.back();
    free.pop_back();
    holders[slot] = num_holders;
    return slot;
  }
  void release(int32_t slot) {
    if (--holders[slot] == 0) free.push_back(slot);
  }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace memory

// The state behind the lock. The calls are spread over segment_pages.cpp, segment_allocator.cpp
// (sessions, reading), append.cpp and append_layer.cpp (growing), make_writable.cpp and
// statistics.cpp.
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
  // A session whose pages are all in the pool.
  memory::Session& find_session(const char* caller, SessionId id) {
    memory::Session& session = find_any_session(caller, id);
    memory::require(session.num_absent == 0, caller, ": session ", id, " is swapped out");
    return session;
  }
  memory::Session& find_any_session(const char* caller, SessionId id) {
    return find(caller, "session", sessions, id);
  }
  // Points `batch` at the sessions; one that is given twice is an error.
  void find_batch(const char* caller, const std::vector<SessionId>& ids, bool swapped_too = false);
  // The same for sessions without a token, which get so many.
  void find_empty_batch(const char* caller,
                        const std::vector<SessionId>& sessions,
                        const std::vector<int64_t>& num_tokens);
  // Every layer of a session has the same tokens.
  void require_whole(const char* caller, SessionId id, const memory::Session& session) const {
    memory::require(session.num_layers_ahead == 0,
                    caller,
                    ": session ",
                    id,
                    " is in the middle of append_layer, at layer ",
                    session.num_layers_ahead);
  }
  void require_rules(const char* caller, const std::vector<HeadRule>& rules) const;
  // One entry for each page that the segment could have.
  void require_page_mask(const char* caller,
                         const memory::Segment& segment,
                         const std::vector<uint8_t>& mask) const;
  // There is a free page, unless there is a hole.
  void make_hole();
  // Leaves in `tally` how often the sessions of `batch` hold each page, and zeroes it again.
  void tally_batch();
  void clear_tally();
  // How many appended tokens the row's last page may take. Only where it ends at the session's end
  // (a window of one token can have expired up to there), holds keys without a rotation offset and
  // belongs to no segment; whether another session shares it does not matter here.
  int64_t room_in_tail(const memory::Row& row, int64_t length) const;
  // Of num_new pages that a row takes one after the other from position `begin` on, the most that
  // it holds at once beyond what it gives back meanwhile.
  int64_t most_at_once(const memory::Row& row, int64_t begin, int64_t num_new) const;
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

  AllocatorConfig config;  // num_pages grows, all else stays
  std::mutex mutex;
  memory::PagePool pool;
  memory::SlotCounts slots;
  std::vector<uint8_t> in_segment;  // [num_pages], whether a segment holds the page, or the hole
  int32_t hole = memory::kNoPage;   // stands for every page that a segment has not
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
