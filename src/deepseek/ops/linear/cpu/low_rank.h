// Products with the two thin matrices of an adapter, in float32.
//
// Both sum in ascending order with one accumulator per output, whatever the number of rows: a row's
// result does not depend on its companions, bit by bit.
#pragma once

#include "products.h"

namespace {

template <int M>
inline void down_tile(const LowRank& a, const float* const* x, float* const* hidden, int rank) {
  const float* rows = a.down + size_t(rank) * a.k_padded;
  vf acc[M][kRankBlock];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < kRankBlock; ++r) acc[m][r] = zero();
  for (int k = 0; k < a.k_padded; k += kLanes) {
    vf w[kRankBlock];
    for (int r = 0; r < kRankBlock; ++r) w[r] = load(rows + size_t(r) * a.k_padded + k);
    for (int m = 0; m < M; ++m) {
      vf in = load(x[m] + k);
      for (int r = 0; r < kRankBlock; ++r) acc[m][r] = fma(in, w[r], acc[m][r]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < kRankBlock; ++r) hidden[m][rank + r] = a.scale * sum(acc[m][r]);
}

void low_rank_down(const LowRank& a, const float* const* x, float* const* hidden, int count, int rank) {
  int i = 0;
  for (; i + 2 <= count; i += 2) down_tile<2>(a, x + i, hidden + i, rank);
  for (; i < count; ++i) down_tile<1>(a, x + i, hidden + i, rank);
}

constexpr int kUpVectors = 3;  // of a tile: so many and their sums for four rows are in registers everywhere

template <int M>
inline void up_tile(const LowRank& a, const float* const* hidden, float* const* out, int panel, int first,
                    int columns) {
  const float* w = a.up + size_t(panel) * a.rank * kPanel + first;
  vf acc[M][kUpVectors];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kUpVectors; ++v) acc[m][v] = zero();
  for (int r = 0; r < a.rank; ++r, w += kPanel) {
    vf b[kUpVectors];
    for (int v = 0; v < kUpVectors; ++v) b[v] = load(w + v * kLanes);
    for (int m = 0; m < M; ++m) {
      vf in = all(hidden[m][r]);
      for (int v = 0; v < kUpVectors; ++v) acc[m][v] = fma(in, b[v], acc[m][v]);
    }
  }
  for (int m = 0; m < M; ++m) put_row<kUpVectors>(out[m] + first, acc[m], columns, Store::add);
}

void low_rank_up(const LowRank& a, const float* const* hidden, float* const* out, int count, int panel,
                 int columns) {
  constexpr int tile = kUpVectors * kLanes;
  for (int first = 0; first < columns; first += tile) {
    int width = columns - first < tile ? columns - first : tile, i = 0;
    for (; i + 4 <= count; i += 4) up_tile<4>(a, hidden + i, out + i, panel, first, width);
    for (; i < count; ++i) up_tile<1>(a, hidden + i, out + i, panel, first, width);
  }
}

}  // namespace
