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

constexpr int kTileQueries = 16;
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

// Scores of `queries` vectors with a page's keys, rows of a span apart. Integer ones start from
// `terms`, -128 times the sum of a query's integers.
template <typename T>
void tile_scores(const T* q, const int* terms, int queries, const T* keys, int dim, float* out) {
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
  int d = 0;
  for (; d + kInner <= dim; d += kInner, from += 16 * kPitch) {
    tile_load<kLeft>(q + d, dim * sizeof(T));
    add_up(std::integral_constant<int, kLeft>{}, std::integral_constant<int, kRight>{}, from);
  }
  if (d < dim) {
    tile_load<kLastLeft>(q + d, dim * sizeof(T));
    add_up(std::integral_constant<int, kLastLeft>{}, std::integral_constant<int, kLastRight>{}, from);
  }
  each_column(kColumns, [&](auto c) { tile_store<c()>(out + c * 16, kSpan * 4); });
  if constexpr (sizeof(T) == 1)
    for (int r = 0; r < queries; ++r)
      for (int s = 0; s < kPage; s += kLanes) {
        float* place = out + r * kSpan + s;
        store(place, to_float(add_i(load_i(place), all_i(terms[r]))));
      }
}

// sums [queries][dim] = weights [queries][kSpan] times the values of pages first ... last - 1 of a span.
template <typename T, typename Pages>
void tile_values(const T* p, const float* scale, int queries, const Pages* pages, int first, int last,
                 int dim, float* sums) {
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
