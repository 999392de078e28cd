#pragma once

// What the online softmax keeps per query row when rows lie on the lanes; padded to whole panels.
#include "carver.h"
#include "key_tile.h"
#include "queries.h"

namespace redknot::cpu::REDKNOT_ISA {

struct PanelState {
  float* max;             // [lanes] what scores are taken relative to
  float* sum;             // [lanes]
  int32_t* position;      // [lanes]
  int32_t* window_begin;  // [lanes] keys behind this position are inside the window
  int64_t sink = 0;

  static int64_t scratch_floats(int64_t lanes) { return 4 * Carver::rounded(lanes); }

  // Lanes without a query row see nothing.
  template <typename T>
  PanelState(const Queries<T>& queries, int64_t lanes, Carver& carver)
      : max(carver.take(lanes)),
        sum(carver.take(lanes)),
        position(carver.take<int32_t>(lanes)),
        window_begin(carver.take<int32_t>(lanes)),
        sink(queries.sink()) {
    for (int64_t m = 0; m < lanes; ++m) {
      max[m] = -kInf;
      sum[m] = 0.0f;
      position[m] = m < queries.rows() ? queries.position(m) : INT32_MIN;
      const int64_t begin = int64_t{position[m]} - queries.window();
      window_begin[m] =
          queries.window() < 0 || begin < INT32_MIN ? INT32_MIN : static_cast<int32_t>(begin);
    }
  }

  // Scores [count, Width] in vectors: -infinity where a query must not see a key.
  template <int Width>
  void mask(int64_t first_lane, const int32_t* keys, int count, float* scores) const {
    for (int c = 0; c < Width; ++c) {
      const VecI query = *reinterpret_cast<const VecI*>(position + first_lane + c * kLanes);
      const VecI begin = *reinterpret_cast<const VecI*>(window_begin + first_lane + c * kLanes);
      for (int i = 0; i < count; ++i) {
        const VecI key = broadcast(keys[i]);
        VecI visible = key <= query;
        if (keys[i] >= sink) visible &= key > begin;
        float* score = scores + (i * Width + c) * kLanes;
        store(score, visible ? load(score) : broadcast(-kInf));
      }
    }
  }
};

}  // namespace redknot::cpu::REDKNOT_ISA
