#pragma once

// The tile registers of AMX: eight matrices of 16 rows of 64 bytes. Written as assembly with a
// memory clobber: the intrinsics of gcc do not tell the compiler what memory they read.
#include <cstdint>

namespace redknot::cpu::REDKNOT_ISA {

inline constexpr int kTileBytes = 1024;

struct TileShape {
  uint16_t row_bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[8] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the calling thread's tiles for its lifetime and gives them back, so that no later
// code finds them in use.
class AmxTiles {
 public:
  explicit AmxTiles(const TileShape& shape = {}) {
    struct alignas(64) Config {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(Config) == 64);
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = shape.row_bytes[i];
      config.rows[i] = shape.rows[i];
    }
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~AmxTiles() { asm volatile("tilerelease" ::: "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

template <int Tile>
static inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
static inline void tile_load(const void* p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(Tile) : "memory");
}
// The same for lines that will not be used again before L1 has forgotten them.
template <int Tile>
static inline void tile_load_past_l1(const void* p, int64_t stride_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Tile>
static inline void tile_store(void* p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(Tile) : "memory");
}
// C [16, 16] fp32 += A [16, 32] bf16 * B, whose row i holds the pairs (B[2i][n], B[2i + 1][n]).
template <int C, int A, int B>
static inline void tile_mac() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace redknot::cpu::REDKNOT_ISA
