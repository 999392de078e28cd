#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace redknot::memory {

// Arguments are checked once, where a call enters the room. A broken rule is a bug of the caller
// and raises; the message names the function, the argument, the rule and what arrived.
template <typename... Parts>
void require(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

// Positions of existing tokens, rising and unique: every search over them relies on it.
inline void require_positions(const char* caller,
                              const std::vector<int64_t>& positions,
                              int64_t length) {
  for (size_t i = 0; i < positions.size(); ++i) {
    require(positions[i] >= 0 && positions[i] < length,
            caller,
            ": positions must be in [0, ",
            length,
            "), got ",
            positions[i],
            " at index ",
            i);
    require(i == 0 || positions[i - 1] < positions[i],
            caller,
            ": positions must be sorted and unique, got ",
            positions[i],
            " at index ",
            i,
            " behind ",
            i == 0 ? 0 : positions[i - 1]);
  }
}

}  // namespace redknot::memory
