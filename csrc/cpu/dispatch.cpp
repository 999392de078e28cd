#include "dispatch.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

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

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
         __builtin_cpu_supports("avx512bf16") != 0;
}

// The processor has bf16 tiles, and VBMI as all that have them, and the kernel lets this process
// use them. The permission covers every thread, lasts for the life of the process and may be asked
// for again.
bool has_amx() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  constexpr unsigned kBf16Tiles = 1u << 22 | 1u << 24;
  if (!has_avx512() || __builtin_cpu_supports("avx512vbmi") == 0) return false;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kBf16Tiles) != kBf16Tiles) return false;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Best last.
constexpr Isa kIsas[] = {
    {"default", &isa_default::kKernels, [] { return true; }},
    {"avx2",
     &isa_avx2::kKernels,
     [] {
       return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
              __builtin_cpu_supports("f16c") != 0;
     }},
    {"avx512", &isa_avx512::kKernels, has_avx512},
    {"amx", &isa_amx::kKernels, has_amx},
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
