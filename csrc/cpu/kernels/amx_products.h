#pragma once

// Products of two by two tiles, 32 x 32 results in tiles 0 to 3, with other work between their
// instructions.
#include "amx.h"
#include "vec.h"

namespace redknot::cpu::REDKNOT_ISA {

inline constexpr int kPanelVecs = 2;                     // vectors of a panel
inline constexpr int kPanelWidth = kPanelVecs * kLanes;  // query rows of a panel
inline constexpr int kPanelRowBytes = kPanelWidth * 4;

// No other work.
struct Idle {
  void advance() {}
};

static inline void zero_results() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
// Results [32, kPanelWidth].
static inline void load_results(const float* results) {
  tile_load<0>(results, kPanelRowBytes);
  tile_load<1>(results + 16, kPanelRowBytes);
  tile_load<2>(results + 16 * kPanelWidth, kPanelRowBytes);
  tile_load<3>(results + 16 * kPanelWidth + 16, kPanelRowBytes);
}
static inline void store_results(float* results) {
  tile_store<0>(results, kPanelRowBytes);
  tile_store<1>(results + 16, kPanelRowBytes);
  tile_store<2>(results + 16 * kPanelWidth, kPanelRowBytes);
  tile_store<3>(results + 16 * kPanelWidth + 16, kPanelRowBytes);
}

// Results += two rows of A tiles times `depth` rows of two B tiles.
template <typename Work>
[[gnu::always_inline]] static inline void mac_tiles(
    const char* a0, const char* a1, const float* b, int64_t depth, Work& work) {
  for (int64_t i = 0; i < depth; ++i) {
    tile_load_past_l1<4>(a0 + i * kTileBytes, 64);
    tile_load_past_l1<5>(a1 + i * kTileBytes, 64);
    tile_load<6>(b + i * 16 * kPanelWidth, kPanelRowBytes);
    tile_load<7>(b + i * 16 * kPanelWidth + 16, kPanelRowBytes);
    tile_mac<0, 4, 6>();
    work.advance();
    tile_mac<1, 4, 7>();
    work.advance();
    tile_mac<2, 5, 6>();
    work.advance();
    tile_mac<3, 5, 7>();
    work.advance();
  }
}

}  // namespace redknot::cpu::REDKNOT_ISA
