#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "redknot/cpu.h"

namespace redknot::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

// Best last.
constexpr Isa kIsas[] = {
    {"default", &isa_default::kKernels, [] { return true; }},
    {"avx2",
     &isa_avx2::kKernels,
     [] {
       return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
              __builtin_cpu_supports("f16c") != 0;
     }},
    {"avx512",
     &isa_avx512::kKernels,
     [] {
       return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
              __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
              __builtin_cpu_supports("avx512bf16") != 0;
     }},
};

const Isa* best_isa() {
  __builtin_cpu_init();
  const Isa* best = &kIsas[0];
  for (const Isa& isa : kIsas) {
    if (isa.supported()) best = &isa;
  }
  return best;
}

std::atomic<const Isa*>& current_isa() {
  static std::atomic<const Isa*> isa{best_isa()};
  return isa;
}

}  // namespace

const Kernels& kernels() { return *current_isa().load(std::memory_order_relaxed)->kernels; }

const char* isa_name() { return current_isa().load(std::memory_order_relaxed)->name; }

bool use_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.supported()) {
      current_isa().store(&isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace redknot::cpu
