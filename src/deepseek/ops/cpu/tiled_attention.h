// Attention over the blocks that a table lists, with gradients: what training runs on a processor.
#pragma once

#include <mutex>
#include <vector>

#include "memory.h"
#include "pool.h"
#include "types.h"

namespace deepseek {

// An array whose first two dimensions may be shared: a step of 0 there.
template <typename T>
struct Shared {
  const T* data = nullptr;
  ptrdiff_t row = 0, head = 0, block = 0;
};

// What is asked, as deepseek.ops.attention's BlockTable and Layout say it.
struct TiledCall {
  Kind source = Kind::f32;
  int rows = 0, heads = 0, kv_heads = 0, queries = 0, dim = 0, value_dim = 0;
  int slots = 0;       // of keys and values; where there are means, `mean_from` and a page's slots for each of theirs
  int block = 64, query_size = 64;
  int mean_from = -1;  // first slot of the means of blocks; -1: none
  float scale = 1.0f;
  bool is_causal = true;
  const int32_t *query_start = nullptr, *key_length = nullptr;  // [rows]
  Shared<int32_t> indices, counts;  // no data: every block is seen
  Shared<uint8_t> skip;
  Shared<int32_t> reach;
  int width = 0;  // of a list
  int first = 0;
  Shared<float> bias;             // [rows or 1][slots]
  const float* slopes = nullptr;  // [heads]
  const float* place = nullptr;   // [slots]
  // [rows][heads][length][dim], side by side
  const void *query = nullptr, *key = nullptr, *value = nullptr;
};

// What comes of it; the gradients that are given, and what they become.
struct TiledResult {
  void* out = nullptr;
  float* lse = nullptr;  // [rows][heads][queries]
  const void* gradient = nullptr;
  const float* lse_gradient = nullptr;
  void *to_queries = nullptr, *to_keys = nullptr, *to_values = nullptr;
};

// What is done: outputs; gradients; or the largest score of each query with each block, of dense attention: out is
// float [rows][heads][queries][blocks], written where a query sees some of a block, and there are no values.
enum class TiledPass { forward, backward, peaks };

class TiledAttention {
 public:
  TiledAttention(const Kernels& kernels, int threads);
  void run(TiledPass pass, const TiledCall& call, const TiledResult& result);

 private:

  const Kernels& kernels_;
  Pool pool_;
  std::mutex one_at_a_time_;
};

}  // namespace deepseek
