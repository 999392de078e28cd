#pragma once

// Products of a row of A tiles and the B tiles of a panel: 16 x 64 results, with other work between
// the instructions.
//
// The tile unit waits for a tile that is stored right after it was computed, and its reader too.
// So the results of a product stay in their four tiles until the next product has begun in the two
// that are left; the six take turns.
#include "amx.h"
#include "vec.h"

namespace redknot::cpu::REDKNOT_ISA {

inline constexpr int kPanelVecs = 4;                     // vectors of a panel
inline constexpr int kPanelWidth = kPanelVecs * kLanes;  // query rows of a panel
inline constexpr int kPanelRowBytes = kPanelWidth * 4;
inline constexpr int kProductRows = 16;
inline constexpr int kProductFloats = kProductRows * kPanelWidth;

// No other work.
struct Idle {
  template <int Place>
  void advance() {}
};

class PanelProducts {
 public:
  // `nowhere` [kProductRows, kPanelWidth] takes the results of no product.
  explicit PanelProducts(float* nowhere) : nowhere_(nowhere), results_(nowhere) {}

  // Results [kProductRows, kPanelWidth] = or (Add) += `depth` A tiles times rows of B tiles
  // [depth * 16, kPanelWidth]. They are in memory when the next product or flush() is done.
  // work.advance<0 to 3>() is called after every instruction.
  template <bool Add, typename Work>
  [[gnu::always_inline]] void multiply(
      const char* a, const float* b, int64_t depth, float* results, Work& work) {
    switch (turn_) {
      case 0:
        multiply_in_turn<0, Add>(a, b, depth, results, work);
        break;
      case 1:
        multiply_in_turn<1, Add>(a, b, depth, results, work);
        break;
      default:
        multiply_in_turn<2, Add>(a, b, depth, results, work);
    }
    turn_ = turn_ == 2 ? 0 : turn_ + 1;
    results_ = results;
  }

  void flush() {
    switch (turn_) {
      case 0:
        flush_before<0>();
        break;
      case 1:
        flush_before<1>();
        break;
      default:
        flush_before<2>();
    }
    results_ = nowhere_;
  }

 private:
  // The tile of results in columns [16 * Place, 16 * Place + 16); those of the product before are
  // at places 2 to 5.
  template <int Turn, int Place>
  static constexpr int kTile = (4 * Turn + Place) % 6;
  static constexpr int kA = 6;
  static constexpr int kB = 7;

  template <int Turn, bool Add, typename Work>
  [[gnu::always_inline]] void multiply_in_turn(
      const char* a, const float* b, int64_t depth, float* results, Work& work) {
    start<Turn, 0, Add>(results);
    start<Turn, 1, Add>(results);
    tile_load_past_l1<kA>(a, 64);
    mac<Turn, 0>(b, work);
    mac<Turn, 1>(b, work);
    store_before<Turn, 2>();
    start<Turn, 2, Add>(results);
    mac<Turn, 2>(b, work);
    store_before<Turn, 3>();
    start<Turn, 3, Add>(results);
    mac<Turn, 3>(b, work);
    store_before<Turn, 4>();
    store_before<Turn, 5>();
    for (int64_t i = 1; i < depth; ++i) {
      a += kTileBytes;
      b += kProductFloats;
      tile_load_past_l1<kA>(a, 64);
      mac<Turn, 0>(b, work);
      mac<Turn, 1>(b, work);
      mac<Turn, 2>(b, work);
      mac<Turn, 3>(b, work);
    }
  }
  template <int Turn, int Place, bool Add>
  static void start(const float* results) {
    if constexpr (Add) {
      tile_load<kTile<Turn, Place>>(results + Place * kLanes, kPanelRowBytes);
    } else {
      tile_zero<kTile<Turn, Place>>();
    }
  }
  template <int Turn, int Place, typename Work>
  [[gnu::always_inline]] static void mac(const float* b, Work& work) {
    tile_load<kB>(b + Place * kLanes, kPanelRowBytes);
    tile_mac<kTile<Turn, Place>, kA, kB>();
    work.template advance<Place>();
  }
  template <int Turn, int Place>
  void store_before() {
    tile_store<kTile<Turn, Place>>(results_ + (Place - 2) * kLanes, kPanelRowBytes);
  }
  template <int Turn>
  void flush_before() {
    store_before<Turn, 2>();
    store_before<Turn, 3>();
    store_before<Turn, 4>();
    store_before<Turn, 5>();
  }

  int turn_ = 0;
  float* nowhere_;
  float* results_;  // where those of the product before belong
};

}  // namespace redknot::cpu::REDKNOT_ISA
