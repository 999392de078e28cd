// The roofs that kernels are measured against: the multiply-accumulate of mac.h, or of tiles, on
// registers alone, and reading memory with vectors of this instruction set.
#include "roofs.h"

#include <algorithm>

#if defined(REDKNOT_ISA_AMX)
#include "amx.h"
#endif
#include "mac.h"

namespace redknot::cpu::REDKNOT_ISA {
namespace {

// As many chains as hide the latency of a multiply-accumulate on two ports and fit in 16 registers.
constexpr int kChains = 12;

// The compiler must take `x` for something that others read and write.
inline void keep(Vec& x) {
#if defined(REDKNOT_ISA_AVX512)
  asm volatile("" : "+v"(x));
#elif defined(REDKNOT_ISA_AVX2)
  asm volatile("" : "+x"(x));
#else
  asm volatile("" : "+m"(x));
#endif
}

template <typename Mac>
int64_t dots(int64_t num_rounds) {
  Vec sums[kChains] = {};
  for (Vec& sum : sums) keep(sum);  // or the compiler sees that all are equal, and computes one
  Vec a = broadcast(0.0f);
  Vec b = broadcast(0.0f);
  for (int64_t round = 0; round < num_rounds; ++round) {
    keep(a);
    for (Vec& sum : sums) sum = Mac::mac(a, b, sum);
  }
  for (Vec& sum : sums) keep(sum);
  return num_rounds * kChains * kLanes * Mac::kPerWord * 2;
}

#if defined(REDKNOT_ISA_AMX)
// 2 x 2 tiles of results, as the kernels hold them, of numbers such as kernels see.
int64_t tile_products(int64_t num_rounds) {
  constexpr int64_t kFlopsPerTile = 2 * 16 * 16 * 32;
  constexpr int kNumFactors = 4 * kTileBytes / 2;
  alignas(64) uint16_t factors[kNumFactors];
  uint32_t random = 1;
  for (uint16_t& factor : factors) {
    random = random * 1664525u + 1013904223u;
    const uint32_t sign_and_digits = random >> 16 & 0x80ff;
    factor = static_cast<uint16_t>(sign_and_digits | 0x3f00);  // 0.5 <= |factor| < 2
  }
  const AmxTiles tiles;
  tile_load<4>(factors, 64);
  tile_load<5>(factors + kNumFactors / 4, 64);
  tile_load<6>(factors + kNumFactors / 2, 64);
  tile_load<7>(factors + kNumFactors / 4 * 3, 64);
  for (int64_t round = 0; round < num_rounds; ++round) {
    if (round % 8 == 0) {  // before sums outgrow their factors
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    tile_mac<0, 4, 6>();
    tile_mac<1, 4, 7>();
    tile_mac<2, 5, 6>();
    tile_mac<3, 5, 7>();
  }
  return num_rounds * 4 * kFlopsPerTile;
}
#endif

}  // namespace

int64_t dot_roof(int64_t num_rounds, DType dtype) {
#if defined(REDKNOT_ISA_AMX)
  if (dtype == DType::kBFloat16) return tile_products(num_rounds);
#endif
  return dispatch_dtype(dtype, [&](auto element) {
    return dots<typename MacOf<decltype(element)>::Type>(num_rounds);
  });
}

// A run of every piece in turn: processors that read ahead do so within a memory page of 4 KiB, and
// a single one keeps them less busy than several.
float read_roof(const void* const* pieces, int64_t num_pieces, int64_t piece_bytes) {
  constexpr int kStreams = 8;
  constexpr int64_t kBlockFloats = kStreams * kLanes;
  constexpr int64_t kRunFloats = 1024 / sizeof(float);
  static_assert(kRunFloats % kBlockFloats == 0);
  const int64_t num_floats = piece_bytes / static_cast<int64_t>(sizeof(float));
  VecI sums[kStreams] = {};
  for (int64_t begin = 0; begin < num_floats; begin += kRunFloats) {
    const int64_t end = std::min(begin + kRunFloats, num_floats);
    for (int64_t piece = 0; piece < num_pieces; ++piece) {
      const auto* values = static_cast<const float*>(pieces[piece]);
      for (int64_t i = begin; i + kBlockFloats <= end; i += kBlockFloats) {
        for (int stream = 0; stream < kStreams; ++stream) {
          sums[stream] ^= (VecI)load(values + i + stream * kLanes);
        }
      }
    }
  }
  VecI sum = {};
  for (const VecI& part : sums) sum ^= part;
  int32_t word = 0;
  for (int lane = 0; lane < kLanes; ++lane) word ^= sum[lane];
  return static_cast<float>(word);
}

}  // namespace redknot::cpu::REDKNOT_ISA
