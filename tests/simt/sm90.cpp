// What sm_90 adds: barriers with phases, named barriers, the copy engine, products of a warpgroup.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>

#include "cuda/ptx/matrix_descriptor.h"
#include "machine.hpp"

namespace simt {
namespace ptx = redknot::gpu::ptx;
namespace {

// Where the dynamic part of shared memory begins on the hardware.
constexpr uint32_t kFirstAddress = 1024;
constexpr uint32_t kRowBytes = 128;  // of the swizzle
constexpr int kWarpgroup = 128;
// A signalling NaN: arithmetic on it, which gives a NaN, changes its bits.
constexpr uint32_t kSumUnderWay = 0xffbfffff;

[[noreturn]] void refuse(const std::string& why) { throw Error(Machine::get().here() + why); }

// --- barriers
// -------------------------------------------------------------------------------------
PhaseBarrier& barrier_at(const void* address) {
  auto& barriers = Machine::get().phase_barriers;
  const auto found = barriers.find(address);
  if (found == barriers.end()) refuse("use of an mbarrier that nobody initialised");
  return found->second;
}

void end_phase_if_over(PhaseBarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  Machine::get().publish_fenced();
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  for (Fiber* fiber : barrier.waiters) Machine::get().wake(*fiber);
  barrier.waiters.clear();
}

}  // namespace

void init_barrier(void* barrier, uint32_t arrivals, const Where& where) {
  Machine& machine = Machine::get();
  machine.check_smem(barrier, 8, 8, where);
  if (arrivals == 0) refuse("an mbarrier of no arrivals");
  machine.phase_barriers[barrier] = {.arrivals = arrivals, .missing = arrivals, .waiters = {}};
}

void arrive(void* address, uint32_t bytes, const Where&) {
  PhaseBarrier& barrier = barrier_at(address);
  if (barrier.missing == 0) refuse("more arrivals at an mbarrier than its count");
  barrier.bytes += bytes;
  --barrier.missing;
  end_phase_if_over(barrier);
}

void wait_barrier(void* address, uint32_t parity, const Where& where) {
  Machine& machine = Machine::get();
  if (parity > 1) refuse("a parity is 0 or 1");
  // Asked anew whenever this thread gets to run: who comes two phases late waits, as on the device.
  while (true) {
    PhaseBarrier& barrier = barrier_at(address);
    if (barrier.phase % 2 != parity) return;
    barrier.waiters.push_back(&machine.current());
    machine.block("mbarrier wait", where);
  }
}

void named_barrier(int number, int threads, bool waits, const Where& where) {
  Machine& machine = Machine::get();
  if (number < 1 || number > 15) refuse("named barriers are 1 to 15");
  if (threads <= 0 || threads % 32 != 0) refuse("a named barrier counts whole warps");
  NamedBarrier& barrier = machine.named_barriers[number];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    refuse("threads disagree on how many meet at a named barrier");
  }
  barrier.threads = threads;
  if (++barrier.arrived == threads) {
    machine.publish_fenced();
    for (Fiber* fiber : barrier.waiters) machine.wake(*fiber);
    barrier = {};
    if (waits) machine.yield();  // else the last one would always be the first to go on
  } else if (waits) {
    barrier.waiters.push_back(&machine.current());
    machine.block("named barrier", where);
  }
}

// --- the copy engine
// ------------------------------------------------------------------------------
namespace {

void write_both(char* destination, const char* source, size_t bytes) {
  Machine& machine = Machine::get();
  std::memcpy(destination, source, bytes);
  const size_t offset = reinterpret_cast<unsigned char*>(destination) - machine.smem();
  std::memcpy(machine.async_view.data() + offset, source, bytes);
}

void issue(EngineCopy copy) {
  static const std::vector<char> poison(256 << 10, '\xff');
  barrier_at(copy.barrier);
  write_both(copy.destination, poison.data(), copy.bytes);
  Machine::get().engine_copies.push_back(copy);
}

void land_row(char* destination, const EngineCopy& copy, const std::array<int64_t, 4>& at) {
  const TensorMap& map = copy.map;
  bool is_inside = true;
  int64_t offset = 0;
  for (int i = 1; i < map.rank; ++i) {
    is_inside = is_inside && at[i] >= 0 && at[i] < static_cast<int64_t>(map.size[i]);
    offset += at[i] * static_cast<int64_t>(map.stride_bytes[i]);
  }
  char row[kRowBytes] = {};
  for (int64_t i = 0; is_inside && i < kRowBytes / 2; ++i) {
    const int64_t column = at[0] + i;
    if (column < 0 || column >= static_cast<int64_t>(map.size[0])) continue;
    check_global(map.base + offset + 2 * column, 2, Where::current());
    std::memcpy(row + 2 * i, map.base + offset + 2 * column, 2);
  }
  const uint32_t turn = shared_address(destination) / kRowBytes % 8;
  for (uint32_t v = 0; v < 8; ++v) write_both(destination + 16 * (v ^ turn), row + 16 * v, 16);
}

void land(const EngineCopy& copy) {
  if (copy.source != nullptr) {
    write_both(copy.destination, copy.source, copy.bytes);
  } else {
    const auto& box = copy.map.box;
    char* destination = copy.destination;
    std::array<int64_t, 4> at = {copy.begin[0], 0, 0, 0};
    for (uint32_t w = 0; w < box[3]; ++w) {
      at[3] = int64_t{copy.begin[3]} + w;
      for (uint32_t z = 0; z < box[2]; ++z) {
        at[2] = int64_t{copy.begin[2]} + z;
        for (uint32_t y = 0; y < box[1]; ++y, destination += kRowBytes) {
          at[1] = int64_t{copy.begin[1]} + y;
          land_row(destination, copy, at);
        }
      }
    }
  }
  PhaseBarrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= copy.bytes;
  end_phase_if_over(barrier);
}

}  // namespace

uint32_t shared_address(const void* smem) {
  const auto* at = static_cast<const unsigned char*>(smem);
  return static_cast<uint32_t>(at - Machine::get().smem()) + kFirstAddress;
}

void bulk_load(void* smem, const void* source, uint32_t bytes, void* barrier, const Where& where) {
  Machine::get().check_smem(smem, bytes, 16, where);
  check_global(source, bytes, where);
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    refuse("a bulk copy is of multiples of 16 bytes");
  }
  issue({static_cast<char*>(smem), static_cast<const char*>(source), bytes, {}, {}, barrier});
}

void load_box(void* smem,
              const TensorMap& map,
              void* barrier,
              const std::array<int32_t, 4>& begin,
              int rank,
              const Where& where) {
  if (map.rank != rank) refuse("coordinates of another rank than the tensor map's");
  const uint32_t bytes = kRowBytes * map.box[1] * map.box[2] * map.box[3];
  Machine::get().check_smem(smem, bytes, kRowBytes, where);
  check_global(map.base, 1, where);
  issue({static_cast<char*>(smem), nullptr, bytes, map, begin, barrier});
}

// One copy, or the products that a warpgroup waits for: from the front, from the back or any.
bool Machine::end_something() {
  const size_t num_copies = engine_copies.size();
  const size_t count = num_copies + ready_products.size();
  if (count == 0) return false;
  size_t next = 0;
  if (schedule_.order == Order::kDescending) next = count - 1;
  if (schedule_.order == Order::kRandom) next = random_() % count;
  if (next < num_copies) {
    const EngineCopy copy = engine_copies[next];
    engine_copies.erase(engine_copies.begin() + static_cast<ptrdiff_t>(next));
    land(copy);
  } else {
    const size_t warpgroup = ready_products[next - num_copies];
    ready_products.erase(ready_products.begin() + static_cast<ptrdiff_t>(next - num_copies));
    end_products(warpgroup);
  }
  return true;
}

void Machine::start_block_sm90() {
  phase_barriers.clear();
  named_barriers = {};
  warpgroup_waits.assign(fibers_.size() / kWarpgroup, {});
  engine_copies.clear();
  ready_products.clear();
  is_fence_pending = false;
  async_view.assign(smem_bytes_, 0xff);
}

void Machine::end_block_sm90() const {
  if (!engine_copies.empty()) throw Error("a block exits while the engine copies for it");
}

void fence_async_proxy() { Machine::get().is_fence_pending = true; }

// A fence of each of many threads would be as many copies of shared memory: there is one, where
// threads meet next or a product reads. What is written in between without a fence of its own is
// taken along.
void Machine::publish_fenced() {
  if (!is_fence_pending) return;
  is_fence_pending = false;
  std::memcpy(async_view.data(), smem(), smem_bytes_);
}

// --- wgmma
// ----------------------------------------------------------------------------------------
namespace {

struct MatrixView {
  uint32_t address, leading, stride;

  explicit MatrixView(uint64_t descriptor)
      : address(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
      refuse("a matrix descriptor of another swizzle than 128 bytes");
    }
  }

  // The element at this offset and those behind it, up to a multiple of 16 bytes.
  const unsigned char* at(uint32_t offset) const {
    const Machine& machine = Machine::get();
    uint32_t byte = address + offset;
    byte ^= (byte >> 7 & 7) << 4;
    if (byte < kFirstAddress || byte + 2 > kFirstAddress + machine.smem_bytes()) {
      refuse("a matrix descriptor leads outside shared memory");
    }
    return machine.async_view.data() + byte - kFirstAddress;
  }
  // Row i of A or column i of B.
  const unsigned char* k_major(uint32_t i, uint32_t k) const {
    return at(i / 8 * stride + i % 8 * kRowBytes + 2 * k);
  }
  const unsigned char* mn_major(uint32_t i, uint32_t k) const {
    return at(i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * kRowBytes);
  }
};

float value_of(const unsigned char* element, bool is_bfloat16) {
  uint16_t bits;
  std::memcpy(&bits, element, 2);
  return is_bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

// Of all that a product reads of shared memory.
uint64_t checksum_of_operands(const Product& product) {
  uint64_t sum = 0;
  const auto add = [&sum](const unsigned char* vector) {
    uint64_t words[2];
    std::memcpy(words, vector, sizeof(words));
    for (const uint64_t word : words) sum = (sum ^ word) * 0x9e3779b97f4a7c15u + (sum >> 29);
  };
  if (product.maybe_a == nullptr) {
    const MatrixView a(product.a);
    for (uint32_t i = 0; i < 128; ++i) add(a.k_major(i / 2, i % 2 * 8));
  }
  const MatrixView b(product.b);
  for (uint32_t i = 0; i < 2 * static_cast<uint32_t>(product.n); ++i) {
    add(product.b_is_mn_major ? b.mn_major(i / 16 * 8, i % 16) : b.k_major(i / 2, i % 2 * 8));
  }
  return sum;
}

float half_of(uint32_t pair, int half, bool is_bfloat16) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * half));
  return is_bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

bool same(const PendingProduct& x, const PendingProduct& y) {
  const Product &a = x.product, &b = y.product;
  return a.n == b.n && a.a == b.a && (a.maybe_a == nullptr) == (b.maybe_a == nullptr) &&
         a.b == b.b && a.b_is_mn_major == b.b_is_mn_major && a.adds == b.adds &&
         a.is_bfloat16 == b.is_bfloat16 && x.group == y.group;
}

Accumulator& accumulator_of(Fiber& fiber, const float* d) {
  return *std::find_if(fiber.accumulators.begin(), fiber.accumulators.end(), [&](const auto& a) {
    return a.d == d;
  });
}

// Number `number` of the products that each thread of the warpgroup has pending.
void run_product(size_t first_fiber, size_t number) {
  Machine& machine = Machine::get();
  const auto thread = [&](int t) -> Fiber& { return machine.fiber(first_fiber + t); };
  const Product& first = thread(0).products[number].product;
  const int n = first.n;
  if (checksum_of_operands(first) != thread(0).products[number].checksum) {
    refuse("shared memory changed while a product read it");
  }
  static thread_local float a[64][16], b[16][256], d[64][256];
  if (first.maybe_a == nullptr) {
    const MatrixView view(first.a);
    for (int i = 0; i < 64; ++i) {
      for (int k = 0; k < 16; ++k) a[i][k] = value_of(view.k_major(i, k), first.is_bfloat16);
    }
  } else {
    for (int t = 0; t < kWarpgroup; ++t) {
      const uint32_t* registers = thread(t).products[number].a;
      for (int i = 0; i < 8; ++i) {
        a[ptx::fragment_row(t, i)][ptx::fragment_column(t, i)] =
            half_of(registers[i / 2], i % 2, first.is_bfloat16);
      }
    }
  }
  const MatrixView view(first.b);
  for (int k = 0; k < 16; ++k) {
    for (int j = 0; j < n; ++j) {
      b[k][j] = value_of(first.b_is_mn_major ? view.mn_major(j, k) : view.k_major(j, k),
                         first.is_bfloat16);
    }
  }
  const auto each_sum = [&](auto&& body) {
    for (int t = 0; t < kWarpgroup; ++t) {
      Fiber& fiber = thread(t);
      float* value = accumulator_of(fiber, fiber.products[number].product.d).value.data();
      for (int i = 0; i < n / 2; ++i) {
        body(d[ptx::fragment_row(t, i)][ptx::fragment_column(t, i)], value[i]);
      }
    }
  };
  each_sum([&](float& sum, const float& value) { sum = first.adds ? value : 0.0f; });
  for (int i = 0; i < 64; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < n; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  each_sum([](const float& sum, float& value) { value = sum; });
  ++counters.wgmmas;
}

// Gives a thread's d back once no product on it is left.
void finish_product(Fiber& fiber, const float* d) {
  Accumulator& accumulator = accumulator_of(fiber, d);
  if (--accumulator.num_products > 0) return;
  for (size_t i = 0; i < accumulator.value.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, accumulator.d + i, sizeof(bits));
    if (bits != kSumUnderWay) refuse("the sums of a product were written while it was under way");
    accumulator.d[i] = accumulator.value[i];
  }
  fiber.accumulators.erase(fiber.accumulators.begin() + (&accumulator - fiber.accumulators.data()));
}

void run_products(size_t first_fiber, int pending) {
  Machine& machine = Machine::get();
  const Fiber& first = machine.fiber(first_fiber);
  for (int t = 1; t < kWarpgroup; ++t) {
    const Fiber& other = machine.fiber(first_fiber + t);
    if (!std::equal(first.products.begin(),
                    first.products.end(),
                    other.products.begin(),
                    other.products.end(),
                    same) ||
        first.open_products != other.open_products) {
      refuse("threads of a warpgroup issued different products");
    }
  }
  machine.publish_fenced();
  size_t count = 0;  // groups are ascending
  while (count < first.products.size() &&
         first.products[count].group + static_cast<uint64_t>(pending) < first.open_products) {
    run_product(first_fiber, count++);
  }
  for (int t = 0; t < kWarpgroup; ++t) {
    Fiber& fiber = machine.fiber(first_fiber + t);
    for (size_t i = 0; i < count; ++i) finish_product(fiber, fiber.products[i].product.d);
    fiber.products.erase(fiber.products.begin(),
                         fiber.products.begin() + static_cast<ptrdiff_t>(count));
  }
}

}  // namespace

void wgmma_fence() { Machine::get().current().is_fenced = true; }

void wgmma(const Product& product, const Where& where) {
  Fiber& self = Machine::get().current();
  if (!self.is_fenced) {
    refuse("wgmma at line " + std::to_string(where.line()) + " without wgmma_fence before it");
  }
  const auto known = std::find_if(self.accumulators.begin(),
                                  self.accumulators.end(),
                                  [&](const auto& a) { return a.d == product.d; });
  if (known == self.accumulators.end()) {
    self.accumulators.push_back({product.d, {product.d, product.d + product.n / 2}, 1});
    for (int i = 0; i < product.n / 2; ++i) {
      std::memcpy(product.d + i, &kSumUnderWay, sizeof(kSumUnderWay));
    }
  } else {
    if (static_cast<int>(known->value.size()) != product.n / 2) {
      refuse("products of different shapes under way on the same sums");
    }
    ++known->num_products;
  }
  PendingProduct pending{product, {}, self.open_products, 0};
  if ((self.warp * 32 + self.lane) % kWarpgroup == 0) {
    Machine::get().publish_fenced();
    pending.checksum = checksum_of_operands(product);
  }
  if (product.maybe_a != nullptr) std::copy_n(product.maybe_a, 4, pending.a);
  self.products.push_back(pending);
}

void wgmma_commit() { ++Machine::get().current().open_products; }

void wgmma_wait(int pending, const Where& where) {
  Machine& machine = Machine::get();
  Fiber& self = machine.current();
  const size_t index = self.warp / 4;
  if (index >= machine.warpgroup_waits.size()) refuse("wgmma in an incomplete warpgroup");
  self.is_fenced = false;
  WarpgroupWait& waiting = machine.warpgroup_waits[index];
  if (waiting.arrived > 0 && waiting.pending != pending) {
    refuse("threads of a warpgroup wait for different products");
  }
  waiting.pending = pending;
  if (++waiting.arrived == kWarpgroup) machine.ready_products.push_back(index);
  machine.block("wgmma wait", where);
}

void Machine::end_products(size_t warpgroup) {
  const size_t first = warpgroup * kWarpgroup;
  run_products(first, warpgroup_waits[warpgroup].pending);
  warpgroup_waits[warpgroup] = {};
  for (int t = 0; t < kWarpgroup; ++t) wake(fibers_[first + t]);
}

}  // namespace simt
