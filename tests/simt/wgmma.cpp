// Products of a warpgroup.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>

#include "cuda/ptx/matrix_descriptor.h"
#include "machine.hpp"

namespace simt {
namespace ptx = redknot::gpu::ptx;
namespace {

// A signalling NaN: arithmetic on it, which gives a NaN, changes its bits.
constexpr uint32_t kSumUnderWay = 0xffbfffff;

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
