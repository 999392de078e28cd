#pragma once

#include <cstdint>
#include <functional>

namespace redknot {

// How a CPU launcher gets its threads; the counterpart of a CUDA stream. body(begin, end) is called
// for disjoint ranges that cover [0, count), none smaller than `grain` but the last.
struct Executor {
  using Body = std::function<void(int64_t begin, int64_t end)>;

  int64_t num_workers = 1;
  std::function<void(int64_t count, int64_t grain, const Body& body)> parallel_for =
      [](int64_t count, int64_t, const Body& body) { body(0, count); };
};

}  // namespace redknot
