// Mistakes that the executor must find: an executor that stops finding them looks like green tests.
#include <cmath>

#include "check.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/matrix.cuh"

namespace {

using namespace redknot::gpu;
using simt::Buffer;

template <typename Kernel>
void run(unsigned threads, size_t smem, const Kernel& kernel, simt::Schedule schedule = {}) {
  simt::launch({{1}, {threads}, smem, schedule}, kernel);
}

// --- whatever the hardware leaves undefined is an Error that says where --------------------------
TEST(wild_accesses_name_the_buffer_and_the_thread) {
  Buffer<int> values("values", 4);
  volatile int* at = values.data();
  const auto reads = [&](int index) {
    return [=] {
      if (threadIdx.x == 33) (void)at[index];
    };
  };
  CHECK_THROWS(run(64, 0, reads(4)), "0 bytes behind the end of values");
  CHECK_THROWS(run(64, 0, reads(4)), "thread (33, 0, 0)");
  CHECK_THROWS(run(64, 0, reads(-2000)), "before the begin of values");
  volatile uintptr_t low = 8;
  CHECK_THROWS(run(64, 0, [&] { *reinterpret_cast<volatile int*>(low) = 1; }), "no buffer's");
  run(64, 0, reads(3));  // and the machine goes on
}

TEST(checked_accesses_need_a_buffer) {
  Buffer<int> values("values", 8);
  std::vector<int> elsewhere(8);
  const int* host = elsewhere.data();
  CHECK_THROWS(run(1, 0, [&] { (void)__ldg(host); }), "outside every buffer at simt_errors_test");
  CHECK_THROWS(run(1,
                   64,
                   [&] {
                     RK_DYNAMIC_SMEM(smem);
                     ptx::copy_async_16(smem, values.data() + 2, true);
                   }),
               "misaligned source");
  CHECK_THROWS(run(1,
                   64,
                   [&] {
                     RK_DYNAMIC_SMEM(smem);
                     ptx::copy_async_16(smem, values.data() + 8, true);
                   }),
               "outside every buffer");
}

TEST(shared_memory_has_bounds_and_alignment) {
  Buffer<int> values("values", 8);
  const auto copies_to = [&](int offset) {
    return [&values, offset] {
      RK_DYNAMIC_SMEM(smem);
      ptx::copy_async_16(smem + offset, values.data(), true);
      ptx::copy_commit();
      ptx::copy_wait<0>();
    };
  };
  run(1, 128, copies_to(112));
  CHECK_THROWS(run(1, 128, copies_to(128)), "outside shared memory");
  CHECK_THROWS(run(1, 128, copies_to(8)), "misaligned");
  CHECK_THROWS(run(1, 300 << 10, [] {}), "more shared memory");
}

int deep(int depth) {
  volatile char frame[512];
  frame[depth % 512] = 1;
  return depth == 0 ? frame[0] : deep(depth - 1) + frame[depth % 512];
}

TEST(a_stack_overflow_is_an_error) {
  CHECK_THROWS(run(2, 0, [] { (void)deep(100000); }), "stack overflow");
}

TEST(a_barrier_that_not_all_reach_is_a_deadlock) {
  CHECK_THROWS(run(64,
                   0,
                   [] {
                     if (threadIdx.x < 48) __syncthreads();
                   }),
               "warp 1: lanes 0-15 wait in __syncthreads");
  CHECK_THROWS(run(64,
                   0,
                   [] {
                     if (threadIdx.x < 48) __syncthreads();
                   }),
               "lanes 16-31 have exited");
  // clang-format off
  const auto two_barriers_in_a_line = [] {
    if (threadIdx.x < 16) __syncthreads(); else __syncthreads();
  };
  // clang-format on
  CHECK_THROWS(run(32, 0, two_barriers_in_a_line), "others wait in that at");
}

TEST(a_collective_that_not_all_lanes_reach_is_an_error) {
  const uint32_t all = 0xffffffffu;
  const auto mixed = [=] {
    if (threadIdx.x % 2 == 0) {
      __shfl_sync(all, 1, 0);
    } else {
      __ballot_sync(all, true);
    }
  };
  CHECK_THROWS(run(32, 0, mixed), "of the warp wait in __shfl_sync");
  const auto half = [=] {
    if (threadIdx.x < 16) __shfl_sync(all, 1, 0);
  };
  CHECK_THROWS(run(32, 0, half), "lanes 0-15 wait in __shfl_sync");
  CHECK_THROWS(run(32, 0, [] { __shfl_sync(0xffffu, 1, 0); }), "not in its mask");
  CHECK_THROWS(run(32,
                   1024,
                   [] {
                     RK_DYNAMIC_SMEM(smem);
                     uint32_t registers[4];
                     if (threadIdx.x < 16) ptx::load_matrix_x4(registers, smem);
                     __syncthreads();
                   }),
               "wait in ldmatrix");
}

TEST(copies_must_be_waited_for) {
  Buffer<int> values("values", 4);
  CHECK_THROWS(run(1,
                   64,
                   [&] {
                     RK_DYNAMIC_SMEM(smem);
                     ptx::copy_async_16(smem, values.data(), true);
                     ptx::copy_commit();
                   }),
               "has not waited for");
}

// --- races: which schedules show a wrong value ---------------------------------------------------
// Each kernel writes `right` from every thread it should; a race leaves NaN or an old value.
using Kernel = void (*)(float* smem, float* out);

std::string schedules_that_fail(Kernel kernel) {
  std::string failed;
  for (const simt::Schedule& schedule : simt::kSchedules) {
    Buffer<float> out("out", 128);
    run(
        128,
        4096,
        [&] {
          RK_DYNAMIC_SMEM(smem);
          kernel(reinterpret_cast<float*>(smem), out.data());
        },
        schedule);
    bool right = true;
    for (int i = 0; i < 128; ++i) right = right && out[i] == 1.0f;
    failed += right ? '-' : 'x';
  }
  return failed;
}

TEST(races_show_in_some_schedule) {
  // From the first warp to all: only when others run before it.
  CHECK_EQ(schedules_that_fail([](float* smem, float* out) {
             if (threadIdx.x == 0) smem[0] = 1.0f;
             __syncwarp();
             out[threadIdx.x] = smem[0];
           }).substr(0, 2),
           "-x");
  CHECK_EQ(schedules_that_fail([](float* smem, float* out) {
             if (threadIdx.x == 127) smem[0] = 1.0f;
             __syncwarp();
             out[threadIdx.x] = smem[0];
           }).substr(0, 2),
           "x-");
  // Reuse of a buffer without a second barrier.
  CHECK_EQ(schedules_that_fail([](float* smem, float* out) {
             smem[threadIdx.x] = 1.0f;
             __syncthreads();
             const float read = smem[127 - threadIdx.x];
             smem[threadIdx.x] = 2.0f;
             out[threadIdx.x] = read;
           }),
           "xxxxx");
  // Between lanes of a warp.
  CHECK_EQ(schedules_that_fail([](float* smem, float* out) {
             smem[threadIdx.x] = 1.0f;
             out[threadIdx.x] = smem[threadIdx.x ^ 1];
           }),
           "xxxxx");
  // The same with what orders it.
  CHECK_EQ(schedules_that_fail([](float* smem, float* out) {
             smem[threadIdx.x] = 1.0f;
             __syncwarp();
             out[threadIdx.x] = smem[threadIdx.x ^ 1];
           }),
           "-----");
}

TEST(a_lost_update_needs_a_schedule_that_preempts) {
  const std::string failed = schedules_that_fail([](float* smem, float* out) {
    if (threadIdx.x == 0) smem[0] = 0.0f;
    __syncthreads();
    for (int i = 0; i < 100; ++i) {
      if (threadIdx.x % 32 == 0) {
        const float before = smem[0];
        simt::yield();
        smem[0] = before + 1.0f;
      }
      __syncwarp();
    }
    __syncthreads();
    out[threadIdx.x] = smem[0] / 400.0f;
  });
  CHECK_EQ(failed.substr(0, 2), "--");
  CHECK(failed.find('x') != std::string::npos);
}

}  // namespace
