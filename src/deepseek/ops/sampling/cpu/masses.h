// Passes over a whole row of logits, for the choice of a token; once for each instruction set.
#pragma once

#include "../../cpu/vec.h"
#include "sample.h"

namespace deepseek {
namespace {

// `vmax` and `vmin` give their second value where one of the two is none.
inline vf none_or_share(vf x) { return vmin(all(1.0f), vmax(zero(), x)); }

void block_largest(const float* x, int count, float* largest_of_block) {
  for (int start = 0, block = 0; start < count; start += kSampleBlock, ++block) {
    int stop = start + kSampleBlock < count ? start + kSampleBlock : count;
    vf most = all(-INFINITY), check = zero();
    int i = start;
    for (; i + kLanes <= stop; i += kLanes) {
      vf v = load(x + i);
      most = vmax(v, most), check = add(check, none_or_share(v));
    }
    float value = largest(most), bad = sum(check);
    for (; i < stop; ++i) {
      value = x[i] > value ? x[i] : value;
      if (x[i] != x[i]) bad = x[i];
    }
    largest_of_block[block] = bad != bad ? bad : value;
  }
}

Mass weigh(const float* x, int count, float most, float inverse, float* weights, float* sums) {
  Mass mass;
  vf least = all(-200.0f), top = all(most), by = all(inverse);
  for (int start = 0, block = 0; start < count; start += kSampleBlock, ++block) {
    int stop = start + kSampleBlock < count ? start + kSampleBlock : count;
    vf total = zero(), moment = zero();
    for (int i = start; i < stop; i += kLanes) {
      alignas(64) float padded[kLanes];
      bool is_whole = i + kLanes <= stop;
      if (!is_whole)
        for (int j = 0; j < kLanes; ++j) padded[j] = i + j < stop ? x[i + j] : -INFINITY;
      vf d = vmax(least, mul(sub(is_whole ? load(x + i) : load(padded), top), by));
      vf w = where_less(d, all(-100.0f), zero(), exponential(d));
      if (is_whole) {
        store(weights + i, w);
      } else {
        store(padded, w);
        for (int j = 0; i + j < stop; ++j) weights[i + j] = padded[j];
      }
      total = add(total, w), moment = fma(w, d, moment);
    }
    sums[block] = sum(total);
    mass.total += sums[block], mass.moment += sum(moment);
  }
  return mass;
}

}  // namespace
}  // namespace deepseek
