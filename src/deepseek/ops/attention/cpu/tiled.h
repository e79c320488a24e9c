// Attention with gradients, a page of keys and the rows that see it at a time: softmax as it comes, and made
// again in the backward pass, so that no scores are kept.
//
// Products are of float32 vectors, or of bfloat16 tiles where there are AMX tiles, with sums in float32.
//
// Source: Dao et al., "FlashAttention" (2205.14135), section 3.1 and appendix B. Here the rows of a page are
// those whose lists name it, gathered.
#pragma once

#include <type_traits>

#include "../../cpu/types.h"
#include "../../cpu/vec.h"
#if defined(DEEPSEEK_AMX) || defined(DEEPSEEK_AMX_EMULATED)
#include "../../cpu/tiles.h"
#define DEEPSEEK_TILED_BF16 1
#endif

namespace {

using deepseek::Kind;
using deepseek::kTiledRows;
using deepseek::TiledPage;
using deepseek::TiledUnit;

constexpr float kHidden = -1e30f;
constexpr int kForwardRows = 64, kBackwardRows = 32;

// A matrix [m][k] by the distances of its rows and columns.
template <typename T>
struct Left {
  const T* data;
  ptrdiff_t row, column;
};

// sums [m][n] = (or, where `adds`, +=) a [m][k] times b, of float32 [k][n], rows `b_pitch` apart. n is a multiple
// of two vectors, m of 16.
template <int Rows>
inline void block_product(int k, Left<float> a, const float* b, ptrdiff_t b_pitch, float* c, ptrdiff_t c_pitch,
                          bool adds) {
  vf sums[Rows][2];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < 2; ++v) sums[r][v] = adds ? load(c + r * c_pitch + v * kLanes) : zero();
  for (int i = 0; i < k; ++i) {
    vf first = load(b + i * b_pitch), second = load(b + i * b_pitch + kLanes);
    for (int r = 0; r < Rows; ++r) {
      vf x = all(a.data[r * a.row + i * a.column]);
      sums[r][0] = fma(x, first, sums[r][0]), sums[r][1] = fma(x, second, sums[r][1]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < 2; ++v) store(c + r * c_pitch + v * kLanes, sums[r][v]);
}

inline void product(int m, int n, int k, Left<float> a, const float* b, ptrdiff_t b_pitch, float* c,
                    ptrdiff_t c_pitch, bool adds) {
#if defined(__AVX512F__)
  constexpr int kRows = 8;
#else
  constexpr int kRows = 4;
#endif
  for (int column = 0; column < n; column += 2 * kLanes)
    for (int row = 0; row < m; row += kRows)
      block_product<kRows>(k, {a.data + row * a.row, a.row, a.column}, b + column, b_pitch,
                           c + row * c_pitch + column, c_pitch, adds);
}

// Numbers of a column of a right matrix that lie side by side.
template <typename T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1;

#if defined(DEEPSEEK_TILED_BF16)

inline void configure_tiled() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
  tile_configure(config);
}

// The same of bfloat16: a's columns lie side by side, b is [k / 2][n][2], rows of pairs `b_pitch` apart. Registers 0
// to 3 hold sums, 4 and 5 rows of a, 6 and 7 columns of b. k and n are multiples of 32.
inline void product(int m, int n, int k, Left<uint16_t> a, const uint16_t* b, ptrdiff_t b_pitch, float* c,
                    ptrdiff_t c_pitch, bool adds) {
  ptrdiff_t a_bytes = a.row * 2, b_bytes = b_pitch * 2, c_bytes = c_pitch * 4;
  for (int row = 0; row < m; row += 32) {
    bool is_pair = row + 32 <= m;
    for (int column = 0; column < n; column += 32) {
      float* to = c + row * c_pitch + column;
      if (adds) {
        tile_load<0>(to, c_bytes), tile_load<1>(to + 16, c_bytes);
        if (is_pair) tile_load<2>(to + 16 * c_pitch, c_bytes), tile_load<3>(to + 16 * c_pitch + 16, c_bytes);
      } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      }
      for (int i = 0; i < k; i += 32) {
        const uint16_t* from = a.data + row * a.row + i;
        const uint16_t* right = b + (i / 2) * b_pitch + column * 2;
        tile_load<4>(from, a_bytes), tile_load<6>(right, b_bytes), tile_load<7>(right + 32, b_bytes);
        tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<1, 4, 7>();
        if (is_pair) {
          tile_load<5>(from + 16 * a.row, a_bytes);
          tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
        }
      }
      tile_store<0>(to, c_bytes), tile_store<1>(to + 16, c_bytes);
      if (is_pair) tile_store<2>(to + 16 * c_pitch, c_bytes), tile_store<3>(to + 16 * c_pitch + 16, c_bytes);
    }
  }
}

// The transpose of 16 x 16 numbers of 32 bits, rows some bytes apart.
inline void transpose_16(const void* from, ptrdiff_t from_bytes, void* to, ptrdiff_t to_bytes) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512((const uint8_t*)from + i * from_bytes);
  for (int i = 0; i < 16; i += 2)
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 j + i] holds in its quarter q the column 4 q + i of rows 4 j ... 4 j + 3
  for (int i = 0; i < 4; ++i) {
    __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    __m512i low_2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    __m512i high_2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    b[i] = _mm512_shuffle_i32x4(low, low_2, 0x88), b[8 + i] = _mm512_shuffle_i32x4(low, low_2, 0xdd);
    b[4 + i] = _mm512_shuffle_i32x4(high, high_2, 0x88), b[12 + i] = _mm512_shuffle_i32x4(high, high_2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512((uint8_t*)to + i * to_bytes, b[i]);
}

// Two rows of bfloat16, element by element in pairs: 32 of each.
inline void interleave_32(const uint16_t* first, const uint16_t* second, uint16_t* to) {
  static const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                              6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
}

// Two vectors as bfloat16, element by element in pairs.
inline void store_pairs(const vf* two, uint16_t* to) {
  static const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                                21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(two[1], two[0])));
}

// `rows` (a multiple of 32) rows of `dim` numbers, rows side by side: [dim][pitch].
inline void transpose_rows(const uint16_t* from, int rows, int dim, uint16_t* to, ptrdiff_t pitch) {
  alignas(64) uint16_t pairs[16][64];
  for (int row = 0; row < rows; row += 32)
    for (int d = 0; d < dim; d += 32) {
      for (int i = 0; i < 16; ++i) {
        const uint16_t* pair = from + (row + 2 * i) * dim + d;
        interleave_32(pair, pair + dim, pairs[i]);
      }
      for (int half = 0; half < 2; ++half)
        transpose_16(&pairs[0][32 * half], sizeof(pairs[0]), to + (d + 16 * half) * pitch + row, pitch * 2);
    }
}

#endif

template <typename T>
inline T read_as(Kind source, const void* row, int at) {
  if constexpr (sizeof(T) == 2) return ((const uint16_t*)row)[at];
  else return source == Kind::bf16 ? bf16_to_float(((const uint16_t*)row)[at]) : ((const float*)row)[at];
}

// A row of `dim` numbers as the products read it, filled up with zeros.
template <typename T>
void load_row(Kind source, const void* from, int dim, int padded, T* to) {
  for (int i = 0; i < dim; ++i) to[i] = read_as<T>(source, from, i);
  for (int i = dim; i < padded; ++i) to[i] = 0;
}

// See types.h. `along` is made first; where nobody wants it, in `scratch`.
template <typename T>
void pack_rows(Kind source, const void* from, int count, int dim, int padded, int width, void* across, void* along,
               void* scratch) {
  T* rows = (T*)scratch;
  size_t source_bytes = source == Kind::bf16 ? 2 : 4;
  for (int i = 0; i < width; ++i) {
    T* row = rows + size_t(i) * padded;
    if (i < count) load_row<T>(source, (const uint8_t*)from + size_t(i) * dim * source_bytes, dim, padded, row);
    else std::memset((void*)row, 0, padded * sizeof(T));
  }
  if constexpr (sizeof(T) == 4) {
    if (along) std::memcpy(along, rows, size_t(width) * padded * sizeof(T));
    if (across)
      for (int i = 0; i < width; ++i)
        for (int d = 0; d < padded; ++d) ((T*)across)[size_t(d) * width + i] = rows[size_t(i) * padded + d];
  } else {
#if defined(DEEPSEEK_TILED_BF16)
    if (along)
      for (int i = 0; i < width; i += 2)
        for (int d = 0; d < padded; d += 32)
          interleave_32(rows + size_t(i) * padded + d, rows + size_t(i + 1) * padded + d,
                        (uint16_t*)along + size_t(i) * padded + 2 * d);
    if (across)
      for (int i = 0; i < width; i += 16)
        for (int d = 0; d < padded; d += 32)
          transpose_16(rows + size_t(i) * padded + d, padded * 2, (uint32_t*)across + size_t(d / 2) * width + i,
                       ptrdiff_t(width) * 4);
#endif
  }
}

// Powers of two of scores less a bound; 0 where nothing is seen, and no numbers near it, which are slow.
template <typename T>
inline vf weights_of(vf x) {
  if constexpr (sizeof(T) == 2) return power_of_two<4>(x);
  vf least = all(-126.0f), kept = vmax(x, least);
  return where_less(x, least, zero(), power_of_two<7>(kept));
}

// Scores of a row as powers of two, kHidden where it does not see a slot.
inline vf shown_scores(const TiledPage& p, int row, int at, int slot, const float* scores) {
  vf x = mul(load(scores + slot), all(p.scale));
  if (p.bias) x = add(x, load(p.bias + slot));
  if (p.slopes) x = fma(all(p.slopes[row]), sub(load(p.place + slot), all(p.own[row])), x);
  if (p.shown) {
    uint32_t bits = p.shown[size_t(at) * (p.width / 32) + slot / 32] >> (slot % 32);
    x = where_bits(x, bits & ((1u << kLanes) - 1), kHidden);
  }
  return x;
}

// Rows of a page side by side: those of the unit where they are, others gathered and filled up with zeros.
template <typename T>
const T* gathered_rows(const T* from, const TiledPage& p, int start, int count, int filled, int dim, T* to) {
  if (p.is_run) return from + size_t(p.rows[start]) * dim;
  for (int i = 0; i < count; ++i)
    std::memcpy((void*)(to + size_t(i) * dim), from + size_t(p.rows[start + i]) * dim, dim * sizeof(T));
  std::memset((void*)(to + size_t(count) * dim), 0, size_t(filled - count) * dim * sizeof(T));
  return to;
}

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Memory for one call, handed out piece by piece.
class Pieces {
 public:
  explicit Pieces(void* from) : next_((uint8_t*)from) {}
  template <typename T>
  T* take(size_t count) {
    T* piece = (T*)next_;
    next_ += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

 private:
  uint8_t* next_;
};

template <typename T>
inline void store_weights(T* to, vf x) {
  if constexpr (sizeof(T) == 2) store_bf16(to, x);
  else store(to, x);
}

// Adds a page to the states of the rows that see it.
template <typename T, bool SeesAll>
void forward_page(const TiledPage p, const TiledUnit u, void* scratch) {
  Pieces pieces(scratch);
  T* gathered = pieces.take<T>(size_t(kForwardRows) * p.dim);
  T* weights = pieces.take<T>(size_t(kForwardRows) * p.width);
  float* scores = pieces.take<float>(size_t(kForwardRows) * p.width);
  float* part = pieces.take<float>(size_t(kForwardRows) * p.value_dim);
  float factors[kForwardRows];
  for (int start = 0; start < p.count; start += kForwardRows) {
    int count = std::min(kForwardRows, p.count - start), filled = round_up(count, 16);
    const T* q = gathered_rows((const T*)u.queries, p, start, count, filled, p.dim, gathered);
    product(filled, p.width, p.dim, Left<T>{q, p.dim, 1}, (const T*)p.keys_across, ptrdiff_t(p.width) * kPair<T>, scores,
            p.width, false);
    for (int i = 0; i < count; ++i) {
      int row = p.rows[start + i];
      float* x = scores + size_t(i) * p.width;
      // where all is seen, scores are scaled on the way
      float scale = SeesAll ? p.scale : 1.0f;
      vf most = all(kHidden);
      for (int slot = 0; slot < p.width; slot += kLanes) {
        vf each = SeesAll ? load(x + slot) : shown_scores(p, row, start + i, slot, x);
        most = vmax(most, each);
        if constexpr (!SeesAll) store(x + slot, each);
      }
      float top = std::max(u.top[row], largest(most) * scale);
      vf mass = zero();
      for (int slot = 0; slot < p.width; slot += kLanes) {
        vf weight = weights_of<T>(fma(load(x + slot), all(scale), all(-top)));
        mass = add(mass, weight);
        store_weights(weights + size_t(i) * p.width + slot, weight);
      }
      factors[i] = u.top[row] == top ? 1.0f : exp2f(u.top[row] - top);
      u.top[row] = top, u.mass[row] = u.mass[row] * factors[i] + sum(mass);
    }
    product(filled, p.value_dim, p.width, Left<T>{weights, p.width, 1}, (const T*)p.values_along,
            ptrdiff_t(p.value_dim) * kPair<T>, part, p.value_dim, false);
    for (int i = 0; i < count; ++i) {
      float* to = u.sums + size_t(p.rows[start + i]) * p.value_dim;
      for (int d = 0; d < p.value_dim; d += kLanes)
        store(to + d, fma(load(to + d), all(factors[i]), load(part + size_t(i) * p.value_dim + d)));
    }
  }
}

// Of up to kBackwardRows rows: weights, and the gradients of scores; rows that do not exist have zeros. As
// float32 [rows][width]; as bfloat16 in pairs of rows, and the gradients once more as rows.
template <typename T, bool SeesAll>
void make_slopes(const TiledPage& p, const TiledUnit& u, int start, int count, const float* scores, const float* inner,
                 T* weights, T* slopes, T* slope_rows) {
  constexpr int kEach = kPair<T>;
  for (int first = 0; first < kBackwardRows; first += kEach)
    for (int slot = 0; slot < p.width; slot += kLanes) {
      vf weight[kEach], slope[kEach];
      for (int i = 0; i < kEach; ++i) {
        int at = first + i;
        weight[i] = slope[i] = zero();
        if (at >= count) continue;
        int row = p.rows[start + at];
        const float* x = scores + size_t(at) * p.width;
        weight[i] = weights_of<T>(SeesAll ? fma(load(x + slot), all(p.scale), all(-u.lse[row]))
                                          : sub(shown_scores(p, row, start + at, slot, x), all(u.lse[row])));
        vf less = sub(load(inner + size_t(at) * p.width + slot), all(u.delta[row]));
        slope[i] = mul(mul(weight[i], less), all(p.slope_scale));
      }
      if constexpr (sizeof(T) == 4) {
        store(weights + size_t(first) * p.width + slot, weight[0]);
        store(slopes + size_t(first) * p.width + slot, slope[0]);
      }
#if defined(DEEPSEEK_TILED_BF16)
      if constexpr (sizeof(T) == 2) {
        store_pairs(weight, weights + size_t(first) * p.width + 2 * slot);
        store_pairs(slope, slopes + size_t(first) * p.width + 2 * slot);
        store_bf16(slope_rows + size_t(first) * p.width + slot, slope[0]);
        store_bf16(slope_rows + size_t(first + 1) * p.width + slot, slope[1]);
      }
#endif
    }
}

// Adds what the rows that see a page give to its keys and values, and what it gives to them.
template <typename T, bool SeesAll>
void backward_page(const TiledPage p, const TiledUnit u, void* scratch) {
  Pieces pieces(scratch);
  T* queries = pieces.take<T>(size_t(kTiledRows) * p.dim);
  T* gradients = pieces.take<T>(size_t(kTiledRows) * p.value_dim);
  T* queries_across = pieces.take<T>(size_t(kTiledRows) * p.dim);
  T* gradients_across = pieces.take<T>(size_t(kTiledRows) * p.value_dim);
  T* weights = pieces.take<T>(size_t(kTiledRows) * p.width);
  T* slopes = pieces.take<T>(size_t(kTiledRows) * p.width);
  T* slope_rows = pieces.take<T>(size_t(kBackwardRows) * p.width);
  float* scores = pieces.take<float>(size_t(kBackwardRows) * p.width);
  float* inner = pieces.take<float>(size_t(kBackwardRows) * p.width);
  float* part = pieces.take<float>(size_t(kBackwardRows) * p.dim);
  ptrdiff_t pitch = ptrdiff_t(p.width) * kPair<T>;
  for (int start = 0; start < p.count; start += kTiledRows) {
    int count = std::min(kTiledRows, p.count - start), filled = round_up(count, kBackwardRows);
    const T* q = gathered_rows((const T*)u.queries, p, start, count, filled, p.dim, queries);
    const T* g = gathered_rows((const T*)u.gradients, p, start, count, filled, p.value_dim, gradients);
    for (int at = 0; at < count; at += kBackwardRows) {
      const T *some = q + size_t(at) * p.dim, *given = g + size_t(at) * p.value_dim;
      int rows = std::min(kBackwardRows, count - at);
      product(kBackwardRows, p.width, p.dim, Left<T>{some, p.dim, 1}, (const T*)p.keys_across, pitch, scores, p.width, false);
      product(kBackwardRows, p.width, p.value_dim, Left<T>{given, p.value_dim, 1}, (const T*)p.values_across, pitch, inner,
              p.width, false);
      T* made = slopes + size_t(at) * p.width;
      T* by_row = sizeof(T) == 2 ? slope_rows : made;
      make_slopes<T, SeesAll>(p, u, start + at, rows, scores, inner, weights + size_t(at) * p.width, made, by_row);
      product(kBackwardRows, p.dim, p.width, Left<T>{by_row, p.width, 1}, (const T*)p.keys_along,
              ptrdiff_t(p.dim) * kPair<T>, part, p.dim, false);
      for (int i = 0; i < rows; ++i) {
        float* to = u.to_queries + size_t(p.rows[start + at + i]) * p.dim;
        for (int d = 0; d < p.dim; d += kLanes) store(to + d, add(load(to + d), load(part + size_t(i) * p.dim + d)));
      }
    }
    Left<T> queries_left{q, 1, p.dim}, gradients_left{g, 1, p.value_dim};
#if defined(DEEPSEEK_TILED_BF16)
    if constexpr (sizeof(T) == 2) {
      if (p.is_run) {
        queries_left = {(const T*)u.queries_across + p.rows[start], u.pitch, 1};
        gradients_left = {(const T*)u.gradients_across + p.rows[start], u.pitch, 1};
      } else {
        transpose_rows(q, filled, p.dim, queries_across, kTiledRows);
        transpose_rows(g, filled, p.value_dim, gradients_across, kTiledRows);
        queries_left = {queries_across, kTiledRows, 1}, gradients_left = {gradients_across, kTiledRows, 1};
      }
    }
#endif
    product(p.dim, p.width, filled, queries_left, slopes, pitch, p.to_keys, p.width, true);
    product(p.value_dim, p.width, filled, gradients_left, weights, pitch, p.to_values, p.width, true);
  }
}

size_t tiled_scratch_bytes(int dim, int value_dim, int width) {
  return 4 * size_t(kTiledRows) * (2 * (dim + value_dim + width) + dim + value_dim + 3 * width) + 4096;
}

// The largest score of each row that sees some of a page, of those that it sees.
template <typename T, bool SeesAll>
void peaks_page(const TiledPage p, const TiledUnit u, void* scratch) {
  Pieces pieces(scratch);
  T* gathered = pieces.take<T>(size_t(kForwardRows) * p.dim);
  float* scores = pieces.take<float>(size_t(kForwardRows) * p.width);
  for (int start = 0; start < p.count; start += kForwardRows) {
    int count = std::min(kForwardRows, p.count - start), filled = round_up(count, 16);
    const T* q = gathered_rows((const T*)u.queries, p, start, count, filled, p.dim, gathered);
    product(filled, p.width, p.dim, Left<T>{q, p.dim, 1}, (const T*)p.keys_across, ptrdiff_t(p.width) * kPair<T>, scores,
            p.width, false);
    for (int i = 0; i < count; ++i) {
      const float* x = scores + size_t(i) * p.width;
      vf most = all(kHidden);
      for (int slot = 0; slot < p.width; slot += kLanes)
        most = vmax(most, SeesAll ? load(x + slot) : shown_scores(p, p.rows[start + i], start + i, slot, x));
      u.top[p.rows[start + i]] = largest(most) * (SeesAll ? p.scale : 1.0f);
    }
  }
}

#if defined(DEEPSEEK_TILED_BF16)
#define DEEPSEEK_TILED_CASE(kind, call)            \
  if ((kind) == Kind::bf16) {                      \
    using T = uint16_t;                            \
    configure_tiled();                             \
    call;                                          \
    tile_release();                                \
    return;                                        \
  }
#else
#define DEEPSEEK_TILED_CASE(kind, call)
#endif

void tiled_pack(Kind kind, Kind source, const void* from, int count, int dim, int padded, int width, void* across,
                void* along, void* scratch) {
  DEEPSEEK_TILED_CASE(kind, (pack_rows<T>(source, from, count, dim, padded, width, across, along, scratch)))
  pack_rows<float>(source, from, count, dim, padded, width, across, along, scratch);
}

// Whether all that is done to a page's scores is to scale them.
inline bool sees_all(const TiledPage& page) { return !page.bias && !page.slopes && !page.shown && page.scale > 0; }

template <typename T>
void forward_any(const TiledPage& page, const TiledUnit& unit, void* scratch) {
  sees_all(page) ? forward_page<T, true>(page, unit, scratch) : forward_page<T, false>(page, unit, scratch);
}

template <typename T>
void backward_any(const TiledPage& page, const TiledUnit& unit, void* scratch) {
  sees_all(page) ? backward_page<T, true>(page, unit, scratch) : backward_page<T, false>(page, unit, scratch);
}

void tiled_forward(const TiledPage& page, const TiledUnit& unit, void* scratch) {
  DEEPSEEK_TILED_CASE(unit.kind, forward_any<T>(page, unit, scratch))
  forward_any<float>(page, unit, scratch);
}

void tiled_backward(const TiledPage& page, const TiledUnit& unit, void* scratch) {
  DEEPSEEK_TILED_CASE(unit.kind, backward_any<T>(page, unit, scratch))
  backward_any<float>(page, unit, scratch);
}

template <typename T>
void peaks_any(const TiledPage& page, const TiledUnit& unit, void* scratch) {
  sees_all(page) ? peaks_page<T, true>(page, unit, scratch) : peaks_page<T, false>(page, unit, scratch);
}

void tiled_peaks(const TiledPage& page, const TiledUnit& unit, void* scratch) {
  DEEPSEEK_TILED_CASE(unit.kind, peaks_any<T>(page, unit, scratch))
  peaks_any<float>(page, unit, scratch);
}

// Rows of a unit, and of bfloat16 their transpose too.
void tiled_load(Kind kind, Kind source, const void* const* from, int count, int dim, int padded, int filled, void* rows,
                void* across) {
  (void)across;
#if defined(DEEPSEEK_TILED_BF16)
  if (kind == Kind::bf16) {
    uint16_t* to = (uint16_t*)rows;
    for (int i = 0; i < count; ++i) load_row<uint16_t>(source, from[i], dim, padded, to + size_t(i) * padded);
    std::memset(to + size_t(count) * padded, 0, size_t(filled - count) * padded * 2);
    if (across) transpose_rows(to, filled, padded, (uint16_t*)across, filled);
    return;
  }
#endif
  float* to = (float*)rows;
  for (int i = 0; i < count; ++i) load_row<float>(source, from[i], dim, padded, to + size_t(i) * padded);
  std::memset(to + size_t(count) * padded, 0, size_t(filled - count) * padded * 4);
}

// See types.h.
void tiled_store(Kind source, const float* from, int padded, const float* factors, int count, int dim, void* const* to) {
  for (int i = 0; i < count; ++i, from += padded) {
    vf factor = all(factors ? factors[i] : 1.0f);
    int d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      vf x = mul(load(from + d), factor);
      if (source == Kind::bf16) store_bf16((uint16_t*)to[i] + d, x);
      else store((float*)to[i] + d, x);
    }
    for (; d < dim; ++d) {
      float x = from[d] * (factors ? factors[i] : 1.0f);
      if (source == Kind::bf16) ((uint16_t*)to[i])[d] = float_to_bf16(x);
      else ((float*)to[i])[d] = x;
    }
  }
}

float tiled_dot(Kind source, const void* a, const void* b, int dim) {
  float sums[16] = {};
  for (int d = 0; d < dim; ++d) sums[d % 16] += read_as<float>(source, a, d) * read_as<float>(source, b, d);
  float total = 0;
  for (float each : sums) total += each;
  return total;
}

void tiled_sum(const float* const* parts, int count, int padded, int width, float* rows) {
  constexpr int kBlock = 16;
  for (int d = 0; d < padded; d += kBlock)
    for (int slot = 0; slot < width; slot += kBlock)
      for (int i = 0; i < kBlock; ++i) {
        float sums[kBlock] = {};
        for (int part = 0; part < count; ++part)
          for (int j = 0; j < kBlock; ++j) sums[j] += parts[part][size_t(d + i) * width + slot + j];
        for (int j = 0; j < kBlock; ++j) rows[size_t(slot + j) * padded + d + i] = sums[j];
      }
}

}  // namespace
