#pragma once

// The query rows of an item in panels, as B tiles, and the sums of their results.
#include <algorithm>
#include <cstring>

#include "amx_products.h"
#include "carver.h"
#include "key_tile.h"
#include "mac.h"
#include "queries.h"
#include "transpose.h"

namespace redknot::cpu::REDKNOT_ISA {

template <typename T>
class AmxPanels {
 public:
  static int64_t count_of(int64_t rows) { return (rows + kPanelWidth - 1) / kPanelWidth; }
  static int64_t scratch_floats(int64_t rows, int64_t padded) {
    return count_of(rows) * kPanelWidth * (padded / 2 + padded) + kLanes * padded;
  }

  // `factor` goes into the queries; `padded` dimensions are whole tiles.
  AmxPanels(
      const Queries<T>& queries, int64_t head_dim, int64_t padded, float factor, Carver& carver)
      : queries_(queries),
        head_dim_(head_dim),
        padded_(padded),
        factor_(factor),
        num_lanes_(count_of(queries.rows()) * kPanelWidth),
        words_(carver.take(num_lanes_ * padded / 2)),
        sums_(carver.take(num_lanes_ * padded)),
        rows_(carver.take(kLanes * padded)) {
    std::memset(sums_, 0, num_lanes_ * padded * sizeof(float));
  }

  int64_t count() const { return num_lanes_ / kPanelWidth; }
  // Words [padded / 2, kPanelWidth] of B tiles.
  const float* queries(int64_t panel) const { return words_ + panel * kPanelWidth * padded_ / 2; }
  // [padded, kPanelWidth]
  float* sums(int64_t panel) { return sums_ + panel * kPanelWidth * padded_; }

  // Sums of the panel times factors [kPanelWidth] of its rows.
  void rescale(int64_t panel, const float* factors) {
    float* sums = this->sums(panel);
    for (int64_t d = 0; d < padded_; ++d, sums += kPanelWidth) {
      for (int c = 0; c < kPanelWidth; c += kLanes) {
        store(sums + c, load(sums + c) * load(factors + c));
      }
    }
  }

  // Packs the queries as keys of that rotation offset want them.
  void turn_to(int32_t offset) {
    if (ready_ && offset == offset_) return;
    ready_ = true;
    offset_ = offset;
    for (int64_t m = 0; m < num_lanes_; m += kLanes) {
      const float* words_of[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        if (m + kLanes + i < queries_.rows()) fetch_row(queries_.given(m + kLanes + i));
        words_of[i] = read_row(m + i, rows_ + i * padded_);
      }
      float* panel = words_ + m / kPanelWidth * kPanelWidth * padded_ / 2 + m % kPanelWidth;
      for (int64_t d = 0; d < padded_ / 2; d += kLanes) {
        Vec words[kLanes];
        for (int i = 0; i < kLanes; ++i) words[i] = load(words_of[i] + d);
        transpose(words);
        for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanelWidth, words[i]);
      }
    }
  }

  // Calls visit(m, d, count, sums of row m at dimensions d .. d + count, times its factor);
  // factors(m) are those of rows m .. m + kLanes.
  template <typename Factors, typename Visit>
  void for_each_row(Factors&& factors, Visit&& visit) const {
    for (int64_t m = 0; m < queries_.rows(); m += kLanes) {
      const float* panel = sums_ + m / kPanelWidth * kPanelWidth * padded_ + m % kPanelWidth;
      const int64_t rows = std::min<int64_t>(kLanes, queries_.rows() - m);
      const Vec factor = factors(m);
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        Vec sums[kLanes];
        for (int i = 0; i < kLanes; ++i) sums[i] = load(panel + (d + i) * kPanelWidth) * factor;
        transpose(sums);
        for (int64_t i = 0; i < rows; ++i) {
          visit(m + i, d, std::min<int64_t>(kLanes, head_dim_ - d), sums[i]);
        }
      }
    }
  }

 private:
  void fetch_row(const T* row) const {
    const auto* begin = reinterpret_cast<const char*>(row);
    for (int64_t b = 0; b < head_dim_ * int64_t{sizeof(T)}; b += 64) fetch_ahead<64>(begin + b);
  }
  // The words of query row m: where they lie, or in `row`, zeros behind the last row.
  const float* read_row(int64_t m, float* row) const {
    if (m >= queries_.rows()) {
      std::memset(row, 0, padded_ * sizeof(float));
      return row;
    }
    if (offset_ == 0 && factor_ == 1.0f && head_dim_ == padded_) {
      return reinterpret_cast<const float*>(queries_.given(m));
    }
    auto* elements = reinterpret_cast<BFloat16*>(row);
    queries_.read(m, offset_, elements, factor_);
    std::memset(elements + head_dim_, 0, 2 * (padded_ - head_dim_));
    return row;
  }

  const Queries<T>& queries_;
  int64_t head_dim_;
  int64_t padded_;
  float factor_;
  int64_t num_lanes_;
  float* words_;
  float* sums_;
  float* rows_;  // [kLanes, padded]
  bool ready_ = false;
  int32_t offset_ = 0;
};

}  // namespace redknot::cpu::REDKNOT_ISA
