// Products by AMX tiles: 16 rows of inputs with the 48 columns of a panel at a time.
//
// Integer sums are exact and scaled as `products.h` does it, so int8 and int4 give the bits of the
// vector kernels, which stay better for few rows. bfloat16 sums in another order: every number of
// rows goes through tiles.
#pragma once

#include "../../cpu/tiles.h"
#include "products.h"

namespace {

constexpr int kTileRows = 16;
constexpr int kChunkRows = 64;     // rows whose float sums stay in the first-level cache
constexpr int kFewestTileRows = 4; // below, the vector kernels are as fast
static_assert(kLanes == 16 && kPanel == 48);

// Registers: 0 to 2 hold the sums of a panel's vectors, 3 inputs, 4 to 6 weights. The last channels of
// a bfloat16 product, which fill no tile, have two of another size.
constexpr int kSums = 0, kInput = 3, kWeights = 4, kLastInput = 6, kLastWeights = 7;

template <typename F>
inline void each_vector(int vectors, F f) {
  f(std::integral_constant<int, 0>{});
  if (vectors > 1) f(std::integral_constant<int, 1>{});
  if (vectors > 2) f(std::integral_constant<int, 2>{});
}

inline void clear_sums() { tile_zero<kSums>(), tile_zero<kSums + 1>(), tile_zero<kSums + 2>(); }

inline void put_panel_row(const Weight& w, int panel, vf* sums, int vectors, float* out,
                          Store mode) {
  for (int v = 0; v < vectors; ++v) {
    int columns = w.n - panel * kPanel - v * kLanes;
    if (columns <= 0) return;
    sums[v] = add(sums[v], bias_of(w, panel, v));
    put_row<1>(out + v * kLanes, sums + v, columns < kLanes ? columns : kLanes, mode);
  }
}

void tiles_bf16(const Weight& w, const Inputs& x, int row, int rows, int panel, float* out,
                ptrdiff_t stride, Store mode) {
  constexpr int kInner = 32;
  int width = w.width(panel), vectors = width / kLanes, left = w.k_padded % kInner;
  TileConfig config;
  for (int v = 0; v < 3; ++v) config.set(kSums + v, rows, 64);
  config.set(kInput, rows, 64);
  for (int i = 0; i < 2; ++i) config.set(kWeights + i, kInner / 2, 64);
  config.set(kLastInput, rows, left ? left * 2 : 64);
  config.set(kLastWeights, left ? left / 2 : kInner / 2, 64);
  tile_configure(config);
  clear_sums();
  const uint8_t* in = x.data + size_t(row) * x.row_bytes;
  const uint8_t* from = w.panel(panel);
  ptrdiff_t pitch = ptrdiff_t(width) * 4;
  int k = 0;
  for (; k + kInner <= w.k_padded; k += kInner, from += kInner / 2 * pitch) {
    tile_load<kInput>(in + k * 2, x.row_bytes);
    each_vector(vectors, [&](auto v) {
      constexpr int weights = kWeights + v % 2;
      tile_load<weights>(from + v * 64, pitch);
      tile_dot_bf16<kSums + v, kInput, weights>();
    });
  }
  if (left) {
    tile_load<kLastInput>(in + k * 2, x.row_bytes);
    each_vector(vectors, [&](auto v) {
      tile_load<kLastWeights>(from + v * 64, pitch);
      tile_dot_bf16<kSums + v, kLastInput, kLastWeights>();
    });
  }
  alignas(64) float sums[kTileRows][kPanel];
  each_vector(vectors, [&](auto v) { tile_store<kSums + v>(&sums[0][v * kLanes], kPanel * 4); });
  for (int m = 0; m < rows; ++m) {
    vf values[3] = {load(sums[m]), load(sums[m] + kLanes), load(sums[m] + 2 * kLanes)};
    put_panel_row(w, panel, values, vectors, out + m * stride, mode);
  }
}

// 64 input channels of a panel, one byte each, from nibbles.
inline void unpack_nibbles(const uint8_t* from, int width, int channels, uint8_t* to) {
  int bytes = width * 4;
  for (int i = 0; i < channels; i += 8, from += bytes, to += 2 * bytes)
    for (int b = 0; b < bytes; b += 64) {
      vi both = load_i(from + b);
      store_i(to + b, nibbles_low(both));
      store_i(to + bytes + b, nibbles_high(both));
    }
}

// The float sums of rows after the integer sums of one more group, as the vector kernels form them.
inline void scale_int8(const uint16_t* halves, const Inputs& x, int row, int rows, int group,
                       int vectors, const int32_t (*dots)[kPanel], float (*sums)[kPanel]) {
  for (int v = 0; v < vectors; ++v) {
    vf scale = load_half(halves + v * kLanes);
    for (int m = 0; m < rows; ++m) {
      size_t place = size_t(row + m) * x.groups + group;
      vi dot = add_i(load_i(dots[m] + v * kLanes), all_i(((const int32_t*)x.term)[place]));
      float* sum = sums[m] + v * kLanes;
      ::store(sum, fma(to_float(dot), mul(scale, all(x.scale[place])), load(sum)));
    }
  }
}

inline void scale_int4(const uint16_t* halves, const Inputs& x, int row, int rows, int group,
                       int width, const int32_t (*dots)[kPanel], float (*sums)[kPanel]) {
  for (int v = 0; v < width / kLanes; ++v) {
    vf scale = load_half(halves + v * kLanes), least = load_half(halves + width + v * kLanes);
    for (int m = 0; m < rows; ++m) {
      size_t place = size_t(row + m) * x.groups + group;
      vf dot = to_float(load_i(dots[m] + v * kLanes));
      float* sum = sums[m] + v * kLanes;
      vf next = fma(mul(dot, all(x.scale[place])), scale, load(sum));
      ::store(sum, fma(all(((const float*)x.term)[place]), least, next));
    }
  }
}

// Integer products of `rows` rows: a multiple of 16, or fewer than 16.
void tiles_integer(const Weight& w, const Inputs& x, int row, int rows, int panel, float* out,
                   ptrdiff_t stride, Store mode) {
  int width = w.width(panel), vectors = width / kLanes;
  int inner = w.group < 64 ? w.group : 64, high = rows < kTileRows ? rows : kTileRows;
  TileConfig config;
  for (int v = 0; v < 3; ++v) {
    config.set(kSums + v, high, 64);
    config.set(kWeights + v, inner / 4, 64);  // they stay while the rows go by
  }
  config.set(kInput, high, inner);
  tile_configure(config);
  alignas(64) float sums[kChunkRows][kPanel] = {};
  alignas(64) int32_t dots[kTileRows][kPanel];
  alignas(64) uint8_t bytes[64 * kPanel];
  const uint8_t* from = w.panel(panel);
  bool is_int4 = w.kind == Kind::int4;
  for (int g = 0; g < x.groups; ++g) {
    const uint8_t* halves = is_int4 ? from + size_t(width) * (w.group / 2)
                                    : w.panel(panel) + size_t(width) * (w.k_padded + 2 * g);
    for (int start = 0; start < rows; start += kTileRows) {
      clear_sums();
      for (int k = 0; k < w.group; k += inner) {
        if (start == 0 || w.group > inner) {
          const uint8_t* weights = from + size_t(width) * k;
          if (is_int4) {
            unpack_nibbles(from + size_t(width) * (k / 2), width, inner, bytes);
            weights = bytes;
          }
          each_vector(vectors, [&](auto v) { tile_load<kWeights + v>(weights + v * 64, width * 4); });
        }
        tile_load<kInput>(x.data + (row + start) * x.row_bytes + g * w.group + k, x.row_bytes);
        each_vector(vectors, [&](auto v) { tile_dot_s8u8<kSums + v, kInput, kWeights + v>(); });
      }
      each_vector(vectors, [&](auto v) { tile_store<kSums + v>(&dots[0][v * kLanes], kPanel * 4); });
      if (is_int4)
        scale_int4((const uint16_t*)halves, x, row + start, high, g, width, dots, sums + start);
      else
        scale_int8((const uint16_t*)halves, x, row + start, high, g, vectors, dots, sums + start);
    }
    from += size_t(width) * (is_int4 ? w.group / 2 + 4 : w.group);
  }
  for (int m = 0; m < rows; ++m) {
    vf values[3] = {load(sums[m]), load(sums[m] + kLanes), load(sums[m] + 2 * kLanes)};
    put_panel_row(w, panel, values, vectors, out + m * stride, mode);
  }
}

void tile_linear(const Weight& w, const Inputs& x, int row_start, int row_stop, int panel,
                 float* out, ptrdiff_t stride, Store mode) {
  bool is_bf16 = w.kind == Kind::bf16;
  if (w.kind == Kind::f32 || (!is_bf16 && row_stop - row_start < kFewestTileRows))
    return linear(w, x, row_start, row_stop, panel, out, stride, mode);
  int most = is_bf16 ? kTileRows : kChunkRows;
  for (int row = row_start; row < row_stop;) {
    int rows = row_stop - row < most ? row_stop - row : most;
    if (rows > kTileRows) rows -= rows % kTileRows;
    float* to = out + (row - row_start) * stride;
    if (is_bf16) tiles_bf16(w, x, row, rows, panel, to, stride, mode);
    else tiles_integer(w, x, row, rows, panel, to, stride, mode);
    row += rows;
  }
  tile_release();
}

}  // namespace
