// What one run of a program works on, for the files that hold its instructions.
#pragma once

#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "program.h"

namespace deepseek {

constexpr int kQueryBlock = 48;       // queries of an attention block
constexpr int kFewTokens = 2;         // each thread prepares its own inputs: cheaper than to meet
constexpr int kCounters = 4;          // of an instruction: the phases whose units are shared out

// Part `index` of `count` things in `parts` parts of nearly one size.
inline std::pair<int, int> share(int count, int parts, int index) {
  return {int(int64_t(count) * index / parts), int(int64_t(count) * (index + 1) / parts)};
}

struct Program::Pass {
  const Step& step;
  KvPages& pages;
  std::vector<Run> runs;
  std::vector<int> selected;
  bool is_decode = true;   // every run is one token
  int max_parts = 1;       // states of a query that are merged when every run is one token
  // attention of longer runs: run, first query, last query; and of its first tokens alone, which see
  // all that is before them; the others of a routed layer: run, first token, last token
  std::vector<std::array<int, 3>> blocks, dense_blocks, routed_blocks;
  std::vector<int> full_pages;  // whose last slots are written, of longer runs
  int last_position = 0;
  size_t score_stride = 0;  // floats of a query's scores of pages
  // adapters of the step's tokens, with the rows of each: of all tokens, and of those that were picked
  struct Adapted { std::shared_ptr<const Adapter> adapter; std::vector<int> rows; };
  std::vector<Adapted> adapted, adapted_picked;
  const std::vector<Adapted>& adapted_of(const Instruction& in) const {
    return in.rows == RowSet::all ? adapted : adapted_picked;
  }
};

// The thread's memory for attention: softmax states, queries, and what the kernel needs.
struct Program::AttendMemory {
  float *sums, *most, *total, *next, *most_next, *total_next, *vectors;
  Query* queries;
  void* scratch;

  AttendMemory(uint8_t* base, int dim_padded, int dim) {
    float* floats = (float*)base;
    sums = floats, next = sums + kQueryBlock * dim_padded;
    most = next + kQueryBlock * dim_padded, total = most + kQueryBlock;
    most_next = total + kQueryBlock, total_next = most_next + kQueryBlock;
    vectors = total_next + kQueryBlock;
    queries = (Query*)(vectors + kQueryBlock * dim);
    scratch = (void*)aligned(size_t(queries + kQueryBlock));
  }
};

}  // namespace deepseek
