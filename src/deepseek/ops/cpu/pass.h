// What one run of a program works on, for the files that hold its instructions.
#pragma once

#include <array>
#include <vector>

#include "program.h"

namespace deepseek {

constexpr int kQueryBlock = 48;       // queries of an attention block
constexpr int kCounters = 4;          // of an instruction: the phases whose units are shared out

inline size_t aligned(size_t bytes, size_t to = 64) { return (bytes + to - 1) / to * to; }

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
