#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace redknot {

// Memory for large results, kept when it is given back: the next layer's results have the same
// sizes, and fresh memory has to be mapped and cleared by the system first, which takes a tenth of
// a prefill and more in a virtual machine. On huge pages. Safe to use from several threads.
class KeptMemory {
 public:
  // Of what is not in use at most `max_bytes` are kept; what was given back first goes first.
  explicit KeptMemory(int64_t max_bytes) : max_bytes_(max_bytes) {}
  ~KeptMemory();
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;

  // At least `bytes` > 0, not initialised, aligned to a huge page. Throws std::bad_alloc.
  void* take(int64_t bytes);
  // What `take` has returned.
  void give_back(void* data);

  int64_t kept_bytes() const;

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };

  mutable std::mutex mutex_;
  int64_t max_bytes_;
  int64_t kept_bytes_ = 0;
  std::vector<Block> kept_;  // by when they were given back
  std::vector<Block> used_;
};

}  // namespace redknot
