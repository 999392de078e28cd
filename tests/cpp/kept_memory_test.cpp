#include "redknot/kept_memory.h"

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"

using redknot::KeptMemory;

namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

TEST(what_was_given_back_is_taken_again) {
  KeptMemory memory(64 * kMiB);
  void* large = memory.take(16 * kMiB);
  void* small = memory.take(5 * kMiB);
  CHECK(large != small);
  CHECK_EQ(memory.kept_bytes(), 0);
  memory.give_back(large);
  memory.give_back(small);
  CHECK_EQ(memory.kept_bytes(), 22 * kMiB);    // whole huge pages
  CHECK_EQ(memory.take(5 * kMiB + 1), small);  // the smallest that holds it
  CHECK_EQ(memory.take(8 * kMiB), large);      // half of a block at least
  void* other = memory.take(kMiB);
  memory.give_back(other);
  memory.give_back(large);
  memory.give_back(small);
  void* tiny = memory.take(3 * kMiB);
  CHECK_EQ(tiny, small);
  void* huge = memory.take(17 * kMiB);
  CHECK(huge != large);
  memory.give_back(tiny);
  memory.give_back(huge);
}

TEST(no_more_is_kept_than_allowed) {
  KeptMemory memory(12 * kMiB);
  std::vector<void*> blocks;
  for (int i = 0; i < 4; ++i) blocks.push_back(memory.take(4 * kMiB));
  for (void* block : blocks) memory.give_back(block);
  CHECK_EQ(memory.kept_bytes(), 12 * kMiB);
  void* last = memory.take(4 * kMiB);
  CHECK_EQ(last, blocks[3]);  // what went first was given back first
  memory.give_back(last);
  void* huge = memory.take(14 * kMiB);
  std::memset(huge, 1, 14 * kMiB);
  memory.give_back(huge);
  CHECK_EQ(memory.kept_bytes(), 0);
}

TEST(threads_have_memory_of_their_own) {
  KeptMemory memory(8 * kMiB);
  std::vector<std::thread> threads;
  std::atomic<int> disturbed = 0;
  for (int number = 0; number < 4; ++number) {
    threads.emplace_back([&memory, &disturbed, number] {
      for (int i = 0; i < 50; ++i) {
        auto* bytes = static_cast<unsigned char*>(memory.take(2 * kMiB));
        std::memset(bytes, number, 4096);
        std::this_thread::yield();
        for (int b = 0; b < 4096; ++b) disturbed += bytes[b] != number;
        memory.give_back(bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(disturbed.load(), 0);
  CHECK(memory.kept_bytes() <= 8 * kMiB);
}

}  // namespace
