// The two products of attention by AMX tiles: up to 16 queries with the pages of a span.
//
// Pages are stored as tiles read them: keys in pairs (bfloat16) or quads (int8) of channels, values of
// slots. Integer sums are exact; bfloat16 sums in another order than `pages.h`, so every query of it
// goes through tiles, whatever its companions.
#pragma once

#include "../../cpu/tiles.h"
#include "../../cpu/types.h"
#include "../../cpu/vec.h"

namespace {

// Registers: 0 to 3 hold sums, 4 and 5 the operands; 6 and 7 those of channels that fill no tile.
constexpr int kLeft = 4, kRight = 5, kLastLeft = 6, kLastRight = 7;

template <typename T>
constexpr int kInnerValues = 64 / int(sizeof(T));

// Columns of 16, up to four of them, with the register of their sums.
template <typename F>
inline void each_column(int count, F f) {
  f(std::integral_constant<int, 0>{});
  if (count > 1) f(std::integral_constant<int, 1>{});
  if (count > 2) f(std::integral_constant<int, 2>{});
  if (count > 3) f(std::integral_constant<int, 3>{});
}

template <typename T>
void configure_attention(int queries, int dim) {
  int left = dim % kInnerValues<T> * int(sizeof(T));
  left = left ? left : 64;
  TileConfig config;
  for (int sum = 0; sum < 4; ++sum) config.set(sum, queries, 64);
  config.set(kLeft, queries, 64), config.set(kRight, 16, 64);
  config.set(kLastLeft, queries, left), config.set(kLastRight, left / 4, 64);
  tile_configure(config);
}

// After 0.3 µs without a product the unit falls asleep, and it takes as long to wake (measured on
// Sapphire Rapids). One whose sums nobody reads keeps it awake.
template <typename T>
inline void keep_tiles_awake() {
  if constexpr (sizeof(T) == 1) tile_dot_s8u8<0, kLeft, kRight>();
  else tile_dot_bf16<0, kLeft, kRight>();
}

// What is left to do between products, in equal shares of 16 numbers; the unit needs few instructions.
struct Nothing {
  void operator()(int, int) const {}
};

// Products of the configured queries, `pitch` values apart, with a page's keys, rows of a span apart;
// `between(first, last)` is called for shares of the numbers 0 to 15 on the way.
template <typename T, typename Between = Nothing>
void tile_scores(const T* q, int pitch, const T* keys, int dim, float* out, Between between = {}) {
  constexpr int kInner = kInnerValues<T>, kColumns = kPage / 16;
  constexpr ptrdiff_t kPitch = kPage * 4;
  const uint8_t* from = (const uint8_t*)keys;
  auto add_up = [&](auto left, auto right, const uint8_t* row) {
    each_column(kColumns, [&](auto c) {
      tile_load<right()>(row + c * 64, kPitch);
      if constexpr (sizeof(T) == 1) tile_dot_s8u8<c(), left(), right()>();
      else tile_dot_bf16<c(), left(), right()>();
    });
  };
  each_column(kColumns, [](auto c) { tile_zero<c()>(); });
  int d = 0, whole = dim / kInner, done = 0;
  for (int step = 1; step <= whole; ++step, d += kInner, from += 16 * kPitch) {
    tile_load<kLeft>(q + d, pitch * sizeof(T));
    add_up(std::integral_constant<int, kLeft>{}, std::integral_constant<int, kRight>{}, from);
    between(done, 16 * step / whole);
    done = 16 * step / whole;
  }
  if (done < 16) between(done, 16);
  if (d < dim) {
    tile_load<kLastLeft>(q + d, pitch * sizeof(T));
    add_up(std::integral_constant<int, kLastLeft>{}, std::integral_constant<int, kLastRight>{}, from);
  }
  each_column(kColumns, [&](auto c) { tile_store<c()>(out + c * 16, kSpan * 4); });
}

// Makes scores of integer products: `terms` are -128 times the sums of the queries' integers.
template <typename T>
void add_terms(const int* terms, int queries, float* out) {
  if constexpr (sizeof(T) == 1)
    for (int r = 0; r < queries; ++r)
      for (int s = 0; s < kPage; s += kLanes) {
        float* place = out + r * kSpan + s;
        store(place, to_float(add_i(load_i(place), all_i(terms[r]))));
      }
}

// Products of up to 16 queries and the keys of a page by channels that fill one tile: the keys stay in the
// registers, whatever queries come.
constexpr int kQueryTile0 = 3, kKeyTile0 = 4;

template <typename T>
void configure_peaks(int queries, int channels) {
  TileConfig config;
  int bytes = channels * int(sizeof(T));
  for (int sum = 0; sum < kQueryTile0; ++sum) config.set(sum, queries, 64);
  config.set(kQueryTile0, queries, bytes);
  for (int column = 0; column < 4; ++column) config.set(kKeyTile0 + column, bytes / 4, 64);
  tile_configure(config);
}

template <typename T>
void load_peak_keys(const T* keys) {
  each_column(4, [&](auto c) { tile_load<kKeyTile0 + c()>((const uint8_t*)keys + c() * 64, kPage * 4); });
}

template <typename T>
void peak_scores(const T* q, int pitch, float* out) {
  tile_load<kQueryTile0>(q, pitch * sizeof(T));
  each_column(4, [&](auto c) {
    constexpr int sum = c() % kQueryTile0;
    tile_zero<sum>();
    if constexpr (sizeof(T) == 1) tile_dot_s8u8<sum, kQueryTile0, kKeyTile0 + c()>();
    else tile_dot_bf16<sum, kQueryTile0, kKeyTile0 + c()>();
    tile_store<sum>(out + c() * 16, kSpan * 4);
  });
}
// sums [queries][dim] = weights [queries][kSpan] times the values of pages first ... last - 1 of a span.
// While a page's values are added up for the first time, `between(page + 1, first, last)` is called for
// shares of the numbers 0 to 15: to make the weights of the next page.
template <typename T, typename Pages, typename Between>
void tile_values(const T* p, const float* scale, int queries, const Pages* pages, int first, int last,
                 int dim, float* sums, Between between) {
  constexpr int kInner = kInnerValues<T>;
  ptrdiff_t pitch = ptrdiff_t(dim) * 4;
  for (int column = 0; column < dim; column += 64) {
    int columns = dim - column < 64 ? (dim - column) / 16 : 4;
    each_column(columns, [](auto c) { tile_zero<c()>(); });
    for (int page = first; page < last; ++page) {
      const uint8_t* from = (const uint8_t*)pages[page].values + column * 4;
      for (int s = 0; s < kPage; s += kInner, from += 16 * pitch) {
        tile_load<kLeft>(p + page * kPage + s, kSpan * sizeof(T));
        each_column(columns, [&](auto c) {
          tile_load<kRight>(from + c * 64, pitch);
          if constexpr (sizeof(T) == 1) tile_dot_u8s8<c(), kLeft, kRight>();
          else tile_dot_bf16<c(), kLeft, kRight>();
        });
        if (column == 0 && page + 1 < last)
          between(page + 1, s * 16 / kPage, (s + kInner) * 16 / kPage);
      }
    }
    each_column(columns, [&](auto c) { tile_store<c()>(sums + column + c * 16, pitch); });
  }
  if constexpr (sizeof(T) == 1)
    for (int r = 0; r < queries; ++r)
      for (int d = 0; d < dim; d += kLanes) {
        float* place = sums + size_t(r) * dim + d;
        store(place, mul(to_float(load_i(place)), all(scale[r])));
      }
}

}  // namespace
