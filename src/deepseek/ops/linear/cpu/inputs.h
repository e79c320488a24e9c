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

// What `step(i, so_far)` makes of all whole vectors of a row, four of them at a time, joined by `join`.
template <typename Step, typename Join>
inline vf over_vectors(int count, vf start, Step step, Join join) {
  vf part[4] = {start, start, start, start};
  int i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int v = 0; v < 4; ++v) part[v] = step(i + v * kLanes, part[v]);
  for (; i + kLanes <= count; i += kLanes) part[0] = step(i, part[0]);
  return join(join(part[0], part[1]), join(part[2], part[3]));
}

// What a row is multiplied by to be normed. Source: Zhang and Sennrich 2019.
float rms_factor(const float* x, float eps, int count) {
  float total = sum(over_vectors(count, zero(), [=](int i, vf so_far) { return fma(load(x + i), load(x + i), so_far); }, add));
  for (int i = count - count % kLanes; i < count; ++i) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / float(count) + eps);
}

void rms_norm(const float* x, const float* weight, float eps, float* out, int count) {
  float factor = rms_factor(x, eps, count);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(out + i, mul(mul(load(x + i), all(factor)), load(weight + i)));
  for (; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

// The orthogonal Walsh-Hadamard transform of 64 channels; its own inverse.
// Source: "incoherence processing" of QuIP# (2402.04396), section 3, in blocks, without signs.
constexpr int kRotationVectors = kRotation / kLanes;
using Rotated = vf[kRotationVectors];

// The stages between vectors, from those `half` apart on; of constants, so that all stays in registers.
template <int half>
inline void combine(Rotated& v) {
  if constexpr (half < kRotationVectors) {
    for (int i = 0; i < kRotationVectors / 2; ++i) {
      int j = i / half * 2 * half + i % half;
      vf a = v[j], b = v[j + half];
      v[j] = add(a, b), v[j + half] = sub(a, b);
    }
    combine<2 * half>(v);
  }
}

inline void rotate_block(Rotated& v) {
  for (int i = 0; i < kRotationVectors; ++i) {
    if constexpr (kLanes > 8) v[i] = butterfly<8>(v[i]);
    if constexpr (kLanes > 4) v[i] = butterfly<4>(v[i]);
    v[i] = butterfly<1>(butterfly<2>(v[i]));
  }
  combine<1>(v);
  for (int i = 0; i < kRotationVectors; ++i) v[i] = mul(v[i], all(0.125f));
}

// Every 64 of `count` channels by `rotate_block`, of what `at(i)` gives from i on.
template <typename At>
inline void rotate_from(int count, At at, float* to) {
  for (int start = 0; start < count; start += kRotation) {
    Rotated v;
    for (int i = 0; i < kRotationVectors; ++i) v[i] = at(start + i * kLanes);
    rotate_block(v);
    for (int i = 0; i < kRotationVectors; ++i) store(to + start + i * kLanes, v[i]);
  }
}

void rotate(float* x, int count) {
  rotate_from(count, [=](int i) { return load(x + i); }, x);
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
    float bound = 127.0f * w.input_scale;
    if (!is_fixed)
      bound = largest(over_vectors(w.group, zero(), [=](int i, vf so_far) { return vmax(so_far, absolute(load(v + i))); }, vmax));
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

// The channels of a row, normed on the way where there is a norm.
struct States {
  const float *x, *norm;
  float factor;

  vf at(int i) const { return norm ? mul(mul(load(x + i), all(factor)), load(norm + i)) : load(x + i); }
  float one(int i) const { return norm ? x[i] * factor * norm[i] : x[i]; }

  // What is beyond `count` becomes 0, up to `padded`.
  void put(float* to, int count, int padded) const {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, at(i));
    for (; i < count; ++i) to[i] = one(i);
    for (; i < padded; ++i) to[i] = 0.0f;
  }
};

// `scratch` holds k_padded floats.
void prepare(const Weight& w, const float* x, const float* norm, float eps, const Inputs& to,
             int row, float* scratch) {
  uint8_t* out = to.data + row * to.row_bytes;
  States states{x, norm, norm ? rms_factor(x, eps, w.k) : 1.0f};
  if (w.kind == Kind::f32) return states.put((float*)out, w.k, w.k_padded);
  if (w.kind == Kind::bf16) {
    uint16_t* narrow = (uint16_t*)out;
    int i = 0;
    for (; i + kLanes <= w.k; i += kLanes) store_bf16(narrow + i, states.at(i));
    for (; i < w.k_padded; ++i) narrow[i] = float_to_bf16(i < w.k ? states.one(i) : 0.0f);
    return;
  }
  if (w.rotated && w.k % kRotation == 0 && w.k == w.k_padded) {
    rotate_from(w.k, [&](int i) { return states.at(i); }, scratch);
  } else {
    states.put(scratch, w.k, w.k_padded);
    if (w.rotated) rotate(scratch, w.k_padded);
  }
  quantize(w, scratch, to, row);
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
