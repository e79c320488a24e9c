// Attention of query vectors over pages of keys and values, by one softmax, a span at a time.
#pragma once

#include <type_traits>

#include "../../linear/cpu/inputs.h"
#if defined(DEEPSEEK_AMX) || defined(DEEPSEEK_AMX_EMULATED)
#include "tile_pages.h"
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
// What code for tiles names, where it is left out.
template <typename T, typename... A> void configure_attention(A...);
template <typename T, typename... A> void configure_peaks(A...);
template <typename T, typename... A> void keep_tiles_awake(A...);
template <typename T, typename... A> void add_terms(A...);
template <typename... A> void tile_scores(A...);
template <typename... A> void tile_values(A...);
template <typename... A> void load_peak_keys(A...);
template <typename... A> void peak_scores(A...);
template <typename... A> void tile_release(A...);
#endif

namespace {

using namespace deepseek;

constexpr int kPageVectors = kPage / kLanes;
constexpr int kPageRows = 16;  // that meet a page together
constexpr int kMaxDim = 256;
#if defined(__AVX512F__)
constexpr int kQueryTile = 6, kColumnTile = 4;
#else
constexpr int kQueryTile = 3, kColumnTile = 2;
#endif

// Bytes of cached int8 that one instruction multiplies: quads, or pairs widened to bfloat16.
#if defined(DEEPSEEK_VNNI)
constexpr int kStep = 4;
#else
constexpr int kStep = 2;
#endif

// Of a head whose channels come in two halves, by pairs; see PageLayout for the order they leave in.
void rope(float* head, int dim, const float* cosines, const float* sines, const float* norm,
          float eps) {
  if (norm) rms_norm(head, norm, eps, head, dim);
  int half = dim / 2, i = 0;
  if (turns_in_order(dim)) {
    alignas(64) float out[kMaxDim];
    int quarter = dim / 4;
    for (; i < half; i += kLanes) {
      vf a = load(head + i), b = load(head + half + i), c = load(cosines + i), s = load(sines + i);
      float* to = out + (i < quarter ? i : i + quarter);
      store(to, sub(mul(a, c), mul(b, s)));
      store(to + quarter, add(mul(b, c), mul(a, s)));
    }
    std::memcpy(head, out, size_t(dim) * sizeof(float));
    return;
  }
  for (; i + kLanes <= half; i += kLanes) {
    vf a = load(head + i), b = load(head + half + i), c = load(cosines + i), s = load(sines + i);
    store(head + i, sub(mul(a, c), mul(b, s)));
    store(head + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    float a = head[i], b = head[half + i];
    head[i] = a * cosines[i] - b * sines[i];
    head[half + i] = b * cosines[i] + a * sines[i];
  }
}

// One vector in int8 with its scale; `sum` is that of the integers.
inline float quantize_vector(const float* x, int dim, int8_t* out, int* sum) {
  vf most = zero();
  for (int d = 0; d < dim; d += kLanes) most = vmax(most, absolute(load(x + d)));
  float bound = largest(most), inverse = bound > 0 ? 127.0f / bound : 0.0f;
  *sum = 0;
  for (int d = 0; d < dim; d += kLanes) store_s8(out + d, to_int(mul(load(x + d), all(inverse))));
  for (int d = 0; d < dim; ++d) *sum += out[d];
  return bound / 127.0f;
}

inline void rotate_if_whole(float* x, int dim) {
  if (dim % kRotation == 0) rotate(x, dim);
}

// Bytes of a channel.
inline size_t element_bytes(const PageLayout& l) { return l.kind == Kind::f32 ? 4 : l.kind == Kind::bf16 ? 2 : 1; }

// One key [dim_padded], which is changed, in the type of its page; returns its scale.
inline float narrow_key(const PageLayout& l, float* key, void* out) {
  int dim = l.dim_padded;
  if (l.kind == Kind::f32) return std::memcpy(out, key, size_t(dim) * 4), 1.0f;
  if (l.kind == Kind::bf16) {
    for (int d = 0; d < dim; d += kLanes) store_bf16((uint16_t*)out + d, load(key + d));
    return 1.0f;
  }
  rotate_if_whole(key, dim);
  int8_t* small = (int8_t*)out;
  int sum;
  float scale = quantize_vector(key, dim, small, &sum);
  if (kStep == 4)
    for (int d = 0; d < dim; ++d) small[d] = int8_t(uint8_t(small[d]) ^ 0x80);
  return scale;
}

inline float narrow_value(const PageLayout& l, const float* value, void* out) {
  int dim = l.dim_padded, sum;
  if (l.kind == Kind::f32) return std::memcpy(out, value, size_t(dim) * 4), 1.0f;
  if (l.kind == Kind::int8) return quantize_vector(value, dim, (int8_t*)out, &sum);
  for (int d = 0; d < dim; d += kLanes) store_bf16((uint16_t*)out + d, load(value + d));
  return 1.0f;
}

// Puts a narrowed key into its slot, Bytes of it side by side.
template <int Bytes>
inline void place_key(const PageLayout& l, uint8_t* head, int slot, const uint8_t* key) {
  int chunks = int(l.dim_padded * element_bytes(l)) / Bytes;
  for (int c = 0; c < chunks; ++c) std::memcpy(head + size_t(c * kPage + slot) * Bytes, key + c * Bytes, Bytes);
}

inline void place_key(const PageLayout& l, uint8_t* head, int slot, const uint8_t* key, float scale) {
  if (l.kind != Kind::int8) return place_key<4>(l, head, slot, key);
  place_key<kStep>(l, head, slot, key);
  ((float*)(head + l.key_scale_offset))[slot] = scale;
}

inline void store_key(const PageLayout& l, uint8_t* head, int slot, float* key) {
  alignas(64) uint8_t narrow[4 * kMaxDim];
  float scale = narrow_key(l, key, narrow);
  place_key(l, head, slot, narrow, scale);
}

// Puts the narrowed values of Slots neighbouring slots between one another, as a page holds them.
template <int Slots, typename T>
inline void weave(const uint8_t* const* values, int dim, uint8_t* to) {
  for (int d = 0; d < dim; ++d)
    for (int s = 0; s < Slots; ++s) ((T*)to)[d * Slots + s] = ((const T*)values[s])[d];
}

inline void store_value(const PageLayout& l, uint8_t* head, int slot, const float* value) {
  uint8_t* values = head + l.value_offset;
  int dim = l.dim_padded;
  alignas(64) uint8_t narrow[4 * kMaxDim];
  float scale = narrow_value(l, value, narrow);
  if (l.kind == Kind::f32) {
    std::memcpy((float*)values + size_t(slot) * dim, narrow, size_t(dim) * 4);
    return;
  }
  if (l.kind == Kind::bf16) {
    uint16_t* to = (uint16_t*)values + size_t(slot / 2) * dim * 2 + slot % 2;
    for (int d = 0; d < dim; ++d) to[d * 2] = ((const uint16_t*)narrow)[d];
    return;
  }
  ((float*)(head + l.value_scale_offset))[slot] = scale;
  int8_t* to = (int8_t*)values + size_t(slot / kStep) * dim * kStep + slot % kStep;
  for (int d = 0; d < dim; ++d) to[d * kStep] = ((const int8_t*)narrow)[d];
}

void store_kv(const PageLayout& l, uint8_t* page, int kv_head, int slot, const float* key,
              const float* value) {
  alignas(64) float k[kMaxDim], v[kMaxDim];
  std::memcpy(k, key, size_t(l.dim) * 4), std::memcpy(v, value, size_t(l.dim) * 4);
  for (int d = l.dim; d < l.dim_padded; ++d) k[d] = v[d] = 0.0f;
  uint8_t* head = page + kv_head * l.head_bytes;
  store_key(l, head, slot, k), store_value(l, head, slot, v);
}

// A page's keys and values as the kernels read them; int8 pages become bfloat16 in `wide`.
template <typename T>
struct PageView {
  const T* keys;
  const T* values;
  const float* key_scale = nullptr;
  const float* value_scale = nullptr;
};

inline PageView<uint16_t> view_bf16(const PageLayout& l, const uint8_t* head, uint16_t* wide) {
  const uint8_t* values = head + l.value_offset;
  if (l.kind == Kind::bf16) return {(const uint16_t*)head, (const uint16_t*)values};
  int count = l.dim_padded * kPage;
  for (int i = 0; i < count; i += 2 * kLanes) {
    vi k = s8_to_bf16((const int8_t*)head + i), v = s8_to_bf16((const int8_t*)values + i);
    std::memcpy(wide + i, &k, sizeof(k));
    std::memcpy(wide + count + i, &v, sizeof(v));
  }
  return {wide, wide + count, (const float*)(head + l.key_scale_offset),
          (const float*)(head + l.value_scale_offset)};
}

// Scores of R queries with a page's keys, rows of a span apart.
template <int R>
void scores_of(const uint16_t* const* q, const int*, const uint16_t* keys, int dim, float* out) {
  for (int c = 0; c < kPageVectors; c += kColumnTile) {
    vf acc[R][kColumnTile];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kColumnTile; ++v) acc[r][v] = zero();
    const uint16_t* k = keys + c * kLanes * 2;
    for (int d = 0; d < dim; d += 2, k += kPage * 2) {
      vi b[kColumnTile];
      for (int v = 0; v < kColumnTile; ++v) b[v] = load_i(k + v * kLanes * 2);
      for (int r = 0; r < R; ++r) {
        Pair a = pair_of(q[r] + d);
        for (int v = 0; v < kColumnTile; ++v) acc[r][v] = dot_bf16(acc[r][v], b[v], a);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kColumnTile; ++v) store(out + r * kSpan + (c + v) * kLanes, acc[r][v]);
  }
}

template <int R>
void scores_of(const float* const* q, const int*, const float* keys, int dim, float* out) {
  for (int c = 0; c < kPageVectors; c += kColumnTile) {
    vf acc[R][kColumnTile];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kColumnTile; ++v) acc[r][v] = zero();
    const float* k = keys + c * kLanes;
    for (int d = 0; d < dim; ++d, k += kPage) {
      vf b[kColumnTile];
      for (int v = 0; v < kColumnTile; ++v) b[v] = load(k + v * kLanes);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kColumnTile; ++v) acc[r][v] = fma(all(q[r][d]), b[v], acc[r][v]);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kColumnTile; ++v) store(out + r * kSpan + (c + v) * kLanes, acc[r][v]);
  }
}

// sums [R][dim] = weights [R][kSpan] times the values of pages first ... last - 1 of a span.
template <int R, int C>
void values_of(const uint16_t* p, const float*, const PageView<uint16_t>* pages, int first, int last,
               int dim, float* sums, int column) {
  vf acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) acc[r][v] = zero();
  for (int page = first; page < last; ++page) {
    const uint16_t* b = pages[page].values + column * 2;
    for (int s = page * kPage; s < (page + 1) * kPage; s += 2, b += dim * 2) {
      vi w[C];
      for (int v = 0; v < C; ++v) w[v] = load_i(b + v * kLanes * 2);
      for (int r = 0; r < R; ++r) {
        Pair a = pair_of(p + r * kSpan + s);
        for (int v = 0; v < C; ++v) acc[r][v] = dot_bf16(acc[r][v], w[v], a);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) store(sums + r * dim + column + v * kLanes, acc[r][v]);
}

template <int R, int C>
void values_of(const float* p, const float*, const PageView<float>* pages, int first, int last,
               int dim, float* sums, int column) {
  vf acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) acc[r][v] = zero();
  for (int page = first; page < last; ++page) {
    const float* b = pages[page].values + column;
    for (int s = page * kPage; s < (page + 1) * kPage; ++s, b += dim) {
      vf w[C];
      for (int v = 0; v < C; ++v) w[v] = load(b + v * kLanes);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < C; ++v) acc[r][v] = fma(all(p[r * kSpan + s]), w[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) store(sums + r * dim + column + v * kLanes, acc[r][v]);
}

#if defined(DEEPSEEK_VNNI)
// Integer scores of R queries, -128 times whose sum stands in `terms`.
template <int R>
void scores_of(const int8_t* const* q, const int* terms, const int8_t* keys, int dim, float* out) {
  for (int c = 0; c < kPageVectors; c += kColumnTile) {
    vi acc[R][kColumnTile];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kColumnTile; ++v) acc[r][v] = all_i(terms[r]);
    const int8_t* k = keys + c * kLanes * 4;
    for (int d = 0; d < dim; d += 4, k += kPage * 4) {
      vi b[kColumnTile];
      for (int v = 0; v < kColumnTile; ++v) b[v] = load_i(k + v * kLanes * 4);
      for (int r = 0; r < R; ++r) {
        vi a = all_i(*(const Quad*)(q[r] + d));
        for (int v = 0; v < kColumnTile; ++v) acc[r][v] = dot_u8s8(acc[r][v], b[v], a);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kColumnTile; ++v)
        store(out + r * kSpan + (c + v) * kLanes, to_float(acc[r][v]));
  }
}

// Weights are unsigned levels with a scale per row.
template <int R, int C>
void values_of(const int8_t* p, const float* scale, const PageView<int8_t>* pages, int first,
               int last, int dim, float* sums, int column) {
  vi acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) acc[r][v] = zero_i();
  for (int page = first; page < last; ++page) {
    const int8_t* b = pages[page].values + column * 4;
    for (int s = page * kPage; s < (page + 1) * kPage; s += 4, b += dim * 4) {
      vi w[C];
      for (int v = 0; v < C; ++v) w[v] = load_i(b + v * kLanes * 4);
      for (int r = 0; r < R; ++r) {
        vi a = all_i(*(const Quad*)(p + r * kSpan + s));
        for (int v = 0; v < C; ++v) acc[r][v] = dot_u8s8(acc[r][v], a, w[v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v)
      store(sums + r * dim + column + v * kLanes, mul(to_float(acc[r][v]), all(scale[r])));
}
#endif

template <int R, typename T>
void weighted_values(const T* p, const float* scale, const PageView<T>* pages, int first, int last,
                     int dim, float* sums) {
  int column = 0;
  auto run = [&](auto width) {
    constexpr int C = decltype(width)::value;
    for (; column + C * kLanes <= dim; column += C * kLanes)
      values_of<R, C>(p, scale, pages, first, last, dim, sums, column);
  };
  run(std::integral_constant<int, kColumnTile>{});
  if constexpr (kColumnTile > 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

// Weights of R queries over the pages first ... last - 1 of a span, into `p`, from scores in `s`; in
// rounds over the rows, so that their chains of operations overlap. Powers of two take the place of
// powers of e.
template <int R, typename T>
void softmax(const Attend& a, const PageView<T>* pages, int first, int last, const float* scales,
             const Query* queries, int span_slot, float* s, T* p, float* weight_scale, float* most,
             float* total) {
  constexpr int terms_of_power = sizeof(T) == 4 ? 7 : 4;
  int start = first * kPageVectors, stop = last * kPageVectors;
  float bounds[R], factors[R];
  for (int r = 0; r < R; ++r) {
    float* row = s + r * kSpan;
    int low = queries[r].low - span_slot, high = queries[r].high - span_slot;
    bool is_cut = low > first * kPage || high < last * kPage;
    vf peak = all(-INFINITY);
    if (is_cut || pages->key_scale)
      for (int v = start; v < stop; ++v) {
        vf x = load(row + v * kLanes);
        if (pages->key_scale)
          x = mul(x, load(pages[v / kPageVectors].key_scale + v % kPageVectors * kLanes));
        if (is_cut) x = where_between(x, v * kLanes, low, high, -INFINITY);
        store(row + v * kLanes, x);
        peak = vmax(peak, x);
      }
    else
      for (int v = start; v < stop; ++v) peak = vmax(peak, load(row + v * kLanes));
    float factor = a.scale * kLog2E * scales[r];
    factors[r] = factor > 0 ? factor : 1e-30f;  // of a query of zeros: what it may not see stays out
    most[r] = largest(peak) * factors[r];
    bounds[r] = most[r] == -INFINITY ? 0.0f : most[r];  // it may see nothing here
  }
  for (int r = 0; r < R; ++r) {
    float* row = s + r * kSpan;
    vf mass = zero(), peak = zero(), bound = all(-bounds[r]), factor = all(factors[r]);
    auto weight = [&](int v) {
      vf x = power_of_two<terms_of_power>(fma(load(row + v * kLanes), factor, bound));
      mass = add(mass, x);
      if (!pages->value_scale) return x;
      return mul(x, load(pages[v / kPageVectors].value_scale + v % kPageVectors * kLanes));
    };
    for (int v = start; v < stop; v += 2) {
      vf one = weight(v), two = weight(v + 1);
      T* place = p + r * kSpan + v * kLanes;
      if constexpr (sizeof(T) == 4) store(place, one), store(place + kLanes, two);
      if constexpr (sizeof(T) == 2) store_bf16_pair(place, one, two);
      if constexpr (sizeof(T) == 1) {
        store(row + v * kLanes, one), store(row + (v + 1) * kLanes, two);
        peak = vmax(peak, vmax(one, two));
      }
    }
    total[r] = sum(mass);
    if constexpr (sizeof(T) == 1) weight_scale[r] = largest(peak) * (1.0f / 255.0f);
  }
  if constexpr (sizeof(T) == 1)
    for (int r = 0; r < R; ++r) {  // unsigned levels of 0 ... 255, of the row's largest weight
      vf inverse = all(weight_scale[r] > 0 ? 1.0f / weight_scale[r] : 0.0f);
      for (int v = start; v < stop; ++v)
        store_u8((uint8_t*)p + r * kSpan + v * kLanes,
                 to_int(mul(load(s + r * kSpan + v * kLanes), inverse)));
    }
}

// The pages of a span that any of the queries sees: first ... last - 1, nothing where they are equal.
struct Seen {
  int first, last;

  Seen(const Query* queries, int count, int span_slot, int num_pages) {
    int low = queries[0].low, high = queries[0].high;
    for (int i = 1; i < count; ++i) {
      low = queries[i].low < low ? queries[i].low : low;
      high = queries[i].high > high ? queries[i].high : high;
    }
    first = low > span_slot ? (low - span_slot) / kPage : 0;
    last = (high - span_slot + kPage - 1) / kPage;
    last = last < num_pages ? last : num_pages;
    last = last < first ? first : last;
  }
};

inline void see_nothing(int count, int dim, float* sums, float* most, float* total) {
  for (int i = 0; i < count; ++i) most[i] = -INFINITY, total[i] = 0.0f;
  std::memset(sums, 0, size_t(count) * dim * sizeof(float));
}

// The softmax states of R queries over the pages of a span that any of them sees.
template <int R, typename T>
void attend_tile(const Attend& a, const PageView<T>* pages, int num_pages, const T* q,
                 const float* scales, const int* terms, const Query* queries, int span_slot,
                 float* sums, float* most, float* total) {
  int dim = a.layout->dim_padded;
  auto [first, last] = Seen(queries, R, span_slot, num_pages);
  if (first == last) return see_nothing(R, dim, sums, most, total);
  const T* vectors[R];
  for (int r = 0; r < R; ++r) vectors[r] = q + size_t(r) * dim;
  alignas(64) float s[R * kSpan];
  alignas(64) T p[R * kSpan];
  float weight_scale[R];
  for (int page = first; page < last; ++page)
    scores_of<R>(vectors, terms, pages[page].keys, dim, s + page * kPage);
  softmax<R, T>(a, pages, first, last, scales, queries, span_slot, s, p, weight_scale, most, total);
  weighted_values<R, T>(p, weight_scale, pages, first, last, dim, sums);
}

// The same by tiles, for up to 16 queries of int8.
template <typename T>
void attend_by_tiles(const Attend& a, const PageView<T>* pages, int num_pages, const T* q,
                     const float* scales, const int* terms, const Query* queries, int count,
                     int span_slot, float* sums, float* most, float* total) {
  int dim = a.layout->dim_padded;
  auto [first, last] = Seen(queries, count, span_slot, num_pages);
  if (first == last) return see_nothing(count, dim, sums, most, total);
  alignas(64) float s[kPageRows * kSpan];
  alignas(64) T p[kPageRows * kSpan];
  float weight_scale[kPageRows];
  for (int page = first; page < last; ++page)
    tile_scores(q, dim, pages[page].keys, dim, s + page * kPage), add_terms<T>(terms, count, s + page * kPage);
  auto weights_of = [&](auto rows, int i) {
    keep_tiles_awake<T>();
    softmax<decltype(rows)::value, T>(a, pages, first, last, scales + i, queries + i, span_slot,
                                      s + i * kSpan, p + i * kSpan, weight_scale + i, most + i, total + i);
  };
  int i = 0;
  for (; i + 4 <= count; i += 4) weights_of(std::integral_constant<int, 4>{}, i);
  for (; i + 3 <= count; i += 3) weights_of(std::integral_constant<int, 3>{}, i);
  for (; i < count; ++i) weights_of(std::integral_constant<int, 1>{}, i);
  tile_values(p, weight_scale, count, pages, first, last, dim, sums, [](int, int, int) {});
}

// The same of bfloat16, where a page's largest scores are looked for while the scores of the next are
// multiplied, and its weights made while the values of the one before are added up.
template <typename T>
void attend_in_turns(const Attend& a, const PageView<T>* pages, int num_pages, const T* q,
                     const Query* queries, int count, int span_slot, float* sums, float* most, float* total) {
  int dim = a.layout->dim_padded;
  auto [first, last] = Seen(queries, count, span_slot, num_pages);
  if (first == last) return see_nothing(count, dim, sums, most, total);
  alignas(64) float s[kPageRows * kSpan];
  alignas(64) T p[kPageRows * kSpan];
  vf peaks[kPageRows], masses[kPageRows];
  float bounds[kPageRows];
  for (int r = 0; r < count; ++r) peaks[r] = all(-INFINITY), masses[r] = zero();
  auto look = [&](int page, int from, int to) {
    for (int r = from; r < (to < count ? to : count); ++r) {
      int low = queries[r].low - span_slot, high = queries[r].high - span_slot;
      float* row = s + r * kSpan + page * kPage;
      bool is_cut = low > page * kPage || high < (page + 1) * kPage;
      for (int v = 0; v < kPageVectors; ++v) {
        vf x = load(row + v * kLanes);
        if (is_cut) {
          x = where_between(x, page * kPage + v * kLanes, low, high, -INFINITY);
          store(row + v * kLanes, x);
        }
        peaks[r] = vmax(peaks[r], x);
      }
    }
  };
  auto score = [&](int page, auto between) {
    tile_scores(q, dim, pages[page].keys, dim, s + page * kPage, between);
  };
  score(first, [](int, int) {});
  for (int page = first + 1; page < last; ++page)
    score(page, [&](int from, int to) { look(page - 1, from, to); });
  look(last - 1, 0, kPageRows);
  float factor = a.scale * kLog2E;
  for (int r = 0; r < count; ++r) {
    most[r] = largest(peaks[r]) * factor;
    bounds[r] = most[r] == -INFINITY ? 0.0f : most[r];  // it may see nothing here
  }
  keep_tiles_awake<T>();
  auto weigh = [&](int page, int from, int to) {
    for (int r = from; r < (to < count ? to : count); ++r) {
      const float* row = s + r * kSpan + page * kPage;
      auto weight = [&](int v) {
        vf x = power_of_two<4>(fma(load(row + v * kLanes), all(factor), all(-bounds[r])));
        masses[r] = add(masses[r], x);
        return x;
      };
      for (int v = 0; v < kPageVectors; v += 2) {
        vf one = weight(v), two = weight(v + 1);
        store_bf16_pair(p + r * kSpan + page * kPage + v * kLanes, one, two);
      }
    }
  };
  weigh(first, 0, kPageRows);
  tile_values(p, (const float*)nullptr, count, pages, first, last, dim, sums, weigh);
  for (int r = 0; r < count; ++r) total[r] = sum(masses[r]);
}

// What `attend_span` reads beside the pages: queries as their keys are stored, and room for the pages of
// a span widened to bfloat16.
template <typename T>
struct Prepared {
  float* scales;
  int* terms;
  T* queries;
  T* wide;

  Prepared(void* scratch, int dim) {
    scales = (float*)scratch;
    terms = (int*)(scales + kMaxQueries);
    queries = (T*)(terms + kMaxQueries);
    wide = queries + size_t(kMaxQueries) * dim;
  }
};

template <typename T>
void load_typed(const PageLayout& l, const Query* queries, int count, Prepared<T> to) {
  int dim = l.dim_padded;
  alignas(64) float vector[kMaxDim];
  for (int i = 0; i < count; ++i) {
    T* q = to.queries + size_t(i) * dim;
    to.scales[i] = 1.0f, to.terms[i] = 0;
    const float* as_given = queries[i].vector;
    if (l.dim < dim || l.kind == Kind::int8) {
      std::memcpy(vector, as_given, size_t(l.dim) * sizeof(float));
      for (int d = l.dim; d < dim; ++d) vector[d] = 0.0f;
      if (l.kind == Kind::int8) rotate_if_whole(vector, dim);
      as_given = vector;
    }
    if constexpr (sizeof(T) == 4) std::memcpy(q, as_given, size_t(dim) * 4);
    if constexpr (sizeof(T) == 2)
      for (int d = 0; d < dim; d += kLanes) store_bf16(q + d, load(as_given + d));
    if constexpr (sizeof(T) == 1) {
      to.scales[i] = quantize_vector(vector, dim, q, &to.terms[i]);
      to.terms[i] *= -128;
    }
  }
}

template <typename T>
void attend_typed(const Attend& a, const Query* queries, int count, int start, int stop,
                  float* sums, float* most, float* total, Prepared<T> from) {
  const PageLayout& l = *a.layout;
  int dim = l.dim_padded;
  // pages before `start` are seen by no query: they are left out
  PageView<T> pages[kSpan / kPage] = {};
  int span_slot = start / kSpan * kSpan, num_pages = (stop - span_slot + kPage - 1) / kPage;
  for (int i = 0; i < num_pages; ++i) {
    int page = i < (start - span_slot) / kPage ? (start - span_slot) / kPage : i;
    const uint8_t* head = a.pages +
                          size_t(a.table[span_slot / kPage + page]) * l.page_bytes +
                          a.kv_head * l.head_bytes;
    if constexpr (sizeof(T) == 2) pages[i] = view_bf16(l, head, from.wide + size_t(2 * i) * kPage * dim);
    else pages[i] = {(const T*)head, (const T*)(head + l.value_offset)};
    if constexpr (sizeof(T) == 1) {
      pages[i].key_scale = (const float*)(head + l.key_scale_offset);
      pages[i].value_scale = (const float*)(head + l.value_scale_offset);
    }
  }
  if constexpr (kHasTiles && sizeof(T) < 4) {
    for (int i = 0, some, configured = 0; i < count; i += kPageRows) {
      some = count - i < kPageRows ? count - i : kPageRows;
      if (some != configured) configure_attention<T>(configured = some, dim);
      const T* q = from.queries + size_t(i) * dim;
      float* to = sums + size_t(i) * dim;
      if constexpr (sizeof(T) == 2)
        attend_in_turns<T>(a, pages, num_pages, q, queries + i, some, span_slot, to, most + i, total + i);
      else
        attend_by_tiles<T>(a, pages, num_pages, q, from.scales + i, from.terms + i, queries + i, some, span_slot, to,
                           most + i, total + i);
    }
    return tile_release();
  }
  auto run = [&](auto rows, int i) {
    constexpr int R = decltype(rows)::value;
    attend_tile<R, T>(a, pages, num_pages, from.queries + size_t(i) * dim, from.scales + i,
                      from.terms + i, queries + i, span_slot, sums + size_t(i) * dim, most + i, total + i);
  };
  int i = 0;
  for (; i + kQueryTile <= count; i += kQueryTile)
    run(std::integral_constant<int, kQueryTile>{}, i);
  if constexpr (kQueryTile > 3)
    for (; i + 3 <= count; i += 3) run(std::integral_constant<int, 3>{}, i);
  for (; i < count; ++i) run(std::integral_constant<int, 1>{}, i);
}

// Calls `f` with the type that queries of a cache are computed in.
template <typename F>
void typed(const PageLayout& l, void* scratch, F f) {
  if (l.kind == Kind::f32) return f(Prepared<float>(scratch, l.dim_padded));
#if defined(DEEPSEEK_VNNI)
  if (l.kind == Kind::int8) return f(Prepared<int8_t>(scratch, l.dim_padded));
#endif
  f(Prepared<uint16_t>(scratch, l.dim_padded));
}

void load_queries(const PageLayout& l, const Query* queries, int count, void* scratch) {
  typed(l, scratch, [&](auto to) { load_typed(l, queries, count, to); });
}

void attend_span(const Attend& a, const Query* queries, int count, int start, int stop, float* sums,
                 float* most, float* total, void* scratch) {
  typed(*a.layout, scratch, [&](auto from) {
    attend_typed(a, queries, count, start, stop, sums, most, total, from);
  });
}

// A mass above this makes the bound be raised.
constexpr float kMostMass = 0x1p60f;

// Weights of a query over the shown slots of a page, into `p`, from its scores. The bound is that of the pages
// before: the largest score is looked for, and the state scaled, only where the bound does not hold.
template <typename T>
inline void bounded_softmax(const Attend& a, const PageView<T>& page, float scale, uint64_t shown,
                            const float* scores, T* p, float* weight_scale, const PageStates& state) {
  constexpr int terms_of_power = sizeof(T) == 4 ? 7 : 4;
  bool is_cut = ~shown, has_bias = a.bias != 0;
  vf factor = all(a.scale * kLog2E * scale), x[kPageVectors];
  auto score = [&](int v) {
    vf y = mul(load(scores + v * kLanes), factor);
    if (page.key_scale) y = mul(y, load(page.key_scale + v * kLanes));
    if (has_bias) y = add(y, all(a.bias));
    return is_cut ? where_bits(y, uint32_t(shown >> v * kLanes), -INFINITY) : y;
  };
  auto weigh = [&] {
    vf total = load(state.mass), bound = all(*state.bound);
    for (int v = 0; v < kPageVectors; ++v) {
      x[v] = sub(score(v), bound);
      if constexpr (kLanes < 16) x[v] = vmin(x[v], all(100.0f));  // where a power does not overflow to infinity
      x[v] = power_of_two<terms_of_power>(x[v]);
      total = add(total, x[v]);
    }
    return total;
  };
  vf total = weigh();
  if (any_above(total, kMostMass)) {
    vf peak = score(0);
    for (int v = 1; v < kPageVectors; ++v) peak = vmax(peak, score(v));
    float raised = largest(peak);
    // of a new state nothing; a power so small would be a denormal number, which takes long
    vf share = *state.bound > kNoBound ? power_of_two<7>(all(*state.bound - raised)) : zero();
    *state.bound = raised;
    for (int d = 0; d < a.layout->dim_padded; d += kLanes) store(state.sums + d, mul(load(state.sums + d), share));
    store(state.mass, mul(load(state.mass), share));
    total = weigh();
  }
  store(state.mass, total);
  vf most = zero();
  for (int v = 0; v < kPageVectors; ++v) {
    if (page.value_scale) x[v] = mul(x[v], load(page.value_scale + v * kLanes));
    if constexpr (sizeof(T) == 1) most = vmax(most, x[v]);
  }
  if constexpr (sizeof(T) == 4)
    for (int v = 0; v < kPageVectors; ++v) store(p + v * kLanes, x[v]);
  if constexpr (sizeof(T) == 2)
    for (int v = 0; v < kPageVectors; v += 2) store_bf16_pair(p + v * kLanes, x[v], x[v + 1]);
  if constexpr (sizeof(T) == 1) {  // unsigned levels of 0 ... 255, of the largest weight
    *weight_scale = largest(most) * (1.0f / 255.0f);
    vf inverse = all(*weight_scale > 0 ? 1.0f / *weight_scale : 0.0f);
    for (int v = 0; v < kPageVectors; ++v) store_u8((uint8_t*)p + v * kLanes, to_int(mul(x[v], inverse)));
  }
}

inline PageStates state_of(const PageStates& states, int row, int dim) {
  return {states.sums + size_t(row) * dim, states.bound + row, states.mass + size_t(row) * kMassLanes};
}

inline const uint8_t* head_of(const Attend& a, int page) {
  return a.pages + size_t(a.table[page]) * a.layout->page_bytes + a.kv_head * a.layout->head_bytes;
}

inline void prefetch(const void* from, size_t bytes) {
  for (size_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch((const uint8_t*)from + byte);
}

template <typename T>
void add_page_by_tiles(const Attend& a, const PageView<T>& page, const uint64_t* shown, const int32_t* rows, int count,
                       const PageStates& states, const Prepared<T>& from) {
  int dim = a.layout->dim_padded;
  alignas(64) float s[kPageRows * kSpan], sums[kPageRows * kMaxDim];
  alignas(64) T p[kPageRows * kSpan], q[kPageRows * kMaxDim];
  float weight_scale[kPageRows];
  int terms[kPageRows];
  for (int start = 0, some, configured = 0; start < count; start += some, rows += some) {
    some = std::min(kPageRows, count - start);
    if (some != configured) configure_attention<T>(configured = some, dim);
    for (int r = 0; r < some; ++r) {
      terms[r] = from.terms[rows[r]];
      const T* vector = from.queries + size_t(rows[r]) * dim;
      for (int d = 0; d < dim; d += 16) std::memcpy(q + r * dim + d, vector + d, 16 * sizeof(T));
    }
    tile_scores(q, dim, page.keys, dim, s), add_terms<T>(terms, some, s);
    for (int r = 0; r < some; ++r) {
      if (r % 4 == 0) keep_tiles_awake<T>();
      bounded_softmax<T>(a, page, from.scales[rows[r]], shown[rows[r]], s + r * kSpan, p + r * kSpan,
                         weight_scale + r, state_of(states, rows[r], dim));
    }
    tile_values(p, weight_scale, some, &page, 0, 1, dim, sums, [](int, int, int) {});
    for (int r = 0; r < some; ++r) {
      float* to = states.sums + size_t(rows[r]) * dim;
      for (int d = 0; d < dim; d += kLanes) store(to + d, add(load(to + d), load(sums + r * dim + d)));
    }
  }
  tile_release();
}

template <typename T>
void add_page_by_vectors(const Attend& a, const PageView<T>& page, const uint64_t* shown, const int32_t* rows, int count,
                         const PageStates& states, const Prepared<T>& from) {
  int dim = a.layout->dim_padded;
  alignas(64) float s[kQueryTile * kSpan], sums[kQueryTile * kMaxDim];
  alignas(64) T p[kQueryTile * kSpan];
  float weight_scale[kQueryTile];
  auto run = [&](auto width, int i) {
    constexpr int R = decltype(width)::value;
    const T* vectors[R];
    int terms[R];
    for (int r = 0; r < R; ++r)
      vectors[r] = from.queries + size_t(rows[i + r]) * dim, terms[r] = from.terms[rows[i + r]];
    scores_of<R>(vectors, terms, page.keys, dim, s);
    for (int r = 0; r < R; ++r) {
      int row = rows[i + r];
      bounded_softmax<T>(a, page, from.scales[row], shown[row], s + r * kSpan, p + r * kSpan, weight_scale + r,
                         state_of(states, row, dim));
    }
    weighted_values<R, T>(p, weight_scale, &page, 0, 1, dim, sums);
    for (int r = 0; r < R; ++r) {
      float* to = states.sums + size_t(rows[i + r]) * dim;
      for (int d = 0; d < dim; d += kLanes) store(to + d, add(load(to + d), load(sums + r * dim + d)));
    }
  };
  int i = 0;
  for (; i + kQueryTile <= count; i += kQueryTile) run(std::integral_constant<int, kQueryTile>{}, i);
  if constexpr (kQueryTile > 3)
    for (; i + 3 <= count; i += 3) run(std::integral_constant<int, 3>{}, i);
  for (; i < count; ++i) run(std::integral_constant<int, 1>{}, i);
}

template <typename T>
void add_page_typed(const Attend& a, const uint64_t* shown, const int32_t* rows, int count, const PageStates& states,
                    Prepared<T> from) {
  const PageLayout& l = *a.layout;
  const uint8_t* head = head_of(a, 0);
  PageView<T> page;
  if constexpr (sizeof(T) == 2) page = view_bf16(l, head, from.wide);
  else page = {(const T*)head, (const T*)(head + l.value_offset)};
  if constexpr (sizeof(T) == 1) {
    page.key_scale = (const float*)(head + l.key_scale_offset);
    page.value_scale = (const float*)(head + l.value_scale_offset);
  }
  prefetch(page.values, size_t(kPage) * l.dim_padded * sizeof(T));
  if constexpr (kHasTiles && sizeof(T) < 4) add_page_by_tiles(a, page, shown, rows, count, states, from);
  else add_page_by_vectors(a, page, shown, rows, count, states, from);
}

void add_page(const Attend& a, const uint64_t* shown, const int32_t* rows, int count, const PageStates& states,
              void* scratch) {
  typed(*a.layout, scratch, [&](auto from) { add_page_typed(a, shown, rows, count, states, from); });
}

// A float that a page holds: of a key, or of a value.
inline float key_in(const PageLayout& l, const uint8_t* head, int d, int slot) {
  if (l.kind == Kind::f32) return ((const float*)head)[d * kPage + slot];
  if (l.kind == Kind::bf16) return bf16_to_float(((const uint16_t*)head)[(d / 2 * kPage + slot) * 2 + d % 2]);
  uint8_t level = head[(d / kStep * kPage + slot) * kStep + d % kStep];
  int value = kStep == 4 ? level - 128 : int8_t(level);
  return float(value) * ((const float*)(head + l.key_scale_offset))[slot];
}

inline float value_in(const PageLayout& l, const uint8_t* head, int d, int slot) {
  const uint8_t* values = head + l.value_offset;
  if (l.kind == Kind::f32) return ((const float*)values)[slot * l.dim_padded + d];
  if (l.kind == Kind::bf16)
    return bf16_to_float(((const uint16_t*)values)[(slot / 2 * l.dim_padded + d) * 2 + slot % 2]);
  return float(((const int8_t*)values)[(slot / kStep * l.dim_padded + d) * kStep + slot % kStep]) *
         ((const float*)(head + l.value_scale_offset))[slot];
}

// A mean: the key and the value, narrowed, and their scales.
struct Mean {
  uint8_t* key;
  uint8_t* value;
  float* scales;

  Mean(const PageLayout& l, uint8_t* at)
      : key(at), value(at + l.dim_padded * element_bytes(l)), scales((float*)(value + l.dim_padded * element_bytes(l))) {}
};

void page_means(const PageLayout& l, const uint8_t* page, int kv_head, uint8_t* mean) {
  const uint8_t* head = page + kv_head * l.head_bytes;
  alignas(64) float key[kMaxDim], value[kMaxDim];
  for (int d = 0; d < l.dim_padded; ++d) {
    float keys[kPage], values[kPage], key_sum = 0, value_sum = 0;
    for (int s = 0; s < kPage; ++s) keys[s] = key_in(l, head, d, s), values[s] = value_in(l, head, d, s);
    for (int s = 0; s < kPage; ++s) key_sum += keys[s], value_sum += values[s];
    key[d] = key_sum / kPage, value[d] = value_sum / kPage;
  }
  if (l.kind == Kind::int8) rotate_if_whole(key, l.dim_padded);
  Mean to(l, mean);
  float key_scale = narrow_key(l, key, to.key), value_scale = narrow_value(l, value, to.value);
  to.scales[0] = key_scale, to.scales[1] = value_scale;
}

void gather_means(const PageLayout& l, uint8_t* const* means, int count, uint8_t* page, int kv_head) {
  constexpr int ahead = 8;
  uint8_t* head = page + kv_head * l.head_bytes;
  alignas(64) uint8_t nothing[4 * kMaxDim] = {};
  int slots = l.kind == Kind::f32 ? 1 : l.kind == Kind::bf16 ? 2 : kStep, dim = l.dim_padded;
  for (int i = 0; i < count; i += slots) {
    const uint8_t* values[4];
    for (int s = 0; s < slots; ++s) {
      values[s] = nothing;
      if (i + s >= count) continue;
      if (i + s + ahead < count) prefetch(means[i + s + ahead], l.mean_bytes);
      Mean from(l, means[i + s]);
      place_key(l, head, i + s, from.key, from.scales[0]);
      if (l.kind == Kind::int8) ((float*)(head + l.value_scale_offset))[i + s] = from.scales[1];
      values[s] = from.value;
    }
    uint8_t* to = head + l.value_offset + i * dim * element_bytes(l);
    if (l.kind == Kind::f32) weave<1, float>(values, dim, to);
    else if (l.kind == Kind::bf16) weave<2, uint16_t>(values, dim, to);
    else weave<kStep, uint8_t>(values, dim, to);
  }
}

void turn_back(const PageLayout& l, uint8_t* page, int kv_head, const float* cosines, const float* sines) {
  uint8_t* head = page + kv_head * l.head_bytes;
  int half = l.dim / 2, quarter = l.dim / 4;
  bool in_order = turns_in_order(l.dim);
  alignas(64) float key[kMaxDim];
  for (int slot = 0; slot < kPage; ++slot) {
    for (int d = 0; d < l.dim_padded; ++d) key[d] = key_in(l, head, d, slot);
    if (l.kind == Kind::int8) rotate_if_whole(key, l.dim_padded);
    for (int i = 0; i < half; ++i) {
      float& a = key[in_order && i >= quarter ? i + quarter : i];
      float& b = *(&a + (in_order ? quarter : half));
      float turned = a * cosines[i] + b * sines[i];
      b = b * cosines[i] - a * sines[i], a = turned;
    }
    store_key(l, head, slot, key);
  }
}

constexpr size_t kAttendScratch = size_t(4) * ((kMaxQueries + kSpan) * kMaxDim + 2 * kMaxQueries);

// Two spans as one, for `count` queries: the states of the next are scaled into those before them.
void merge(float* sums, float* most, float* total, const float* sums_next, const float* most_next,
           const float* total_next, int count, int dim) {
  alignas(64) float before[kLanes], after[kLanes];
  for (int start = 0; start < count; start += kLanes) {
    int some = count - start < kLanes ? count - start : kLanes;
    for (int i = 0; i < kLanes; ++i) {
      bool is_there = i < some;
      before[i] = is_there ? most[start + i] : 0.0f, after[i] = is_there ? most_next[start + i] : 0.0f;
    }
    vf one = vmax(load(before), all(-1e30f)), other = vmax(load(after), all(-1e30f));
    vf bound = vmax(one, other);
    store(before, power_of_two<7>(sub(one, bound)));
    store(after, power_of_two<7>(sub(other, bound)));
    for (int i = 0; i < some; ++i) {
      int at = start + i;
      float* to = sums + size_t(at) * dim;
      const float* from = sums_next + size_t(at) * dim;
      vf old_share = all(before[i]), new_share = all(after[i]);
      for (int d = 0; d < dim; d += kLanes)
        store(to + d, fma(load(from + d), new_share, mul(load(to + d), old_share)));
      total[at] = total[at] * before[i] + total_next[at] * after[i];
      most[at] = most[at] > most_next[at] ? most[at] : most_next[at];
    }
  }
}

}  // namespace
