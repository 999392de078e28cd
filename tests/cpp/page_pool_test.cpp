#include "memory/page_pool.h"

#include <algorithm>

#include "check.h"

namespace {

using redknot::AllocStatus;
using redknot::memory::PageExchange;
using redknot::memory::PagePool;

struct Poisoned {
  std::vector<int32_t> pages;
  PagePool pool;
  explicit Poisoned(int32_t num_pages)
      : pool(num_pages, [this](int32_t page) { pages.push_back(page); }) {}
};

TEST(fresh_pool_hands_out_neighbours_in_rising_order) {
  PagePool pool(4, nullptr);
  for (int32_t page = 0; page < 4; ++page) {
    CHECK_EQ(pool.take(), page);
    CHECK_EQ(pool.ref_count(page), 1);
    CHECK_EQ(pool.num_free(), 3 - page);
  }
}

TEST(page_is_free_and_poisoned_when_its_last_holder_lets_go) {
  Poisoned p(2);
  const int32_t page = p.pool.take();
  p.pool.retain(page);
  CHECK(!p.pool.release(page));
  CHECK(p.pages.empty());
  CHECK(p.pool.release(page));
  CHECK_EQ(p.pages.size(), 1u);
  CHECK_EQ(p.pages[0], page);
  CHECK_EQ(p.pool.num_free(), 2);
}

TEST(exchange_pays_with_the_pages_it_drops) {
  Poisoned p(2);
  const int32_t a = p.pool.take();
  const int32_t b = p.pool.take();
  PageExchange exchange(p.pool);
  exchange.drop(a);
  exchange.drop(b);
  exchange.need(2);
  CHECK(p.pages.empty());
  const redknot::AllocResult result = exchange.settle();
  CHECK(result.status == AllocStatus::kOk);
  CHECK_EQ(result.pages_needed, 0);
  CHECK_EQ(result.pages_free, 0);
  CHECK_EQ(p.pages.size(), 2u);
  const int32_t first = p.pool.take();
  const int32_t second = p.pool.take();
  CHECK(std::min(first, second) == 0 && std::max(first, second) == 1);
}

TEST(page_with_two_holders_is_freed_once_by_two_drops) {
  Poisoned p(1);
  const int32_t page = p.pool.take();
  p.pool.retain(page);
  PageExchange exchange(p.pool);
  exchange.drop(page);
  CHECK_EQ(p.pool.ref_count(page), 1);  // later rows of the call see it as private
  exchange.drop(page);
  CHECK(exchange.settle().status == AllocStatus::kOk);
  CHECK_EQ(p.pool.num_free(), 1);
  CHECK_EQ(p.pages.size(), 1u);
}

TEST(exchange_that_does_not_fit_or_is_left_changes_nothing) {
  Poisoned p(3);
  const int32_t a = p.pool.take();
  const int32_t b = p.pool.take();
  p.pool.retain(b);
  for (const bool settles : {true, false}) {
    PageExchange exchange(p.pool);
    exchange.drop(a);
    exchange.drop(b);
    exchange.need(3);  // one is free, one becomes free
    if (!settles) continue;
    const redknot::AllocResult result = exchange.settle();
    CHECK(result.status == AllocStatus::kOutOfPages);
    CHECK_EQ(result.pages_needed, 2);
    CHECK_EQ(result.pages_free, 1);
  }
  CHECK_EQ(p.pool.num_free(), 1);
  CHECK_EQ(p.pool.ref_count(a), 1);
  CHECK_EQ(p.pool.ref_count(b), 2);
  CHECK(p.pages.empty());
  CHECK_EQ(p.pool.take(), 2);
}

}  // namespace
