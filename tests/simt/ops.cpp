// Asynchronous copies, matrix loads, matrix products, votes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>

#include "machine.hpp"
#include "tsan.hpp"

namespace simt {

// --- cp.async
// -------------------------------------------------------------------------------------
void copy_async(void* smem, const void* source, int bytes, int source_bytes, const Where& where) {
  Machine& machine = Machine::get();
  machine.check_smem(smem, bytes, bytes, where);
  if (source_bytes < 0 || source_bytes > bytes) throw Error(machine.here() + "bad source size");
  if (source_bytes > 0) {
    check_global(source, source_bytes, where);
    if (reinterpret_cast<uintptr_t>(source) % bytes != 0) {
      throw Error(machine.here() + "misaligned source of an asynchronous copy");
    }
  }
  // Whoever reads too early, or still needed what was here, gets NaN.
  tsan::write(smem, bytes);
  std::memset(smem, 0xff, bytes);
  Fiber& self = machine.current();
  self.copies.push_back({static_cast<char*>(smem),
                         static_cast<const char*>(source),
                         bytes,
                         source_bytes,
                         self.open_group});
}

void copy_commit() { ++Machine::get().current().open_group; }

void copy_wait(int pending) {
  Fiber& self = Machine::get().current();
  // Copies that no commit has closed belong to no group yet: no wait lands them.
  const auto lands = [&](const PendingCopy& copy) {
    return copy.group + static_cast<uint64_t>(pending) < self.open_group;
  };
  for (const PendingCopy& copy : self.copies) {
    if (!lands(copy)) continue;
    tsan::write(copy.destination, copy.bytes);
    std::memcpy(copy.destination, copy.source, copy.source_bytes);
    std::memset(copy.destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
  std::erase_if(self.copies, lands);
}

// --- ldmatrix
// -------------------------------------------------------------------------------------
namespace {

constexpr uint32_t kWholeWarp = 0xffffffffu;

struct MatrixLoad {
  uint16_t row[8];
  uint32_t* registers;
};

template <bool kTransposed>
void complete_load(void* const* lanes, uint32_t) {
  const auto load = [&](int lane) -> MatrixLoad& { return *static_cast<MatrixLoad*>(lanes[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](int r, int c) -> uint32_t { return load(matrix * 8 + r).row[c]; };
      const uint32_t low = kTransposed ? element(column, row) : element(row, column);
      const uint32_t high = kTransposed ? element(column + 1, row) : element(row, column + 1);
      load(lane).registers[matrix] = low | high << 16;
    }
  }
}

}  // namespace

void load_matrix_x4(uint32_t (&registers)[4],
                    const void* row,
                    bool transposed,
                    const Where& where) {
  Machine::get().check_smem(row, 16, 16, where);
  MatrixLoad load;
  load.registers = registers;
  tsan::read(row, sizeof(load.row));
  std::memcpy(load.row, row, sizeof(load.row));  // on arrival: the earliest it could be read
  rendezvous(transposed ? "ldmatrix.trans" : "ldmatrix",
             kWholeWarp,
             &load,
             transposed ? &complete_load<true> : &complete_load<false>,
             where);
}

// --- mma.m16n8k16
// ---------------------------------------------------------------------------------
namespace {

struct MatrixProduct {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float value_of(uint32_t pair, int half, Half type) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * half));
  return type == Half::kBFloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

// Fragments as the PTX ISA draws them: lane = 4 * group + member.
template <Half kType>
void complete_product(void* const* lanes, uint32_t) {
  const auto lane_args = [&](int lane) { return static_cast<MatrixProduct*>(lanes[lane]); };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = group + (i / 2 % 2) * 8;
      const int column = member * 2 + i % 2 + (i / 4) * 8;
      a[row][column] = value_of(lane_args(lane)->a[i / 2], i % 2, kType);
    }
    for (int i = 0; i < 4; ++i) {
      b[member * 2 + i % 2 + (i / 2) * 8][group] =
          value_of(lane_args(lane)->b[i / 2], i % 2, kType);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i / 2) * 8, column = member * 2 + i % 2;
      float sum = lane_args(lane)->d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lane_args(lane)->d[i] = sum;
    }
  }
  ++counters.mmas;
}

}  // namespace

void mma_16816(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half type, const Where& where) {
  MatrixProduct product{d, a, b};
  rendezvous("mma",
             kWholeWarp,
             &product,
             type == Half::kBFloat16 ? &complete_product<Half::kBFloat16>
                                     : &complete_product<Half::kFloat16>,
             where);
}

// --- votes
// ----------------------------------------------------------------------------------------
namespace detail {

uint32_t vote(uint32_t mask, bool predicate, const char* operation, const Where& where) {
  Exchange<uint32_t> exchange{predicate, 0, 0, 0};
  rendezvous(
      operation,
      mask,
      &exchange,
      [](void* const* lanes, uint32_t) {
        uint32_t result = 0;
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes[lane] && static_cast<Exchange<uint32_t>*>(lanes[lane])->value)
            result |= 1u << lane;
        }
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes[lane]) static_cast<Exchange<uint32_t>*>(lanes[lane])->result = result;
        }
      },
      where);
  return exchange.result;
}

uint32_t match(uint32_t mask, uint64_t value, const Where& where) {
  Exchange<uint64_t> exchange{value, 0, 0, 0};
  rendezvous(
      "__match_any_sync",
      mask,
      &exchange,
      [](void* const* lanes, uint32_t) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!lanes[lane]) continue;
          auto& self = *static_cast<Exchange<uint64_t>*>(lanes[lane]);
          for (int other = 0; other < 32; ++other) {
            if (lanes[other] && static_cast<Exchange<uint64_t>*>(lanes[other])->value == self.value)
              self.result |= 1ull << other;
          }
        }
      },
      where);
  return static_cast<uint32_t>(exchange.result);
}

}  // namespace detail
}  // namespace simt
