#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "redknot/paged_kv.h"

namespace redknot {

// Running out of pages is an ordinary, named result; whatever was asked then changed nothing.
enum class AllocStatus : int8_t { kOk, kOutOfPages };

struct [[nodiscard]] AllocResult {
  AllocStatus status = AllocStatus::kOk;
  int64_t pages_needed = 0;
  int64_t pages_free = 0;  // before the call
};

using SegmentId = int64_t;
using SessionId = int64_t;

struct AllocatorConfig {
  int32_t num_layers = 0;
  int32_t num_kv_heads = 0;
  int32_t num_pages = 0;    // the whole budget; a page holds the K and the V of its slots
  int32_t page_size = 0;    // token slots per page
  int64_t bytes_per_page = 0;  // K and V together, for the statistics
  // Called with each page that becomes free (fills it with NaN in debug and test builds); may be
  // empty. Runs under the allocator's lock: it must not call back.
  std::function<void(int32_t page)> poison;
};

// What a (layer, KV head) of a session keeps. `window` < 0: everything (a global head).
struct HeadRule {
  int32_t window = kGlobalWindow;
  int32_t sink = 0;
};

// Tokens of some rows that are about to be written: head_mask [num_layers * num_kv_heads] names
// the rows, positions (sorted, unique) the tokens. A row appears in one request of a call.
struct WriteRequest {
  std::vector<uint8_t> head_mask;
  std::vector<int64_t> positions;
};

struct PageCopy {
  int32_t source;
  int32_t destination;
};

// Rows of one layer for a batch of sessions, in the order of the ops: row = session * heads + head.
struct RowTable {
  std::vector<int32_t> row_indptr;   // [num_sessions * num_kv_heads + 1]
  std::vector<PageRef> page_refs;    // [num_refs]
};

struct AllocatorStats {
  int64_t num_pages, num_free_pages;
  int64_t segment_pages;         // held by segments, shared or not
  int64_t session_global_pages;  // held by sessions alone, in rows of global heads
  int64_t session_local_pages;   // held by sessions alone, in rows of local heads
  int64_t shared_pages;          // held by more than one owner (segments and sessions)
  int64_t num_segments, num_sessions;
  int64_t bytes_per_page;
};

// Pages, head segments and session rows of one device. Thread-safe: one lock, short sections.
//
// A *segment* is a run of tokens whose KV was computed once at positions
// [first_position, first_position + num_tokens); it owns one list of pages per (layer, KV head).
// A *session* holds one row per (layer, KV head): an ordered list of PageRefs. Rows share the pages
// of segments (reference counts); writing to a shared page first copies it (refresh, append).
class SegmentAllocator {
 public:
  explicit SegmentAllocator(AllocatorConfig config);
  ~SegmentAllocator();

  // --- segments -------------------------------------------------------------------------------
  // Takes num_layers * num_kv_heads * ceil(num_tokens / page_size) pages, or none.
  AllocResult create_segment(int64_t num_tokens, int64_t first_position, SegmentId* segment);
  // Drops the segment's own reference; pages shared with sessions stay until those let go.
  void release_segment(SegmentId segment);
  // Slots (page * page_size + slot) of every token of one layer: [num_tokens, num_kv_heads].
  std::vector<int64_t> segment_slots(SegmentId segment, int64_t layer) const;

  // --- sessions -------------------------------------------------------------------------------
  // rules: [num_layers * num_kv_heads], layer-major.
  SessionId create_session(const std::vector<HeadRule>& rules);
  void release_session(SessionId session);
  // A second session that shares every page of the first (copy on write).
  SessionId fork_session(SessionId session);
  int64_t session_length(SessionId session) const;  // logical tokens, expired ones included

  // Puts a segment's tokens at the session's end, in every row, without copying a byte. Its keys
  // get rotation_offset = session_length - segment.first_position. Costs no page.
  void append_segment(SessionId session, SegmentId segment);

  // Makes room for num_tokens new tokens in every row, at rotation offset 0; atomic over all given
  // sessions (num_tokens[i] for sessions[i]). With expire_first the pages that left the windows of
  // local heads are dropped first, so that this very call can use them (decode); without, rows
  // keep them for queries inside the documents (prefill). A tail page shared with a fork is
  // copied: the caller must execute `copies` before it writes.
  AllocResult append_tokens(const std::vector<SessionId>& sessions,
                            const std::vector<int64_t>& num_tokens, bool expire_first,
                            std::vector<PageCopy>* copies);
  // Slots of the last num_tokens tokens of a session: [num_tokens, num_kv_heads]; -1 where the
  // row no longer holds the token.
  std::vector<int64_t> tail_slots(SessionId session, int64_t layer, int64_t num_tokens) const;

  // Makes the pages that hold the requested tokens private to the session, atomic over all
  // requests. Pages keep their shape, positions and rotation offset. A page whose valid slots are
  // all requested is replaced without a copy; others are copied (`copies`).
  AllocResult make_writable(SessionId session, const std::vector<WriteRequest>& requests,
                            std::vector<PageCopy>* copies);
  // Slots of the given positions (sorted, unique) in one layer, [num_positions, num_kv_heads];
  // -1 where the row does not hold the position.
  std::vector<int64_t> position_slots(SessionId session, int64_t layer,
                                      const std::vector<int64_t>& positions) const;

  // Frees the pages that no later query of a local row can see: neither sink nor within the window
  // of the next token (position session_length). Returns how many pages became free.
  int64_t expire(SessionId session);
  // Gives back tokens from the end (crop): logical length becomes `length`. Local rows must still
  // hold everything the shorter session would see; else nothing changes and false is returned.
  bool truncate(SessionId session, int64_t length);

  // --- reading ----------------------------------------------------------------------------------
  RowTable rows(const std::vector<SessionId>& sessions, int64_t layer) const;
  int64_t session_pages(SessionId session) const;          // pages referenced, shared ones too
  int64_t session_private_pages(SessionId session) const;  // pages nobody else holds
  int64_t free_pages() const;
  AllocatorStats stats() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace redknot
