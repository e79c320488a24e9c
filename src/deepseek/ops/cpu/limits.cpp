#include "limits.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "pool.h"

namespace deepseek {

namespace {

constexpr int kTrials = 5;

// The shortest of some runs of `work(thread)` on all threads, in seconds.
template <typename Work>
double shortest(int threads, Work work) {
  using Clock = std::chrono::steady_clock;
  Pool pool(threads);
  double best = 1e30;
  for (int i = 0; i < kTrials; ++i) {
    auto before = Clock::now();
    pool.run(work);
    best = std::min(best, std::chrono::duration<double>(Clock::now() - before).count());
  }
  return best;
}

}  // namespace

double measure_products(const Kernels& kernels, Kind kind, int threads) {
  constexpr double kEnough = 0.02;  // seconds: longer than the start of a pool
  std::vector<double> products(threads);
  for (int rounds = 1000;; rounds *= 4) {
    double seconds = shortest(threads, [&](int thread) {
      float numbers[16] = {0, 0, 0};
      products[thread] = kernels.peak_products(kind, rounds, numbers);
    });
    if (seconds > kEnough || rounds > 1 << 28) return products[0] * threads / seconds;
  }
}

double measure_bandwidth(const Kernels& kernels, size_t bytes, int threads) {
  std::vector<float> memory(bytes / sizeof(float), 1.0f), sums(size_t(threads) * 16);
  size_t part = memory.size() / threads;
  double seconds = shortest(threads, [&](int thread) {
    sums[size_t(thread) * 16] = kernels.read_once(memory.data() + thread * part, part);
  });
  return double(part * threads * sizeof(float)) / seconds;
}

}  // namespace deepseek
