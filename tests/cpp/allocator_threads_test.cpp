// One allocator, many threads. Run under ThreadSanitizer too when the locking changes.
#include <algorithm>
#include <atomic>
#include <random>
#include <thread>

#include "check.h"
#include "redknot/segment_allocator.h"

namespace {

using namespace redknot;  // NOLINT: one file, one subject

constexpr int32_t kNumPages = 600;

// Appends, forks, refreshes and releases sessions of its own on a segment that all share. Returns
// how often it ran out of pages, which is no error.
int hammer(SegmentAllocator& a, SegmentId shared, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<SessionId> sessions;
  std::vector<PageCopy> copies;
  int num_out_of_pages = 0;
  const auto count = [&](const AllocResult& result) {
    num_out_of_pages += result.status == AllocStatus::kOutOfPages;
  };
  for (int step = 0; step < 1500; ++step) {
    const unsigned action = random() % 8;
    if (sessions.empty() || (action == 0 && sessions.size() < 6)) {
      sessions.push_back(a.create_session({{}, {6, 1}, {9, 0}, {}}));
      a.append_segment(sessions.back(), shared);
      continue;
    }
    const size_t pick = random() % sessions.size();
    const SessionId s = sessions[pick];
    if (action <= 3) {
      const std::vector<int64_t> num_tokens(sessions.size(), 1 + random() % 5);
      count(a.append_tokens(sessions, num_tokens, action == 1, &copies));
    } else if (action == 4) {
      count(a.make_writable(s, {{{1, 0, 1, 0}, {0, a.session_length(s) - 1}}}, &copies));
    } else if (action == 5) {
      sessions.push_back(a.fork_session(s));
      // Not below the shared segment's 10 tokens.
      (void)a.truncate(s, std::max<int64_t>(10, a.session_length(s) - 1));
    } else if (action == 6) {
      SegmentId own = 0;
      const AllocResult made = a.create_segment(5, 2, &own);
      count(made);
      if (made.status == AllocStatus::kOk) {
        a.append_segment(s, own);
        a.release_segment(own);
      }
    } else if (sessions.size() > 3) {
      a.release_session(s);
      sessions.erase(sessions.begin() + static_cast<ptrdiff_t>(pick));
    }
    if (step % 16 == 0) {
      (void)a.rows(sessions, step % 2);
      (void)a.expire(sessions.front());
    }
  }
  for (const SessionId s : sessions) a.release_session(s);
  return num_out_of_pages;
}

TEST(threads_share_one_allocator) {
  std::atomic<int64_t> num_freed = 0;
  SegmentAllocator a({.num_layers = 2,
                      .num_kv_heads = 2,
                      .num_pages = kNumPages,
                      .page_size = 4,
                      .bytes_per_page = 64,
                      .poison = [&](int32_t) { ++num_freed; }});
  SegmentId shared = 0;
  CHECK(a.create_segment(10, 0, &shared).status == AllocStatus::kOk);
  std::atomic<int> num_out_of_pages = 0;
  std::atomic<bool> counts_agree = true;
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] { num_out_of_pages += hammer(a, shared, seed); });
  }
  threads.emplace_back([&] {
    for (int i = 0; i < 300; ++i) {
      const AllocatorStats s = a.stats();
      const int64_t sum =
          s.num_free_pages + s.segment_pages + s.session_global_pages + s.session_local_pages;
      if (sum != kNumPages || s.segment_pages < 12) counts_agree = false;
    }
  });
  for (std::thread& thread : threads) thread.join();
  CHECK(counts_agree);
  CHECK(num_out_of_pages > 0);  // else the pool was too large for this test
  CHECK_EQ(a.free_pages(), kNumPages - 12);
  a.release_segment(shared);
  CHECK_EQ(a.free_pages(), kNumPages);
  CHECK(num_freed >= kNumPages);
  CHECK_EQ(a.stats().num_sessions, 0);
}

}  // namespace
