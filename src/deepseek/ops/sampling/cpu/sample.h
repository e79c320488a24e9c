// The choice of a token from a row of logits, as deepseek.ops.sampling.reference defines it.
#pragma once

#include <cstdint>

namespace deepseek {

struct Kernels;

struct Choice {
  double temperature = 0, top_p = 1, min_p = 0;
  int top_k = 0;
  float repetition = 1, frequency = 0, presence = 0;
};

// Values of which largest ones and sums are kept, so that most of a row need not be read again.
constexpr int kSampleBlock = 256;

// Of weights exp(d), d being how far a logit lies below the largest: their sum, and that of weight times d.
struct Mass {
  double total = 0, moment = 0;
};

// First largest value; NaN counts as largest.
int largest_place(const Kernels& kernels, const float* logits, int count);

// Returns the chosen token; `logits` is changed. `seen` [count] and `counts` [count] may be null
// without penalties; `uniform` in [0, 1) decides the draw.
int choose_token(const Kernels& kernels, float* logits, int count, const Choice& choice,
                 const uint8_t* seen, const float* counts, double uniform);

// How sure a row is: the logarithm of the sum of exp(logit), and the entropy in nats.
struct Certainty {
  float log_sum, entropy;
};
Certainty certainty_of(const Kernels& kernels, const float* logits, int count);

}  // namespace deepseek
