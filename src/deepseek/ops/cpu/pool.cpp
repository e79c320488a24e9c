#include "pool.h"

#include <sched.h>

namespace deepseek {

namespace {
constexpr int kSpinsBeforeYield = 20000;
constexpr int kSpinsBeforeSleep = 4000;
}  // namespace

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void Barrier::wait() {
  if (threads_ == 1) return;
  int phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins < kSpinsBeforeYield) relax();
    else sched_yield();
  }
}

Pool::Pool(int threads) : barrier_(threads < 1 ? 1 : threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
}

Pool::~Pool() {
  is_closing_.store(true);
  job_.fetch_add(1);
  job_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(const std::function<void(int)>& work) {
  if (workers_.empty()) return work(0);
  work_ = &work;
  running_.store(int(workers_.size()), std::memory_order_relaxed);
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  work(0);
  for (int spins = 0; running_.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kSpinsBeforeYield) relax();
    else sched_yield();
  }
}

void Pool::serve(int index) {
  int done = 0;
  for (;;) {
    for (int spins = 0; job_.load(std::memory_order_acquire) == done && spins < kSpinsBeforeSleep;
         ++spins)
      relax();
    job_.wait(done, std::memory_order_acquire);
    ++done;
    if (is_closing_.load()) return;
    (*work_)(index);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace deepseek
