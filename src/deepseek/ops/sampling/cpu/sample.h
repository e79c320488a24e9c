// The choice of a token from a row of logits, as deepseek.ops.sampling.reference defines it.
#pragma once

#include <cstdint>

namespace deepseek {

struct Choice {
  double temperature = 0, top_p = 1, min_p = 0;
  int top_k = 0;
  float repetition = 1, frequency = 0, presence = 0;
};

// First largest value; NaN counts as largest.
int largest_place(const float* logits, int count);

// Returns the chosen token; `logits` is changed. `seen` [count] and `counts` [count] may be null
// without penalties; `uniform` in [0, 1) decides the draw.
int choose_token(float* logits, int count, const Choice& choice, const uint8_t* seen,
                 const float* counts, double uniform);

}  // namespace deepseek
