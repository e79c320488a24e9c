// Products of 32 rows and more with int8 weights by AMX tiles, in blocks of 32 rows and a panel: three
// tiles of weights meet two of inputs, a group of channels after the other, whose weights wait in the
// first-level cache while all rows go by. The bits are those of `tile_products.h`.
#pragma once

#include "../../cpu/tiles.h"
#include "products.h"

namespace {

constexpr int kTileRows = 16;
constexpr int kBlockRows = 2 * kTileRows;
constexpr int kWideRows = 128;  // whose float sums stay in the first-level cache
static_assert(kLanes == 16 && kPanel == 48);

// Calls f with each of the vectors of a panel.
template <typename F>
inline void each_vector(int vectors, F f) {
  f(std::integral_constant<int, 0>{});
  if (vectors > 1) f(std::integral_constant<int, 1>{});
  if (vectors > 2) f(std::integral_constant<int, 2>{});
}

// The float sums of rows after the integer sums of one more group, as the vector kernels form them.
template <int V>
void scale_int8(const uint16_t* halves, const Inputs& x, int row, int rows, int group,
                const int32_t (*dots)[kPanel], float (*sums)[kPanel]) {
  vf scale[V];
  for (int v = 0; v < V; ++v) scale[v] = load_half(halves + v * kLanes);
  for (int m = 0; m < rows; ++m) {
    size_t place = size_t(row + m) * x.groups + group;
    vi term = all_i(((const int32_t*)x.term)[place]);
    vf factor = all(x.scale[place]);
    for (int v = 0; v < V; ++v) {
      vi dot = add_i(load_i(dots[m] + v * kLanes), term);
      float* sum = sums[m] + v * kLanes;
      ::store(sum, fma(to_float(dot), mul(scale[v], factor), load(sum)));
    }
  }
}

// The integer sums of 32 rows over a group: registers 0 to 2 hold those of the upper rows, 3 to 5 of the
// lower ones. In turns that keep the one of two inputs which was read last.
template <int V, typename F>
void multiply_group(const uint8_t* in, ptrdiff_t row_bytes, const uint8_t* weights, int steps, int32_t (*dots)[kPanel],
                    F between) {
  constexpr int kLow = 3, kIn = 6, kWeight = 7, kInner = 64, kPitch = V * kLanes * 4;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(), tile_zero<4>(), tile_zero<5>();
  for (int step = 0; step < steps; ++step) {
    const uint8_t *high = in + step * kInner, *low = high + kTileRows * row_bytes;
    const uint8_t* from = weights + size_t(step) * (kInner / 4) * kPitch;
    each_vector(V, [&](auto v) {
      constexpr int first = v % 2 ? kLow : 0, second = kLow - first;
      tile_load<kWeight>(from + v * 64, kPitch);
      if (v == 0) tile_load<kIn>(high, row_bytes);
      tile_dot_s8u8<first + v, kIn, kWeight>();
      tile_load<kIn>(v % 2 ? high : low, row_bytes);
      tile_dot_s8u8<second + v, kIn, kWeight>();
    });
    between(step);
  }
  each_vector(V, [&](auto v) {
    tile_store<v()>(&dots[0][v * kLanes], kPanel * 4);
    tile_store<kLow + v>(&dots[kTileRows][v * kLanes], kPanel * 4);
  });
}

// The float sums of rows in whole blocks. Those of a block are scaled between the products of the next.
template <int V>
void wide_sums(const Weight& w, const Inputs& x, int row, int rows, int panel, float (*sums)[kPanel]) {
  constexpr int width = V * kLanes;
  alignas(64) int32_t dots[2][kBlockRows][kPanel];
  std::memset(sums, 0, size_t(rows) * sizeof(sums[0]));
  const uint8_t* data = w.panel(panel);
  int steps = w.group / 64, side = 0, last_group = -1, last_block = 0;
  auto scale = [&](int first, int stop) {
    const uint16_t* halves = (const uint16_t*)(data + size_t(width) * (w.k_padded + 2 * last_group));
    int at = last_block + first;
    scale_int8<V>(halves, x, row + at, stop - first, last_group, dots[1 - side] + first, sums + at);
  };
  for (int group = 0; group < x.groups; ++group)
    for (int block = 0; block < rows; block += kBlockRows) {
      const uint8_t* in = x.data + size_t(row + block) * x.row_bytes + group * w.group;
      const uint8_t* weights = data + size_t(width) * group * w.group;
      multiply_group<V>(in, x.row_bytes, weights, steps, dots[side], [&](int step) {
        if (last_group >= 0) scale(kBlockRows * step / steps, kBlockRows * (step + 1) / steps);
      });
      side = 1 - side, last_group = group, last_block = block;
    }
  scale(0, kBlockRows);
}

// Bias, and the columns that there are.
inline void put_panel_rows(const Weight& w, int panel, const float (*sums)[kPanel], int rows, float* out,
                           ptrdiff_t stride, Store mode) {
  for (int v = 0; v < w.width(panel) / kLanes; ++v) {
    int columns = w.n - panel * kPanel - v * kLanes;
    if (columns <= 0) return;
    vf bias = bias_of(w, panel, v);
    for (int m = 0; m < rows; ++m) {
      vf sum = add(load(sums[m] + v * kLanes), bias);
      put_row<1>(out + m * stride + v * kLanes, &sum, columns < kLanes ? columns : kLanes, mode);
    }
  }
}

// Products of the first rows, as many as there are in whole blocks; returns their number.
int wide_int8(const Weight& w, const Inputs& x, int row_start, int row_stop, int panel, float* out, ptrdiff_t stride,
              Store mode) {
  int count = (row_stop - row_start) / kBlockRows * kBlockRows;
  if (w.group % 64 || !count) return 0;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
  tile_configure(config);
  alignas(64) float sums[kWideRows][kPanel];
  for (int done = 0; done < count; done += kWideRows) {
    int rows = count - done < kWideRows ? count - done : kWideRows, row = row_start + done;
    if (w.width(panel) == kPanel) wide_sums<3>(w, x, row, rows, panel, sums);
    else if (w.width(panel) == 2 * kLanes) wide_sums<2>(w, x, row, rows, panel, sums);
    else wide_sums<1>(w, x, row, rows, panel, sums);
    put_panel_rows(w, panel, sums, rows, out + ptrdiff_t(done) * stride, stride, mode);
  }
  return count;
}

}  // namespace
