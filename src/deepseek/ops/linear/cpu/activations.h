// What encoders do to states between their products: activations, and the norm with mean and bias.
#pragma once

#include "../../cpu/types.h"
#include "../../cpu/vec.h"

namespace {

using namespace deepseek;

inline vf sigmoid(vf x) { return inverse(add(all(1.0f), exponential(sub(zero(), x)))); }

// x * P(X < x) of a normal X, to 2e-7 of |x|. Source: Hendrycks and Gimpel (1606.08415), section 2; the
// complement of the error function by Abramowitz and Stegun, formula 7.1.26.
inline vf gelu(vf x) {
  vf size = absolute(x);
  vf t = inverse(fma(size, all(0.3275911f * 0.70710678f), all(1.0f)));
  vf p = fma(t, all(1.061405429f), all(-1.453152027f));
  p = fma(p, t, all(1.421413741f));
  p = fma(p, t, all(-0.284496736f));
  p = fma(p, t, all(0.254829592f));
  vf tail = mul(mul(p, t), power_of_two<7>(mul(mul(x, x), all(-0.5f * kLog2E))));
  return sub(vmax(x, zero()), mul(mul(size, tail), all(0.5f)));
}

// The same by a tangent, as transformers' gelu_new has it: (1 + tanh u) / 2 is the sigmoid of 2 u.
inline vf gelu_tanh(vf x) {
  vf u = mul(mul(x, all(1.5957691216f)), fma(mul(x, x), all(0.044715f), all(1.0f)));
  return mul(x, sigmoid(u));
}

inline vf tangent(vf x) { return sub(mul(all(2.0f), sigmoid(add(x, x))), all(1.0f)); }

template <typename F>
inline void each_lane(float* x, int count, F f) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(x + i, f(load(x + i)));
  if (i == count) return;
  float tail[kLanes] = {};
  std::memcpy(tail, x + i, size_t(count - i) * sizeof(float));
  store(tail, f(load(tail)));
  std::memcpy(x + i, tail, size_t(count - i) * sizeof(float));
}

void activate(Activation kind, float* x, int count) {
  switch (kind) {
    case Activation::none: return;
    case Activation::gelu: return each_lane(x, count, gelu);
    case Activation::gelu_tanh: return each_lane(x, count, gelu_tanh);
    case Activation::relu: return each_lane(x, count, [](vf v) { return vmax(v, zero()); });
    case Activation::tanh: return each_lane(x, count, tangent);
  }
}

// In float32, in place where `out` is `x`. Source: Ba, Kiros and Hinton (1607.06450), equation 4.
void layer_norm(const float* x, const float* weight, const float* bias, float eps, float* out, int count) {
  vf sums = zero();
  int i = 0, whole = count - count % kLanes;
  for (; i < whole; i += kLanes) sums = add(sums, load(x + i));
  float total = sum(sums);
  for (; i < count; ++i) total += x[i];
  float mean = total / float(count);
  vf squares = zero(), middle = all(mean);
  for (i = 0; i < whole; i += kLanes) {
    vf off = sub(load(x + i), middle);
    squares = fma(off, off, squares);
  }
  total = sum(squares);
  for (; i < count; ++i) total += (x[i] - mean) * (x[i] - mean);
  float factor = 1.0f / std::sqrt(total / float(count) + eps);
  vf by = all(factor);
  for (i = 0; i < whole; i += kLanes)
    store(out + i, fma(mul(sub(load(x + i), middle), by), load(weight + i), load(bias + i)));
  for (; i < count; ++i) out[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

}  // namespace
