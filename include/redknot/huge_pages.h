#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace redknot {

// Asks for huge pages under memory that nobody has written to yet: fewer faults on the first touch,
// fewer misses of the TLB later. The system may say no, and nothing but speed depends on it.
inline void advise_huge_pages(uintptr_t address, uint64_t num_bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + num_bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)num_bytes;
#endif
}

}  // namespace redknot
