// Low-rank adapters beside the weights of a program.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "memory.h"
#include "types.h"

namespace deepseek {

// An adapter of one weight [n, k] as it is given: down [rank, k] and up [n, rank], read once.
struct GivenLowRank {
  int weight = 0, rank = 0;
  float scale = 1.0f;
  const float *down = nullptr, *up = nullptr;
};

class Adapter {
 public:
  Adapter(const std::vector<Weight>& weights, const std::vector<GivenLowRank>& given);
  const LowRank& of(int weight) const { return parts_[weight]; }
  int rank_padded() const { return rank_padded_; }  // of its largest part
  size_t bytes() const { return memory_.bytes(); }

 private:
  std::vector<LowRank> parts_;  // by weight
  int rank_padded_ = 0;
  Memory memory_;
};

// Adapters by number. A number is never given twice, so that a late user of one that was dropped is
// refused in place of being served another's.
class AdapterTable {
 public:
  int add(std::shared_ptr<const Adapter> adapter);
  void drop(int number);
  std::shared_ptr<const Adapter> find(int number) const;  // null: there is none
  size_t bytes() const;

 private:
  mutable std::mutex lock_;
  std::map<int, std::shared_ptr<const Adapter>> adapters_;
  int next_ = 0;
};

}  // namespace deepseek
