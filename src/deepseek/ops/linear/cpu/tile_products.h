// Products by AMX tiles: 16 or 32 rows of inputs with the 48 columns of a panel at a time.
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
  put_panel_rows(w, panel, sums, rows, out, stride, mode);
}

// A row's products are summed over all its channels before anything is scaled.
inline bool sums_whole_rows(const Weight& w) {
  if (w.kind == Kind::bf16) return w.k_padded % 32 == 0;
  return w.kind == Kind::int8 && w.groups() == 1 && w.k_padded % 64 == 0;
}

constexpr int kBlockRows = 2 * kTileRows;

void configure_blocks() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
  tile_configure(config);
}

// The sums of 32 rows of whole tiles, 64 bytes of inputs at a time: a tile of weights meets two of
// inputs, in turns that keep the one of the two which was read last. The unit takes 16 cycles for a
// product and hardly any instructions: `between(first, last)` is called for shares of the numbers 0
// to 31 on the way, before the sums are stored.
template <bool is_bf16, typename Sum, typename Between>
void multiply_rows(const Weight& w, const Inputs& x, int row, int panel, Sum (*sums)[kPanel], Between between) {
  constexpr int kLow = 3, kIn = 6, kWeight = 7;
  int width = w.width(panel), vectors = width / kLanes, steps = w.k_padded * (is_bf16 ? 2 : 1) / 64;
  auto dot = [](auto to, auto in, auto weight) {
    if constexpr (is_bf16) tile_dot_bf16<to(), in(), weight()>();
    else tile_dot_s8u8<to(), in(), weight()>();
  };
  clear_sums(), tile_zero<kLow>(), tile_zero<kLow + 1>(), tile_zero<kLow + 2>();
  const uint8_t* high = x.data + size_t(row) * x.row_bytes;
  const uint8_t* from = w.panel(panel);
  ptrdiff_t pitch = ptrdiff_t(width) * 4, in_pitch = x.row_bytes;
  std::integral_constant<int, kIn> inputs;
  std::integral_constant<int, kWeight> weights;
  int done = 0;
  for (int step = 1; step <= steps; ++step, high += 64, from += 16 * pitch) {
    const uint8_t* low = high + kTileRows * in_pitch;
    each_vector(vectors, [&](auto v) {
      constexpr int first = v % 2 ? kLow : 0, second = kLow - first;
      tile_load<kWeight>(from + v * 64, pitch);
      if (v == 0) tile_load<kIn>(high, in_pitch);
      dot(std::integral_constant<int, first + v>{}, inputs, weights);
      tile_load<kIn>(v % 2 ? high : low, in_pitch);
      dot(std::integral_constant<int, second + v>{}, inputs, weights);
    });
    int next = kBlockRows * step / steps;
    between(done, next);
    done = next;
  }
  each_vector(vectors, [&](auto v) {
    tile_store<v()>(&sums[0][v * kLanes], kPanel * 4);
    tile_store<kLow + v>(&sums[kTileRows][v * kLanes], kPanel * 4);
  });
}

// Makes outputs of the sums of a panel's columns: those of int8 rows, which have one scale, are
// scaled as the vector kernels do it.
template <bool is_bf16, int V>
struct Columns {
  using Sum = std::conditional_t<is_bf16, float, int32_t>;
  vf scale[V], bias[V];

  Columns(const Weight& w, int panel) {
    const uint16_t* halves = (const uint16_t*)(w.panel(panel) + size_t(w.width(panel)) * w.k_padded);
    for (int v = 0; v < V; ++v) {
      if constexpr (!is_bf16) scale[v] = load_half(halves + v * kLanes);
      bias[v] = bias_of(w, panel, v);
    }
  }

  void values(const Sum* sums, const Inputs& x, int row, vf* to) const {
    for (int v = 0; v < V; ++v)
      if constexpr (is_bf16) {
        to[v] = add(load(sums + v * kLanes), bias[v]);
      } else {
        vi dot = add_i(load_i(sums + v * kLanes), all_i(((const int32_t*)x.term)[row]));
        to[v] = add(mul(to_float(dot), mul(scale[v], all(x.scale[row]))), bias[v]);
      }
  }
};

// Rows in blocks of 32; those of a block are written between the products of the next.
template <bool is_bf16, int V>
void blocks_of_rows(const Weight& w, const Inputs& x, int row, int blocks, int panel, float* out,
                    ptrdiff_t stride, Store mode) {
  using Sum = typename Columns<is_bf16, V>::Sum;
  Columns<is_bf16, V> columns(w, panel);
  int count = w.n - panel * kPanel < V * kLanes ? w.n - panel * kPanel : V * kLanes;
  alignas(64) Sum sums[kBlockRows][kPanel];
  auto write = [&](int block, int first, int last) {
    for (int m = first; m < last; ++m) {
      vf values[V];
      columns.values(sums[m], x, row + block * kBlockRows + m, values);
      put_row<V>(out + (block * kBlockRows + m) * stride, values, count, mode);
    }
  };
  configure_blocks();
  multiply_rows<is_bf16>(w, x, row, panel, sums, [](int, int) {});
  for (int block = 1; block < blocks; ++block)
    multiply_rows<is_bf16>(w, x, row + block * kBlockRows, panel, sums,
                           [&](int first, int last) { write(block - 1, first, last); });
  write(blocks - 1, 0, kBlockRows);
}

// silu(gate) * up of rows in blocks of 32, of which each is written between the two products of the next.
template <bool is_bf16, int V>
void blocks_of_swiglu(const Weight& gate, const Weight& up, const Inputs& x, int row, int blocks, int panel,
                      float* out, ptrdiff_t stride) {
  using Sum = typename Columns<is_bf16, V>::Sum;
  Columns<is_bf16, V> of_gate(gate, panel), of_up(up, panel);
  int count = gate.n - panel * kPanel < V * kLanes ? gate.n - panel * kPanel : V * kLanes;
  alignas(64) Sum gates[2][kBlockRows][kPanel], ups[kBlockRows][kPanel];
  auto write = [&](int block, int first, int last) {
    for (int m = first; m < last; ++m) {
      int place = row + block * kBlockRows + m;
      vf values[V], factors[V];
      of_gate.values(gates[block % 2][m], x, place, values);
      of_up.values(ups[m], x, place, factors);
      for (int v = 0; v < V; ++v) values[v] = silu_mul(values[v], factors[v]);
      put_row<V>(out + (block * kBlockRows + m) * stride, values, count, Store::set);
    }
  };
  configure_blocks();
  for (int block = 0; block < blocks; ++block) {
    auto half = [&](int offset) {
      return [&, offset](int first, int last) {
        if (block > 0) write(block - 1, offset + first / 2, offset + last / 2);
      };
    };
    int start = row + block * kBlockRows;
    multiply_rows<is_bf16>(gate, x, start, panel, gates[block % 2], half(0));
    multiply_rows<is_bf16>(up, x, start, panel, ups, half(kTileRows));
  }
  write(blocks - 1, 0, kBlockRows);
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

template <int V>
void scale_int4(const uint16_t* halves, const Inputs& x, int row, int rows, int group,
                const int32_t (*dots)[kPanel], float (*sums)[kPanel]) {
  vf scale[V], least[V];
  for (int v = 0; v < V; ++v) {
    scale[v] = load_half(halves + v * kLanes);
    least[v] = load_half(halves + V * kLanes + v * kLanes);
  }
  for (int m = 0; m < rows; ++m) {
    size_t place = size_t(row + m) * x.groups + group;
    vf factor = all(x.scale[place]), term = all(((const float*)x.term)[place]);
    for (int v = 0; v < V; ++v) {
      float* sum = sums[m] + v * kLanes;
      vf dot = to_float(load_i(dots[m] + v * kLanes));
      ::store(sum, fma(term, least[v], fma(mul(dot, factor), scale[v], load(sum))));
    }
  }
}

void configure_integer(int rows, int inner) {
  TileConfig config;
  for (int v = 0; v < 3; ++v) config.set(kSums + v, rows, 64), config.set(kWeights + v, inner / 4, 64);
  config.set(kInput, rows, inner);
  tile_configure(config);
}

// Integer products of `rows` rows: a multiple of 16, or fewer than 16. Sums are scaled while the
// products of the rows after them are on their way.
template <bool is_int4, int V>
void tiles_integer(const Weight& w, const Inputs& x, int row, int rows, int panel, float* out,
                   ptrdiff_t stride, Store mode) {
  constexpr int width = V * kLanes;
  int inner = w.group < 64 ? w.group : 64, high = rows < kTileRows ? rows : kTileRows;
  alignas(64) float sums[kChunkRows][kPanel];
  std::memset(sums, 0, size_t(rows) * sizeof(sums[0]));
  alignas(64) int32_t dots[2][kTileRows][kPanel];
  alignas(64) uint8_t bytes[64 * kPanel];
  const uint8_t* data = w.panel(panel);
  size_t group_bytes = size_t(width) * (is_int4 ? w.group / 2 + 4 : w.group);
  auto multiply = [&](int group, int start) {
    const uint8_t* from = data + group * group_bytes;
    clear_sums();
    for (int k = 0; k < w.group; k += inner) {
      if (start == 0 || w.group > inner) {
        const uint8_t* weights = from + size_t(width) * k;
        if (is_int4) {
          unpack_nibbles(from + size_t(width) * (k / 2), width, inner, bytes);
          weights = bytes;
        }
        each_vector(V, [&](auto v) { tile_load<kWeights + v>(weights + v * 64, width * 4); });
      }
      tile_load<kInput>(x.data + (row + start) * x.row_bytes + group * w.group + k, x.row_bytes);
      each_vector(V, [&](auto v) { tile_dot_s8u8<kSums + v, kInput, kWeights + v>(); });
    }
  };
  auto scale = [&](int group, int start, const int32_t (*from)[kPanel]) {
    const uint8_t* halves = is_int4 ? data + group * group_bytes + size_t(width) * (w.group / 2)
                                    : data + size_t(width) * (w.k_padded + 2 * group);
    auto by = is_int4 ? scale_int4<V> : scale_int8<V>;
    by((const uint16_t*)halves, x, row + start, high, group, from, sums + start);
  };
  int side = 0, last_group = -1, last_start = 0;
  for (int group = 0; group < x.groups; ++group)
    for (int start = 0; start < rows; start += kTileRows) {
      multiply(group, start);
      int32_t* place = dots[side][0];
      each_vector(V, [&](auto v) { tile_store<kSums + v>(place + v * kLanes, kPanel * 4); });
      side = 1 - side;
      if (last_group >= 0) scale(last_group, last_start, dots[side]);
      last_group = group, last_start = start;
    }
  scale(last_group, last_start, dots[1 - side]);
  put_panel_rows(w, panel, sums, rows, out, stride, mode);
}

// Calls f with the vectors of a panel's width.
template <typename F>
inline void with_vectors(int width, F f) {
  if (width == kLanes) f(std::integral_constant<int, 1>{});
  if (width == 2 * kLanes) f(std::integral_constant<int, 2>{});
  if (width == 3 * kLanes) f(std::integral_constant<int, 3>{});
}

void tile_linear(const Weight& w, const Inputs& x, int row_start, int row_stop, int panel,
                 float* out, ptrdiff_t stride, Store mode) {
  bool is_bf16 = w.kind == Kind::bf16;
  if (w.kind == Kind::f32 || (!is_bf16 && row_stop - row_start < kFewestTileRows))
    return linear(w, x, row_start, row_stop, panel, out, stride, mode);
  int row = row_start, blocks = (row_stop - row_start) / kBlockRows;
  if (sums_whole_rows(w) && blocks > 0) {
    with_vectors(w.width(panel), [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      if (is_bf16) blocks_of_rows<true, V>(w, x, row, blocks, panel, out, stride, mode);
      else blocks_of_rows<false, V>(w, x, row, blocks, panel, out, stride, mode);
    });
    row += blocks * kBlockRows;
  }
  // weights of a group of one tile stay in their registers while more rows go by
  int most = is_bf16 || w.group > 64 ? kTileRows : kChunkRows, configured = 0;
  while (row < row_stop) {
    int rows = row_stop - row < most ? row_stop - row : most;
    if (rows > kTileRows) rows -= rows % kTileRows;
    float* to = out + ptrdiff_t(row - row_start) * stride;
    if (is_bf16) tiles_bf16(w, x, row, rows, panel, to, stride, mode);
    else {
      int high = rows < kTileRows ? rows : kTileRows;
      if (high != configured) configure_integer(configured = high, w.group < 64 ? w.group : 64);
      with_vectors(w.width(panel), [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        if (w.kind == Kind::int4) tiles_integer<true, V>(w, x, row, rows, panel, to, stride, mode);
        else tiles_integer<false, V>(w, x, row, rows, panel, to, stride, mode);
      });
    }
    row += rows;
  }
  tile_release();
}

void tile_swiglu(const Weight& gate, const Weight& up, const Inputs& x, int row_start, int row_stop, int panel,
                 float* scratch, float* out, ptrdiff_t stride) {
  int blocks = (row_stop - row_start) / kBlockRows, row = row_start + blocks * kBlockRows;
  if (!sums_whole_rows(gate) || !sums_whole_rows(up) || gate.kind != up.kind) blocks = 0, row = row_start;
  if (blocks > 0) {
    with_vectors(gate.width(panel), [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      auto run = gate.kind == Kind::bf16 ? blocks_of_swiglu<true, V> : blocks_of_swiglu<false, V>;
      run(gate, up, x, row_start, blocks, panel, out, stride);
    });
    tile_release();
  }
  swiglu_by<tile_linear>(gate, up, x, row, row_stop, panel, scratch, out + (row - row_start) * stride, stride);
}

}  // namespace
