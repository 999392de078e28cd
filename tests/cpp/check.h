#pragma once

#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// A test framework of one page. TEST(name) { ... } registers a test of this executable; a check
// that fails throws, so that it ends its test and lets the others run.
namespace redknot::test {

using Test = std::pair<const char*, void (*)()>;
inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}
struct Registration {
  Registration(const char* name, void (*body)()) { all_tests().emplace_back(name, body); }
};

template <typename... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream text;
  text << file << ":" << line << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace redknot::test

#define TEST(name)                                                         \
  static void name();                                                      \
  static const ::redknot::test::Registration register_##name(#name, name); \
  static void name()
#define CHECK(condition)                                                                  \
  do {                                                                                    \
    if (!(condition)) ::redknot::test::fail(__FILE__, __LINE__, "CHECK(" #condition ")"); \
  } while (false)
#define CHECK_EQ(a, b)                                                            \
  do {                                                                            \
    const auto left = (a);                                                        \
    const auto right = (b);                                                       \
    if (left != right)                                                            \
      ::redknot::test::fail(                                                      \
          __FILE__, __LINE__, "CHECK_EQ(" #a ", " #b "): ", left, " != ", right); \
  } while (false)
#define CHECK_THROWS(expression, words)                                                         \
  try {                                                                                         \
    (void)(expression);                                                                         \
    throw nullptr;                                                                              \
  } catch (const std::exception& error) {                                                       \
    if (std::string(error.what()).find(words) == std::string::npos)                             \
      ::redknot::test::fail(__FILE__, __LINE__, "expected \"", words, "\" in: ", error.what()); \
  } catch (std::nullptr_t) {                                                                    \
    ::redknot::test::fail(__FILE__, __LINE__, #expression " did not throw");                    \
  }

int main() {
  int num_failed = 0;
  for (const auto& [name, body] : ::redknot::test::all_tests()) {
    try {
      body();
      std::printf("ok      %s\n", name);
    } catch (const std::exception& error) {
      ++num_failed;
      std::printf("FAILED  %s\n        %s\n", name, error.what());
    }
  }
  return num_failed == 0 ? 0 : 1;
}
