// Our reading of wgmma's layouts (csrc/cuda/ptx/matrix_descriptor.h), which kernels and executor
// share, against that of CuTe, which knows nothing of ours.
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "check.h"
#include "cuda/ptx/matrix_descriptor.h"

namespace {

using namespace cute;
namespace ptx = redknot::gpu::ptx;
using T = cute::bfloat16_t;

constexpr int kRows = 128;
constexpr int kPanelBytes = kRows * 128;
alignas(1024) T memory[kRows * 128];

// Keys or queries [128, 64], and values [dims 128, keys 128] in two panels of 64 dimensions.
using KMajor = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<kRows>, _64>{}));
using MNMajor = decltype(tile_to_shape(
    GMMA::Layout_MN_SW128_Atom<T>{}, Shape<_128, Int<kRows>>{}, Step<_2, _1>{}));

// CuTe has no address of shared memory on the host, so that of its descriptors is 0; where a slice
// begins is compared by itself.
constexpr uint64_t kAllButAddress = ~uint64_t{0x3fff};

TEST(swizzled_offsets) {
  const auto k_major = as_position_independent_swizzle_layout(KMajor{});
  const auto mn_major = as_position_independent_swizzle_layout(MNMajor{});
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < 64; ++column) {
      const uint32_t ours = ptx::swizzled_offset(row, column / 8) / sizeof(T) + column % 8;
      CHECK_EQ(static_cast<uint32_t>(k_major(row, column)), ours);
      for (int panel = 0; panel < 2; ++panel) {
        CHECK_EQ(static_cast<uint32_t>(mn_major(panel * 64 + column, row)),
                 ours + panel * kPanelBytes / sizeof(T));
      }
    }
  }
}

TEST(k_major_descriptors) {
  const auto tile = make_tensor(make_smem_ptr(memory), KMajor{});
  for (int step = 0; step < 4; ++step) {
    const auto slice = local_tile(tile, Shape<Int<kRows>, _16>{}, make_coord(0, step));
    const uint64_t theirs = GMMA::make_gmma_desc<GMMA::Major::K>(slice).desc_;
    const uint64_t ours = ptx::k_major(0, step);
    CHECK_EQ(theirs & kAllButAddress, ours & kAllButAddress);
    CHECK_EQ((raw_pointer_cast(slice.data()) - memory) * sizeof(T), (ours & 0x3fff) << 4);
  }
}

TEST(mn_major_descriptors) {
  const auto tile = make_tensor(make_smem_ptr(memory), MNMajor{});
  for (int step = 0; step < kRows / 16; ++step) {
    const auto slice = local_tile(tile, Shape<_128, _16>{}, make_coord(0, step));
    const uint64_t theirs = GMMA::make_gmma_desc<GMMA::Major::MN>(slice).desc_;
    const uint64_t ours = ptx::mn_major(0, kPanelBytes, step);
    CHECK_EQ(theirs & kAllButAddress, ours & kAllButAddress);
    CHECK_EQ((raw_pointer_cast(slice.data()) - memory) * sizeof(T), (ours & 0x3fff) << 4);
    CHECK_EQ(ours, ptx::moved_by(ptx::mn_major(0, kPanelBytes, 0), 2048 * step));
  }
}

template <typename Layout>
void expect_fragment(const Layout& layout, int num_elements) {
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < num_elements; ++i) {
      const int index = layout(thread, i);  // of a column-major matrix of 64 rows
      CHECK_EQ(index % 64, ptx::fragment_row(thread, i));
      CHECK_EQ(index / 64, ptx::fragment_column(thread, i));
    }
  }
}

TEST(fragments) {
  expect_fragment(SM90::GMMA::ALayout_64x16{}, 8);
  expect_fragment(SM90::GMMA::CLayout_64x8{}, 4);
  expect_fragment(SM90::GMMA::CLayout_64x64{}, 32);
  expect_fragment(SM90::GMMA::CLayout_64x128{}, 64);
  expect_fragment(SM90::GMMA::CLayout_64x256{}, 128);
}

}  // namespace
