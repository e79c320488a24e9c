#include "pool.h"

namespace deepseek {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

namespace {

constexpr int kSpinsBeforeSleep = 4000;

// Waits until `value` is no longer `old`. It spins for as long as phases usually differ; then it
// sleeps, so that where others use the cores too, the thread that is waited for gets this one.
void wait_for_change(const std::atomic<int>& value, int old) {
  for (int spins = 0; spins < kSpinsBeforeSleep; ++spins) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

void Barrier::wait() {
  if (threads_ == 1) return;
  int phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  wait_for_change(phase_, phase);
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
  for (int left; (left = running_.load(std::memory_order_acquire)) > 0;) wait_for_change(running_, left);
}

void Pool::serve(int index) {
  int done = 0;
  for (;;) {
    wait_for_change(job_, done);
    ++done;
    if (is_closing_.load()) return;
    (*work_)(index);
    if (running_.fetch_sub(1, std::memory_order_release) == 1) running_.notify_all();
  }
}

}  // namespace deepseek
