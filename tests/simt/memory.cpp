// Buffers of the device, shared memory, and accesses to what is neither.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <sstream>

#include "machine.hpp"

namespace simt {
namespace {

void on_fault(int, siginfo_t* info, void*) {
  Machine& machine = Machine::get();
  if (machine.running()) machine.fault(info->si_addr);
  signal(SIGSEGV, SIG_DFL);  // not ours: the access is repeated and ends the process
}

}  // namespace

void install_fault_handler() {
  static bool installed = false;
  if (installed) return;
  installed = true;
  static char stack[64 << 10];  // the fiber's own may be what has overflowed
  stack_t alternate = {};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof(stack);
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

Region::Region(std::string region_name, size_t region_bytes)
    : name(std::move(region_name)), num_bytes(region_bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t padded = (num_bytes + 15) & ~size_t{15};
  const size_t inner = std::max(page, (padded + page - 1) / page * page);
  mapping_bytes = inner + 2 * page;
  void* memory =
      mmap(nullptr, mapping_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping = static_cast<char*>(memory);
  mprotect(mapping, page, PROT_NONE);
  mprotect(mapping + page + inner, page, PROT_NONE);
  std::memset(mapping + page, 0xff, inner);
  begin = mapping + page + inner - padded;
  Machine::get().regions[begin] = this;
}

Region::~Region() {
  Machine::get().regions.erase(begin);
  munmap(mapping, mapping_bytes);
}

void check_global(const void* address, size_t num_bytes, const Where& where) {
  const char* at = static_cast<const char*>(address);
  const auto& regions = Machine::get().regions;
  auto next = regions.upper_bound(at);
  if (next != regions.begin()) {
    const Region& region = *std::prev(next)->second;
    if (at + num_bytes <= region.begin + region.num_bytes) return;
  }
  throw Error(Machine::get().here() + "global access outside every buffer at " + name_of(where));
}

void check(bool condition, const char* message, const Where& where) {
  if (!condition) throw Error(Machine::get().here() + message + " at " + name_of(where));
}

void Machine::check_smem(const void* address,
                         size_t num_bytes,
                         size_t alignment,
                         const Where& where) const {
  const char* at = static_cast<const char*>(address);
  const char* begin = reinterpret_cast<const char*>(smem_.data() + smem_.size() - smem_bytes_);
  if (at < begin || at + num_bytes > begin + smem_bytes_) {
    throw Error(here() + "access outside shared memory at " + name_of(where));
  }
  if (reinterpret_cast<uintptr_t>(at) % alignment != 0) {
    throw Error(here() + "misaligned access to shared memory at " + name_of(where));
  }
}

// In the signal handler: leaves the fiber for good.
void Machine::fault(void* address) {
  std::ostringstream text;
  text << here();
  if (is_stack_guard(address)) {
    text << "stack overflow";
  } else {
    text << "access to memory that is no buffer's";
    const char* at = static_cast<const char*>(address);
    for (const auto& [begin, region] : regions) {
      if (at >= region->mapping && at < region->mapping + region->mapping_bytes) {
        text << ", " << (at < begin ? begin - at : at - begin - region->num_bytes)
             << (at < begin ? " bytes before the begin of " : " bytes behind the end of ")
             << region->name;
      }
    }
  }
  fault_ = text.str();
  siglongjmp(fault_exit_, 1);
}

}  // namespace simt
