// Threads that run one function together, and the barrier they meet at.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace deepseek {

// All threads of a pool pass together. It spins, for a step has hundreds of phases of microseconds,
// and sleeps where that takes long: somebody else is using the cores then.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return int(workers_.size()) + 1; }
  // Calls work(i) on thread i, on the caller's as 0, and returns when all are done. Workers that
  // have nothing to do spin for a moment and then sleep, so that they do not fight with the threads
  // of others.
  void run(const std::function<void(int)>& work);
  Barrier& barrier() { return barrier_; }

 private:
  void serve(int index);

  Barrier barrier_;
  const std::function<void(int)>* work_ = nullptr;
  alignas(64) std::atomic<int> job_{0};
  alignas(64) std::atomic<int> running_{0};
  std::atomic<bool> is_closing_{false};
  std::vector<std::thread> workers_;
};

}  // namespace deepseek
