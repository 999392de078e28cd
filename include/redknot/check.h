#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace redknot {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace redknot

// For what a caller can get wrong: the message names op, argument, rule and what arrived.
#define RK_CHECK(condition, ...)     \
  do {                               \
    if (!(condition)) [[unlikely]] { \
      ::redknot::fail(__VA_ARGS__);  \
    }                                \
  } while (false)
