// Packs a panel of a weight: the one time that its values are read in the order they are stored in.
// A vector holds one input channel of as many columns as it has lanes.
#pragma once

#include "inputs.h"

namespace {

// The channels of `kLanes` columns from `index` on, transposed into [k_padded][kLanes].
void read_columns(const Weight& w, const void* source, Kind kind, ptrdiff_t stride, int index,
                  float* out) {
  for (int lane = 0; lane < kLanes; ++lane) {
    float* to = out + lane;
    int k = index + lane < w.n ? w.k : 0;
    const char* row = (const char*)source + (index + lane) * stride;
    const float* floats = (const float*)row;
    const uint16_t* words = (const uint16_t*)row;
    if (kind == Kind::f32)
      for (int i = 0; i < k; ++i) to[i * kLanes] = floats[i];
    else if (kind == Kind::bf16)
      for (int i = 0; i < k; ++i) to[i * kLanes] = bf16_to_float(words[i]);
    else
      for (int i = 0; i < k; ++i) to[i * kLanes] = half_to_float(words[i]);
    for (int i = k; i < w.k_padded; ++i) to[i * kLanes] = 0.0f;
  }
}

void rotate_columns(float* x, int count) {
  for (float* block = x; block < x + size_t(count) * kLanes; block += kRotation * kLanes) {
    for (int half = 1; half < kRotation; half *= 2)
      for (int i = 0; i < kRotation; i += 2 * half)
        for (int j = i; j < i + half; ++j) {
          vf a = load(block + j * kLanes), b = load(block + (j + half) * kLanes);
          store(block + j * kLanes, add(a, b));
          store(block + (j + half) * kLanes, sub(a, b));
        }
    for (int i = 0; i < kRotation; ++i)
      store(block + i * kLanes, mul(load(block + i * kLanes), all(0.125f)));
  }
}

inline vf inverse_of(vf scale) {
  return where_less(zero(), scale, div(all(1.0f), scale), zero());
}

inline vf level_of(vf value, vf least, vf inverse) {
  return vmin(vmax(nearest(mul(sub(value, least), inverse)), zero()), all(15.0f));
}

// A group on 16 levels between its least and its largest value, or a narrower range where that
// lowers the squared error.
void pack_int4(const Weight& w, uint8_t* panel, int width, int column, const float* x) {
  for (int g = 0; g < w.groups(); ++g, x += w.group * kLanes) {
    uint8_t* block = panel + size_t(g) * width * (w.group / 2 + 4);
    uint16_t* halves = (uint16_t*)(block + size_t(width) * w.group / 2);
    vf low = load(x), high = low;
    for (int i = 1; i < w.group; ++i) {
      low = vmin(low, load(x + i * kLanes));
      high = vmax(high, load(x + i * kLanes));
    }
    vf middle = mul(all(0.5f), add(high, low)), radius = mul(all(0.5f), sub(high, low));
    vf best = all(INFINITY), best_scale = zero(), best_least = zero();
    const float shrinks[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};
    for (float shrink : shrinks) {
      uint16_t words[kLanes];
      store_half(words, sub(middle, mul(radius, all(shrink))));
      vf least = load_half(words);
      store_half(words, mul(radius, all(2.0f * shrink / 15.0f)));
      vf scale = load_half(words), inverse = inverse_of(scale), error = zero();
      for (int i = 0; i < w.group; ++i) {
        vf value = load(x + i * kLanes);
        vf off = sub(fma(level_of(value, least, inverse), scale, least), value);
        error = fma(off, off, error);
      }
      best_scale = where_less(error, best, scale, best_scale);
      best_least = where_less(error, best, least, best_least);
      best = vmin(error, best);
      if (largest(best) == 0.0f) break;
    }
    store_half(halves + column, best_scale);
    store_half(halves + width + column, best_least);
    vf inverse = inverse_of(best_scale);
    for (int i = 0; i < w.group; i += 8) {
      vi both = zero_i();
      for (int j = 0; j < 4; ++j) {
        vi a = to_int(level_of(load(x + (i + j) * kLanes), best_least, inverse));
        vi b = to_int(level_of(load(x + (i + 4 + j) * kLanes), best_least, inverse));
        both = or_i(both, left(or_i(a, left(b, 4)), 8 * j));
      }
      store_i(block + (size_t(i / 8) * width + column) * 4, both);
    }
  }
}

void pack_int8(const Weight& w, uint8_t* panel, int width, int column, const float* x) {
  for (int g = 0; g < w.groups(); ++g, x += w.group * kLanes) {
    uint8_t* block = panel + size_t(g) * width * w.group;
    vf most = zero();
    for (int i = 0; i < w.group; ++i) most = vmax(most, absolute(load(x + i * kLanes)));
    uint16_t* halves = (uint16_t*)(panel + size_t(width) * w.k_padded) + size_t(g) * width + column;
    store_half(halves, mul(most, all(1.0f / 127.0f)));
    vf inverse = inverse_of(load_half(halves));
    for (int i = 0; i < w.group; i += 4) {
      vi quad = zero_i();
      for (int j = 0; j < 4; ++j) {
        vf level = nearest(mul(load(x + (i + j) * kLanes), inverse));
        level = vmin(vmax(level, all(-127.0f)), all(127.0f));
        quad = or_i(quad, left(add_i(to_int(level), all_i(128)), 8 * j));
      }
      store_i(block + (size_t(i / 4) * width + column) * 4, quad);
    }
  }
}

inline vi bf16_bits(vf value) {
  vi bits = as_int(value);
  vi odd = and_i(right(bits, 16), all_i(1));
  return right(add_i(bits, add_i(odd, all_i(0x7fff))), 16);
}

// `source` is row 0 of the weight, `stride` in bytes; `kind` f32, bf16, or int8 for half floats.
// `scratch` holds k_padded * 16 floats.
void pack_panel(Weight& w, const void* source, Kind kind, ptrdiff_t stride, int panel,
                float* scratch) {
  int width = w.width(panel);
  uint8_t* data = w.panel(panel);
  for (int column = 0; column < width; column += kLanes) {
    int index = panel * kPanel + column;
    read_columns(w, source, kind, stride, index, scratch);
    if (w.rotated) rotate_columns(scratch, w.k_padded);
    const float* x = scratch;
    switch (w.kind) {
      case Kind::f32:
        for (int i = 0; i < w.k_padded; ++i)
          store((float*)data + size_t(i) * width + column, load(x + i * kLanes));
        break;
      case Kind::bf16:
        for (int i = 0; i < w.k_padded; i += 2) {
          vi low = bf16_bits(load(x + i * kLanes)), high = bf16_bits(load(x + (i + 1) * kLanes));
          store_i(data + (size_t(i / 2) * width + column) * 4, or_i(low, left(high, 16)));
        }
        break;
      case Kind::int8: pack_int8(w, data, width, column, x); break;
      case Kind::int4: pack_int4(w, data, width, column, x); break;
    }
  }
}

}  // namespace
