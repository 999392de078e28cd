#pragma once

#include <cstdint>

namespace redknot::cpu::REDKNOT_ISA {

// Cuts a scratch buffer into 64-byte aligned arrays.
class Carver {
 public:
  explicit Carver(float* scratch) : scratch_(scratch) {}
  static constexpr int64_t rounded(int64_t count) { return (count + 15) / 16 * 16; }
  template <typename T = float>
  T* take(int64_t count) {
    static_assert(sizeof(T) == sizeof(float));
    float* begin = scratch_;
    scratch_ += rounded(count);
    return reinterpret_cast<T*>(begin);
  }

 private:
  float* scratch_;
};

}  // namespace redknot::cpu::REDKNOT_ISA
