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
  // Pages the call takes beyond those it gives back itself (the expiry of append_tokens): out of
  // pages when more than pages_free, else free_pages() went down by it, or up where negative.
  int64_t pages_needed = 0;
  int64_t pages_free = 0;  // before the call
};

using SegmentId = int64_t;
using SessionId = int64_t;

struct AllocatorConfig {
  int32_t num_layers = 0;
  int32_t num_kv_heads = 0;
  int32_t num_pages = 0;       // the whole budget; a page holds the K and the V of its slots
  int32_t page_size = 0;       // token slots per page
  int64_t bytes_per_page = 0;  // K and V together, for the statistics
  // Called with each page that becomes free (fills it with NaN in debug and test builds); may be
  // empty. Runs under the allocator's lock: it must not call back, and must not throw.
  std::function<void(int32_t page)> poison;
};

// Whether this build poisons freed pages unless told otherwise (Debug, REDKNOT_POISON_FREED_PAGES).
bool poisons_freed_pages_by_default();

// What a (layer, KV head) of a session keeps. `window` < 0: everything (a global head); 0 is
// refused because a window counts the token itself.
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

// Contents that came back: what the caller kept under `slot` belongs into `page`.
struct SlotMove {
  int32_t slot;
  int32_t page;
};

// Rows of one layer for a batch of sessions, in the order of the ops: row = session * heads + head.
struct RowTable {
  std::vector<int32_t> row_indptr;  // [num_sessions * num_kv_heads + 1]
  std::vector<PageRef> page_refs;   // [num_refs]
};

// Each page counts once: free + segment + session_global + session_local = num_pages.
struct AllocatorStats {
  int64_t num_pages = 0;
  int64_t num_free_pages = 0;
  int64_t segment_pages = 0;         // held by segments, shared or not, and the hole
  int64_t session_global_pages = 0;  // held by sessions alone, in a row of a global head
  int64_t session_local_pages = 0;   // held by sessions alone, in rows of local heads
  int64_t shared_pages = 0;          // of those: held by more than one owner (segment, session)
  int64_t swapped_pages = 0;  // outside the pool: contents that sessions left with the caller
  int64_t num_segments = 0;
  int64_t num_sessions = 0;
  int64_t bytes_per_page = 0;
};

// Pages, head segments and session rows of one device. Thread-safe: one lock, short sections.
//
// A *segment* is a run of tokens whose KV was computed once at positions
// [first_position, first_position + num_tokens); it owns one list of pages per (layer, KV head).
// A *session* holds one row per (layer, KV head): an ordered list of PageRefs. Rows share the pages
// of segments (reference counts); writing to a shared page first copies it (refresh, append).
//
// A broken rule (unknown or released id, wrong size, negative count, unsorted positions) throws
// std::invalid_argument that names the call, the argument, the rule and what arrived; nothing has
// changed then.
class SegmentAllocator {
 public:
  explicit SegmentAllocator(AllocatorConfig config);
  ~SegmentAllocator();

  // --- segments -------------------------------------------------------------------------------
  // Takes num_layers * num_kv_heads * ceil(num_tokens / page_size) pages, or none; with `present`,
  // [rows, pages of a row], only those that it names. num_tokens >= 1.
  AllocResult create_segment(int64_t num_tokens,
                             int64_t first_position,
                             SegmentId* segment,
                             const std::vector<uint8_t>& present = {});
  // Drops the segment's own reference; pages shared with sessions stay until those let go.
  void release_segment(SegmentId segment);
  // Lets pages of a segment go (`mask` as `present`), and returns by how many free_pages() grew;
  // sessions that share them keep them. In sessions that attach the segment afterwards the *hole*
  // stands for them: one page that counts as a segment's, is taken when it is first needed, never
  // given back, and never written. Nothing is dropped where no page is left for it.
  int64_t drop_segment_pages(SegmentId segment, const std::vector<uint8_t>& mask);
  // Takes new pages, with whatever contents, where `mask` names some that the segment has not; all
  // of them or none. Sessions that were attached before keep the hole.
  AllocResult restore_segment_pages(SegmentId segment, const std::vector<uint8_t>& mask);
  // The hole's page, or -1 while there is none.
  int32_t hole_page() const;
  // Slots (page * page_size + slot) of every token of one layer: [num_tokens, num_kv_heads]; -1
  // where the segment has no page.
  std::vector<int64_t> segment_slots(SegmentId segment, int64_t layer) const;

  // --- sessions -------------------------------------------------------------------------------
  // rules: [num_layers * num_kv_heads], layer-major.
  SessionId create_session(const std::vector<HeadRule>& rules);
  void release_session(SessionId session);
  // A second session that shares every page of the first (copy on write).
  SessionId fork_session(SessionId session);
  int64_t session_length(SessionId session) const;  // logical tokens, expired ones included

  // Puts a segment's tokens at the session's end, in every row, without copying a byte. Its keys
  // get rotation_offset = session_length - segment.first_position. Costs no page. Tokens behind it
  // start a page of their own.
  void append_segment(SessionId session, SegmentId segment);

  // Makes room for num_tokens new tokens in every row, at rotation offset 0; atomic over all given
  // sessions (num_tokens[i] for sessions[i]). With expire_first the pages that left the windows of
  // local heads are dropped first, so that this very call can use them (decode); without, rows
  // keep them for queries inside the documents (prefill). A tail page shared with a fork is
  // copied: the caller must execute `copies` (cleared first) before it writes. A session may be
  // given once.
  AllocResult append_tokens(const std::vector<SessionId>& sessions,
                            const std::vector<int64_t>& num_tokens,
                            bool expire_first,
                            std::vector<PageCopy>* copies);
  // The first prompt of empty sessions, one layer after the other: num_tokens[i] tokens in the rows
  // of `layer` of sessions[i], the same numbers in each layer, layers in order. Where a layer has
  // attended, expire_layer frees what later tokens do not see of it, so that the local heads of one
  // layer alone hold a whole prompt. The last layer makes num_tokens[i] the session's length; until
  // then it can only be read, truncated, forked and released. Atomic over the sessions.
  AllocResult append_layer(const std::vector<SessionId>& sessions,
                           const std::vector<int64_t>& num_tokens,
                           int64_t layer);
  int64_t expire_layer(SessionId session, int64_t layer);
  // The most pages that empty sessions hold at once while a prompt of theirs goes through all
  // layers so.
  int64_t layerwise_pages(const std::vector<SessionId>& sessions,
                          const std::vector<int64_t>& num_tokens) const;
  // Slots of the last num_tokens tokens of a session: [num_tokens, num_kv_heads]; -1 where the
  // row no longer holds the token.
  std::vector<int64_t> tail_slots(SessionId session, int64_t layer, int64_t num_tokens) const;

  // Makes the pages that hold the requested tokens private to the session, atomic over all
  // requests. Pages keep their shape, positions and rotation offset. A page whose valid slots are
  // all requested is replaced without a copy, unless `keep_contents` (some of them may be read, or
  // not be written after all); others are copied (`copies`, cleared first). Positions that a row
  // has expired are ignored.
  AllocResult make_writable(SessionId session,
                            const std::vector<WriteRequest>& requests,
                            std::vector<PageCopy>* copies,
                            bool keep_contents = false);
  // Slots of the given positions (sorted, unique) in one layer, [num_positions, num_kv_heads];
  // -1 where the row does not hold the position.
  std::vector<int64_t> position_slots(SessionId session,
                                      int64_t layer,
                                      const std::vector<int64_t>& positions) const;

  // Frees the pages that no later query of a local row can see: neither sink nor within the window
  // of the next token (position session_length). Returns how many pages became free.
  int64_t expire(SessionId session);
  // Gives back tokens from the end (crop): logical length becomes `length`. Local rows must still
  // hold everything the shorter session would see; else nothing changes and false is returned.
  bool truncate(SessionId session, int64_t length);

  // Gives every row another rule. Rows drop what the new rules no longer see, as expire() does, and
  // *num_freed tells how many pages became free. Where a row no longer holds what its new rule
  // would see, nothing changes and the first such row's index is returned; else -1.
  int64_t change_rules(SessionId session, const std::vector<HeadRule>& rules, int64_t* num_freed);

  // --- out of the pool and back -----------------------------------------------------------------
  // Preemption. The pages that nobody but these sessions holds, rising: what swap_out would free.
  std::vector<int32_t> exclusive_pages(const std::vector<SessionId>& sessions) const;
  // Frees exactly these pages (from exclusive_pages; the caller has copied their contents out
  // first) and returns a slot number for each, under which the caller keeps the contents; small
  // numbers, used again once their sessions are gone. Until swap_in a session with swapped pages
  // can only be released, swapped and asked for its length and its pages.
  std::vector<int32_t> swap_out(const std::vector<SessionId>& sessions,
                                const std::vector<int32_t>& pages);
  // Takes a page for each slot of the session, or none. `moves` (cleared first) tells which slot's
  // contents the caller must write to which page; these slots are free then. Forks that were
  // swapped out together share the pages again.
  AllocResult swap_in(SessionId session, std::vector<SlotMove>* moves);

  // Adds pages behind the present ones; the storage behind `poison` must hold them already.
  void grow(int32_t num_pages, std::function<void(int32_t page)> poison);

  // --- reading ----------------------------------------------------------------------------------
  // Upper bound of the pages by which the pool can become emptier while num_tokens[i] more tokens
  // are decoded in sessions[i]; what leaves the windows of local rows is counted in.
  int64_t growth_pages(const std::vector<SessionId>& sessions,
                       const std::vector<int64_t>& num_tokens) const;
  RowTable rows(const std::vector<SessionId>& sessions, int64_t layer) const;
  int64_t session_pages(SessionId session) const;          // distinct pages, shared ones too
  int64_t session_private_pages(SessionId session) const;  // pages nobody else holds
  int64_t session_swapped_pages(SessionId session) const;  // what swap_in takes
  int64_t free_pages() const;
  AllocatorStats stats() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace redknot
