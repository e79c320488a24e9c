// The inputs of a product: normed, rotated and stored as the weight's kernel reads them.
#pragma once

#include "../../cpu/types.h"
#include "../../cpu/vec.h"

namespace {

using namespace deepseek;

#if defined(DEEPSEEK_VNNI)
constexpr int kInt8Bytes = 1;
#else
constexpr int kInt8Bytes = 2;  // int16 [k / 4][2][2]: places 0 and 2 of a quad, then 1 and 3
#endif

size_t row_bytes(const Weight& w) {
  size_t bytes = w.kind == Kind::f32    ? size_t(w.k_padded) * 4
                 : w.kind == Kind::bf16 ? size_t(w.k_padded) * 2
                 : w.kind == Kind::int8 ? size_t(w.k_padded) * kInt8Bytes
                                        : size_t(w.k_padded);
  return (bytes + 63) / 64 * 64;
}

// RMS norm in float32. Source: Zhang and Sennrich 2019.
void rms_norm(const float* x, const float* weight, float eps, float* out, int count) {
  vf squares = zero();
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < count; ++i) total += x[i] * x[i];
  float factor = 1.0f / std::sqrt(total / float(count) + eps);
  for (i = 0; i + kLanes <= count; i += kLanes)
    store(out + i, mul(mul(load(x + i), all(factor)), load(weight + i)));
  for (; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

// The orthogonal Walsh-Hadamard transform of every 64 channels, in place; its own inverse.
// Source: "incoherence processing" of QuIP# (2402.04396), section 3, in blocks, without signs.
void rotate(float* x, int count) {
  constexpr int vectors = kRotation / kLanes;
  for (float* block = x; block < x + count; block += kRotation) {
    vf v[vectors];
    for (int i = 0; i < vectors; ++i) {
      v[i] = load(block + i * kLanes);
      if constexpr (kLanes > 8) v[i] = butterfly<8>(v[i]);
      if constexpr (kLanes > 4) v[i] = butterfly<4>(v[i]);
      v[i] = butterfly<1>(butterfly<2>(v[i]));
    }
    for (int half = 1; half < vectors; half *= 2)
      for (int i = 0; i < vectors; i += 2 * half)
        for (int j = i; j < i + half; ++j) {
          vf a = v[j], b = v[j + half];
          v[j] = add(a, b), v[j + half] = sub(a, b);
        }
    for (int i = 0; i < vectors; ++i) store(block + i * kLanes, mul(v[i], all(0.125f)));
  }
}

// A vector of levels at a place of a row, as the products of an int8 or int4 weight read them.
inline void put_levels(bool is_int8, int8_t* row, int place, vi levels) {
  if (!is_int8 || kInt8Bytes == 1) return store_s8(row + place, levels);
  alignas(64) int8_t narrow[64];
  store_s8(narrow, levels);
  int16_t* wide = (int16_t*)row + place;
  for (int i = 0; i < kLanes; i += 4) {
    wide[i] = narrow[i], wide[i + 1] = narrow[i + 2];
    wide[i + 2] = narrow[i + 1], wide[i + 3] = narrow[i + 3];
  }
}

// Symmetric int8 with a scale per group, or the one scale of the weight, and then cut off where it ends;
// the term undoes the offset of the weights.
void quantize(const Weight& w, const float* x, const Inputs& to, int row) {
  int8_t* out = (int8_t*)(to.data + row * to.row_bytes);
  float* scales = to.scale + size_t(row) * to.groups;
  float* float_terms = (float*)to.term + size_t(row) * to.groups;
  int32_t* int_terms = (int32_t*)to.term + size_t(row) * to.groups;
  bool is_int8 = w.kind == Kind::int8, is_fixed = w.input_scale > 0;
  for (int g = 0; g < to.groups; ++g) {
    const float* v = x + g * w.group;
    vf most = zero();
    if (!is_fixed)
      for (int i = 0; i < w.group; i += kLanes) most = vmax(most, absolute(load(v + i)));
    float bound = is_fixed ? 127.0f * w.input_scale : largest(most);
    float scale = is_fixed ? w.input_scale : bound / 127.0f, inverse = bound > 0 ? 127.0f / bound : 0.0f;
    vi total = zero_i();
    for (int i = 0; i < w.group; i += kLanes) {
      vf level = mul(load(v + i), all(inverse));
      if (is_fixed) level = vmax(vmin(level, all(127.0f)), all(-127.0f));
      vi q = to_int(level);
      total = add_i(total, q);
      put_levels(is_int8, out, g * w.group + i, q);
    }
    int32_t count = int32_t(sum(to_float(total)));  // exact: below 2^24
    scales[g] = scale;
    if (is_int8) int_terms[g] = -128 * count;
    else float_terms[g] = scale * float(count);
  }
}

// `scratch` holds k_padded floats.
void prepare(const Weight& w, const float* x, const float* norm, float eps, const Inputs& to,
             int row, float* scratch) {
  uint8_t* out = to.data + row * to.row_bytes;
  float* states = w.kind == Kind::f32 ? (float*)out : scratch;
  if (norm) rms_norm(x, norm, eps, states, w.k);
  else std::memcpy(states, x, size_t(w.k) * 4);
  for (int i = w.k; i < w.k_padded; ++i) states[i] = 0.0f;
  if (w.kind == Kind::bf16) {
    uint16_t* narrow = (uint16_t*)out;
    int i = 0;
    for (; i + kLanes <= w.k_padded; i += kLanes) store_bf16(narrow + i, load(states + i));
    for (; i < w.k_padded; ++i) narrow[i] = float_to_bf16(states[i]);
  } else if (w.kind == Kind::int8 || w.kind == Kind::int4) {
    if (w.rotated) rotate(states, w.k_padded);
    quantize(w, states, to, row);
  }
}

// silu(gate) * up. Source: Shazeer 2020.
inline vf silu_mul(vf gate, vf up) {
  vf sigmoid = inverse(add(all(1.0f), exponential(sub(zero(), gate))));
  return mul(mul(gate, sigmoid), up);
}

void silu_mul(const float* gate, const float* up, float* out, int count) {
  for (int i = 0; i < count; i += kLanes) store(out + i, silu_mul(load(gate + i), load(up + i)));
}

}  // namespace
