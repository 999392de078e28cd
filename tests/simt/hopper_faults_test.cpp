// The attention kernels of Hopper as they are, in a machine where one thing goes wrong: an error of
// the executor or a wrong result must show it in every schedule.
#define RK_TEST_HOPPER 1
#include "attention_case.hpp"

namespace {

using namespace redknot::gpu;
using redknot::kGlobalWindow;
using simt::Fault;

struct Warps {
  unsigned first, last;
};
constexpr unsigned kDecodeWarps = HopperDecodeShape<64>::kWarps;
constexpr Warps kDecodeLoader = {kDecodeWarps, kDecodeWarps},
                kDecodeProducts = {0, kDecodeWarps - 1};
constexpr Warps kPrefillLoader = {0, 0}, kPrefillProducts = {4, 4 + 4 * kGroups - 1};

// More blocks of keys than stages, items that follow each other, queries that are turned anew, and
// pages that go on behind their last token.
const Case kDecode = {.rows = {{{0, 330}, {330, 21, 9}}, {{0, 40}}},
                      .q_positions = {{350}},
                      .group = 4,
                      .page_size = 64};
const Case kPrefill = {.rows = {{{0, 530}, {530, 61, 9}}, {{0, 591}}},
                       .q_positions = {range(570, 591)},
                       .group = 4,
                       .page_size = 64,
                       .window = {kGlobalWindow, 300},
                       .sink = {0, 4}};

double error(const Case& c, const simt::Schedule& schedule) {
  return PagedAttention<__nv_bfloat16, 64>(c).error(schedule, 1);
}

void expect_noticed(const Case& c, Fault fault, Warps warps) {
  simt::sabotage = {fault, warps.first, warps.last};
  for (const simt::Schedule& schedule : simt::kSchedules) {
    bool is_noticed = true;
    try {
      is_noticed = !(error(c, schedule) < kTolerance);
    } catch (const simt::Error&) {
    }
    if (!is_noticed) {
      simt::sabotage = {};
      redknot::test::fail(__FILE__, __LINE__, "not noticed: ", simt::name_of(schedule));
    }
  }
  simt::sabotage = {};
}

TEST(without_a_fault_every_schedule_is_right) {
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK(error(kDecode, schedule) < kTolerance);
    CHECK(error(kPrefill, schedule) < kTolerance);
  }
}

void expect_noticed_everywhere(Fault fault) {
  expect_noticed(kDecode, fault, kDecodeLoader);
  expect_noticed(kDecode, fault, kDecodeProducts);
  expect_noticed(kPrefill, fault, kPrefillLoader);
  expect_noticed(kPrefill, fault, kPrefillProducts);
}
TEST(a_phase_that_is_not_waited_for) { expect_noticed_everywhere(Fault::kNoPhaseWait); }
TEST(the_wrong_phase_waited_for) { expect_noticed_everywhere(Fault::kWrongParity); }
TEST(a_missing_arrival) { expect_noticed_everywhere(Fault::kNoArrival); }

void expect_noticed_of_loaders(Fault fault) {
  expect_noticed(kDecode, fault, kDecodeLoader);
  expect_noticed(kPrefill, fault, kPrefillLoader);
}
TEST(too_few_bytes_announced) { expect_noticed_of_loaders(Fault::kTooFewBytes); }
TEST(boxes_of_the_wrong_columns) { expect_noticed_of_loaders(Fault::kWrongColumn); }
TEST(boxes_of_the_wrong_slots) { expect_noticed_of_loaders(Fault::kWrongSlot); }
TEST(boxes_of_the_wrong_page) { expect_noticed_of_loaders(Fault::kWrongPage); }
TEST(boxes_without_the_swizzle) { expect_noticed_of_loaders(Fault::kNoSwizzle); }

void expect_noticed_of_products(Fault fault) {
  expect_noticed(kDecode, fault, kDecodeProducts);
  expect_noticed(kPrefill, fault, kPrefillProducts);
}
TEST(a_missing_barrier_between_warps) { expect_noticed_of_products(Fault::kNoNamedBarrier); }
TEST(a_missing_barrier_within_a_warp) { expect_noticed_of_products(Fault::kNoWarpBarrier); }
// Decode needs one only so that the engine writes after the warps: copies land last here anyway.
TEST(a_missing_proxy_fence) { expect_noticed(kPrefill, Fault::kNoProxyFence, kPrefillProducts); }

}  // namespace
