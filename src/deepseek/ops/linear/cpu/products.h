// Products of rows of inputs with one panel of a weight, in every storage.
//
// All of them sum over k in ascending order with one accumulator per output, whatever the number of
// rows: a row's result does not depend on its companions, bit by bit.
#pragma once

#include <type_traits>

#include "inputs.h"

namespace {

inline void put(float* out, vf value, Store mode) {
  deepseek::Store s = mode;
  ::store(out, s == deepseek::Store::add ? add(load(out), value) : value);
}

inline vf bias_of(const Weight& w, int panel, int vector) {
  return w.bias ? load(w.bias + panel * kPanel + vector * kLanes) : zero();
}

// Stores the first `columns` values of a panel's row: the padded columns belong to nobody.
template <int V>
inline void put_row(float* out, const vf* values, int columns, Store mode) {
  if (columns == V * kLanes) {
    for (int v = 0; v < V; ++v) put(out + v * kLanes, values[v], mode);
    return;
  }
  float tail[V * kLanes];
  for (int v = 0; v < V; ++v) ::store(tail + v * kLanes, values[v]);
  for (int i = 0; i < columns; ++i) out[i] = mode == Store::add ? out[i] + tail[i] : tail[i];
}

struct Tile {
  const Weight& w;
  const uint8_t* data;  // of the panel
  int panel, width, offset;  // `offset`: first column inside the panel
  int columns;               // real columns from `offset` on, at most V * kLanes
};

// Bias, and the columns that there are.
template <int M, int V>
inline void put_tile(const Tile& t, vf (&sums)[M][V], float* out, ptrdiff_t stride, Store mode) {
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v)
      sums[m][v] = add(sums[m][v], bias_of(t.w, t.panel, t.offset / kLanes + v));
    put_row<V>(out + m * stride, sums[m], t.columns, mode);
  }
}

template <int M, int V>
void tile_f32(const Tile& t, const Inputs& x, int row, float* out, ptrdiff_t stride, Store mode) {
  vf acc[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) acc[m][v] = zero();
  const float* w = (const float*)t.data + t.offset;
  const float* in[M];
  for (int m = 0; m < M; ++m) in[m] = (const float*)(x.data + (row + m) * x.row_bytes);
  for (int k = 0; k < t.w.k_padded; ++k, w += t.width) {
    vf b[V];
    for (int v = 0; v < V; ++v) b[v] = load(w + v * kLanes);
    for (int m = 0; m < M; ++m) {
      vf a = all(in[m][k]);
      for (int v = 0; v < V; ++v) acc[m][v] = fma(a, b[v], acc[m][v]);
    }
  }
  put_tile(t, acc, out, stride, mode);
}

template <int M, int V>
void tile_bf16(const Tile& t, const Inputs& x, int row, float* out, ptrdiff_t stride, Store mode) {
  vf acc[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) acc[m][v] = zero();
  const uint8_t* w = t.data + size_t(t.offset) * 4;
  const uint16_t* in[M];
  for (int m = 0; m < M; ++m) in[m] = (const uint16_t*)(x.data + (row + m) * x.row_bytes);
  for (int k = 0; k < t.w.k_padded; k += 2, w += size_t(t.width) * 4) {
    vi b[V];
    for (int v = 0; v < V; ++v) b[v] = load_i(w + v * kLanes * 4);
    for (int m = 0; m < M; ++m) {
      Pair a = pair_of(in[m] + k);
      for (int v = 0; v < V; ++v) acc[m][v] = dot_bf16(acc[m][v], b[v], a);
    }
  }
  put_tile(t, acc, out, stride, mode);
}

// acc += the product of a quad of unsigned weights with a quad of `inputs`, exactly.
#if defined(DEEPSEEK_VNNI)
template <int M, int V>
inline void dot_quads(vi (&acc)[M][V], const vi (&b)[V], const int8_t* const (&in)[M], int quad) {
  for (int m = 0; m < M; ++m) {
    vi a = all_i(*(const Quad*)(in[m] + quad * 4));
    for (int v = 0; v < V; ++v) acc[m][v] = dot_u8s8(acc[m][v], b[v], a);
  }
}
#else
template <int M, int V>
inline void dot_quads(vi (&acc)[M][V], const vi (&b)[V], const int8_t* const (&in)[M], int quad) {
  vi even[V], odd[V];
  for (int v = 0; v < V; ++v) even[v] = even_bytes(b[v]), odd[v] = odd_bytes(b[v]);
  for (int m = 0; m < M; ++m) {
    int32_t halves[2];
    std::memcpy(halves, in[m] + quad * 8, 8);
    vi first = all_i(halves[0]), second = all_i(halves[1]);
    for (int v = 0; v < V; ++v)
      acc[m][v] = add_i(add_i(acc[m][v], madd_16(even[v], first)), madd_16(odd[v], second));
  }
}
#endif

// Integer inputs of a tile's rows, with a scale and a term for each group.
template <int M, typename Term>
struct IntegerRows {
  const int8_t* in[M];
  const float* scales[M];
  const Term* terms[M];

  IntegerRows(const Inputs& x, int row) {
    for (int m = 0; m < M; ++m) {
      in[m] = (const int8_t*)(x.data + (row + m) * x.row_bytes);
      scales[m] = x.scale + size_t(row + m) * x.groups;
      terms[m] = (const Term*)x.term + size_t(row + m) * x.groups;
    }
  }
};

template <int M, int V>
void tile_int8(const Tile& t, const Inputs& x, int row, float* out, ptrdiff_t stride, Store mode) {
  IntegerRows<M, int32_t> rows(x, row);
  vf sums[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) sums[m][v] = zero();
  const uint8_t* lane = t.data + size_t(t.offset) * 4;
  const uint16_t* halves = (const uint16_t*)(t.data + size_t(t.width) * t.w.k_padded) + t.offset;
  int quads = t.w.group / 4;
  for (int g = 0; g < x.groups; ++g, halves += t.width) {
    vi acc[M][V];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) acc[m][v] = all_i(rows.terms[m][g]);
    for (int q = 0; q < quads; ++q, lane += size_t(t.width) * 4) {
      vi b[V];
      for (int v = 0; v < V; ++v) b[v] = load_i(lane + v * kLanes * 4);
      dot_quads<M, V>(acc, b, rows.in, g * quads + q);
    }
    vf scale[V];
    for (int v = 0; v < V; ++v) scale[v] = load_half(halves + v * kLanes);
    for (int m = 0; m < M; ++m) {
      vf a = all(rows.scales[m][g]);
      for (int v = 0; v < V; ++v)
        sums[m][v] = fma(to_float(acc[m][v]), mul(scale[v], a), sums[m][v]);
    }
  }
  put_tile(t, sums, out, stride, mode);
}

// The integer products of a group of 32 with nibbles.
#if defined(DEEPSEEK_VNNI)
template <int M, int V>
inline void dot_nibbles(vi (&acc)[M][V], const uint8_t* w, int width, const int8_t* const (&in)[M]) {
  for (int pair = 0; pair < 4; ++pair, w += size_t(width) * 4) {
    vi low[V], high[V];
    for (int v = 0; v < V; ++v) {
      vi both = load_i(w + v * kLanes * 4);
      low[v] = nibbles_low(both), high[v] = nibbles_high(both);
    }
    for (int m = 0; m < M; ++m) {
      vi a = all_i(*(const Quad*)(in[m] + pair * 8));
      for (int v = 0; v < V; ++v) acc[m][v] = dot_u8s8(acc[m][v], low[v], a);
    }
    for (int m = 0; m < M; ++m) {
      vi a = all_i(*(const Quad*)(in[m] + pair * 8 + 4));
      for (int v = 0; v < V; ++v) acc[m][v] = dot_u8s8(acc[m][v], high[v], a);
    }
  }
}
#else
// Eight products of a nibble and an int8 fit 16 bits: 8 * 2 * 15 * 127 < 2^15.
template <int M, int V>
inline void dot_nibbles(vi (&acc)[M][V], const uint8_t* w, int width, const int8_t* const (&in)[M]) {
  vi words[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) words[m][v] = zero_i();
  for (int pair = 0; pair < 4; ++pair, w += size_t(width) * 4) {
    vi low[V], high[V];
    for (int v = 0; v < V; ++v) {
      vi both = load_i(w + v * kLanes * 4);
      low[v] = nibbles_low(both), high[v] = nibbles_high(both);
    }
    for (int m = 0; m < M; ++m) {
      int32_t quads[2];
      std::memcpy(quads, in[m] + pair * 8, 8);
      vi first = all_i(quads[0]), second = all_i(quads[1]);
      for (int v = 0; v < V; ++v)
        words[m][v] = add_16(words[m][v], add_16(madd_ub(low[v], first), madd_ub(high[v], second)));
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) acc[m][v] = add_i(acc[m][v], madd_16(words[m][v], all_16(1)));
}
#endif

template <int M, int V>
void tile_int4(const Tile& t, const Inputs& x, int row, float* out, ptrdiff_t stride, Store mode) {
  IntegerRows<M, float> rows(x, row);
  vf sums[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) sums[m][v] = zero();
  const uint8_t* w = t.data;
  for (int g = 0; g < x.groups; ++g) {
    vi acc[M][V];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) acc[m][v] = zero_i();
    for (int part = 0; part < t.w.group; part += 32) {
      dot_nibbles<M, V>(acc, w + size_t(t.offset) * 4, t.width, rows.in);
      w += size_t(t.width) * 16;
      for (int m = 0; m < M; ++m) rows.in[m] += 32;
    }
    const uint16_t* half = (const uint16_t*)w + t.offset;
    vf scale[V], least[V];
    for (int v = 0; v < V; ++v) {
      scale[v] = load_half(half + v * kLanes);
      least[v] = load_half(half + t.width + v * kLanes);
    }
    w += size_t(t.width) * 4;
    for (int m = 0; m < M; ++m) {
      vf a = all(rows.scales[m][g]), b = all(rows.terms[m][g]);
      for (int v = 0; v < V; ++v) {
        sums[m][v] = fma(mul(to_float(acc[m][v]), a), scale[v], sums[m][v]);
        sums[m][v] = fma(b, least[v], sums[m][v]);
      }
    }
  }
  put_tile(t, sums, out, stride, mode);
}

// Rows of a tile: as many sums as registers hold. int4 needs two for each, one of integers.
#if defined(__AVX512F__)
constexpr int kTileVectors = 3, kMostRows = 8, kMostRowsInt4 = 4;
#else
constexpr int kTileVectors = 2, kMostRows = 4, kMostRowsInt4 = 2;
#endif

template <int M, int V>
void tile(const Tile& t, const Inputs& x, int row, float* out, ptrdiff_t stride, Store mode) {
  switch (t.w.kind) {
    case Kind::f32: return tile_f32<M, V>(t, x, row, out, stride, mode);
    case Kind::bf16: return tile_bf16<M, V>(t, x, row, out, stride, mode);
    case Kind::int8: return tile_int8<M, V>(t, x, row, out, stride, mode);
    case Kind::int4:
      if constexpr (M <= kMostRowsInt4) tile_int4<M, V>(t, x, row, out, stride, mode);
  }
}

template <int V>
void tiles(const Tile& t, const Inputs& x, int start, int stop, float* out, ptrdiff_t stride,
           Store mode) {
  int row = start, most = t.w.kind == Kind::int4 ? kMostRowsInt4 : kMostRows;
  auto run = [&](auto rows) {
    constexpr int M = decltype(rows)::value;
    for (; M <= most && row + M <= stop; row += M, out += M * stride)
      tile<M, V>(t, x, row, out, stride, mode);
  };
  if constexpr (kMostRows > 4) run(std::integral_constant<int, 8>{});
  run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

void linear(const Weight& w, const Inputs& x, int row_start, int row_stop, int panel, float* out,
            ptrdiff_t stride, Store mode) {
  int width = w.width(panel), left = w.n - panel * kPanel;
  for (int offset = 0; offset < width;) {
    int vectors = (width - offset) / kLanes;
    vectors = vectors < kTileVectors ? vectors : kTileVectors;
    int columns = left - offset < vectors * kLanes ? left - offset : vectors * kLanes;
    Tile t{w, w.panel(panel), panel, width, offset, columns};
    if (columns > 0) {
      if (vectors == 1) tiles<1>(t, x, row_start, row_stop, out + offset, stride, mode);
      if (vectors == 2) tiles<2>(t, x, row_start, row_stop, out + offset, stride, mode);
      if constexpr (kTileVectors > 2)
        if (vectors == 3) tiles<3>(t, x, row_start, row_stop, out + offset, stride, mode);
    }
    offset += vectors * kLanes;
  }
}

// silu(gate) * up of the rows start ... stop - 1, in the columns of one panel, by the products of `Linear`.
// `scratch` holds 2 * kSwigluRows * kPanel floats.
template <auto Linear>
void swiglu_by(const Weight& gate, const Weight& up, const Inputs& x, int start, int stop, int panel,
               float* scratch, float* out, ptrdiff_t stride) {
  int width = gate.width(panel), left = gate.n - panel * kPanel, columns = left < width ? left : width;
  float* ups = scratch + kSwigluRows * kPanel;
  for (int r = start; r < stop; r += kSwigluRows) {
    int end = stop < r + kSwigluRows ? stop : r + kSwigluRows;
    Linear(gate, x, r, end, panel, scratch, kPanel, Store::set);
    Linear(up, x, r, end, panel, ups, kPanel, Store::set);
    for (int i = r; i < end; ++i) {
      float* values = scratch + (i - r) * kPanel;
      silu_mul(values, ups + (i - r) * kPanel, values, width);
      std::memcpy(out + (i - start) * stride, values, columns * sizeof(float));
    }
  }
}

}  // namespace
