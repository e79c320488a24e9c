// Attention of query vectors over pages of keys and values, by one softmax, a span at a time.
#pragma once

#include <type_traits>

#include "../../linear/cpu/inputs.h"

namespace {

using namespace deepseek;

constexpr int kPageVectors = kPage / kLanes;
constexpr int kMaxQueries = 48, kMaxDim = 256;
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

void rope(float* head, int dim, const float* cosines, const float* sines, const float* norm,
          float eps) {
  if (norm) rms_norm(head, norm, eps, head, dim);
  int half = dim / 2, i = 0;
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

void store_kv(const PageLayout& l, uint8_t* page, int kv_head, int slot, const float* key,
              const float* value) {
  uint8_t* head = page + kv_head * l.head_bytes;
  uint8_t* values = head + l.value_offset;
  int dim = l.dim_padded;
  alignas(64) float k[kMaxDim], v[kMaxDim];
  std::memcpy(k, key, size_t(l.dim) * 4), std::memcpy(v, value, size_t(l.dim) * 4);
  for (int d = l.dim; d < dim; ++d) k[d] = v[d] = 0.0f;
  if (l.kind == Kind::f32) {
    for (int d = 0; d < dim; ++d) ((float*)head)[d * kPage + slot] = k[d];
    std::memcpy((float*)values + size_t(slot) * dim, v, size_t(dim) * 4);
    return;
  }
  if (l.kind == Kind::bf16) {
    alignas(64) uint16_t narrow[kMaxDim];
    for (int d = 0; d < dim; d += kLanes) store_bf16(narrow + d, load(k + d));
    for (int d = 0; d < dim; d += 2)
      std::memcpy(head + size_t(d / 2 * kPage + slot) * 4, narrow + d, 4);
    for (int d = 0; d < dim; d += kLanes) store_bf16(narrow + d, load(v + d));
    uint16_t* to = (uint16_t*)values + size_t(slot / 2) * dim * 2 + slot % 2;
    for (int d = 0; d < dim; ++d) to[d * 2] = narrow[d];
    return;
  }
  rotate_if_whole(k, dim);
  alignas(64) int8_t small[kMaxDim];
  int sum;
  ((float*)(head + l.key_scale_offset))[slot] = quantize_vector(k, dim, small, &sum);
  if (kStep == 4)
    for (int d = 0; d < dim; ++d) small[d] = int8_t(uint8_t(small[d]) ^ 0x80);
  for (int d = 0; d < dim; d += kStep)
    std::memcpy(head + size_t(d / kStep * kPage + slot) * kStep, small + d, kStep);
  ((float*)(head + l.value_scale_offset))[slot] = quantize_vector(v, dim, small, &sum);
  int8_t* to = (int8_t*)values + size_t(slot / kStep) * dim * kStep + slot % kStep;
  for (int d = 0; d < dim; ++d) to[d * kStep] = small[d];
}

// Scores [R][64] of R queries with a page's keys.
template <int R>
void scores_bf16(const uint16_t* const* q, const uint16_t* keys, int dim, float* out) {
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
      for (int v = 0; v < kColumnTile; ++v)
        store(out + r * kPage + (c + v) * kLanes, acc[r][v]);
  }
}

template <int R>
void scores_f32(const float* const* q, const float* keys, int dim, float* out) {
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
      for (int v = 0; v < kColumnTile; ++v)
        store(out + r * kPage + (c + v) * kLanes, acc[r][v]);
  }
}

// sums [R][dim] = sums * correction + weights [R][64] times the page's values.
template <int R, int C>
void values_bf16(const uint16_t* p, const uint16_t* values, int dim, const float* correction,
                 float* sums, int column) {
  vf acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v)
      acc[r][v] = mul(load(sums + r * dim + column + v * kLanes), all(correction[r]));
  const uint16_t* b = values + column * 2;
  for (int s = 0; s < kPage; s += 2, b += dim * 2) {
    vi w[C];
    for (int v = 0; v < C; ++v) w[v] = load_i(b + v * kLanes * 2);
    for (int r = 0; r < R; ++r) {
      Pair a = pair_of(p + r * kPage + s);
      for (int v = 0; v < C; ++v) acc[r][v] = dot_bf16(acc[r][v], w[v], a);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) store(sums + r * dim + column + v * kLanes, acc[r][v]);
}

template <int R, int C>
void values_f32(const float* p, const float* values, int dim, const float* correction, float* sums,
                int column) {
  vf acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v)
      acc[r][v] = mul(load(sums + r * dim + column + v * kLanes), all(correction[r]));
  const float* b = values + column;
  for (int s = 0; s < kPage; ++s, b += dim) {
    vf w[C];
    for (int v = 0; v < C; ++v) w[v] = load(b + v * kLanes);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < C; ++v) acc[r][v] = fma(all(p[r * kPage + s]), w[v], acc[r][v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) store(sums + r * dim + column + v * kLanes, acc[r][v]);
}

#if defined(DEEPSEEK_VNNI)
// Integer scores of R queries, -128 times whose sum stands in `terms`.
template <int R>
void scores_int8(const int8_t* const* q, const int* terms, const uint8_t* keys, int dim, float* out) {
  for (int c = 0; c < kPageVectors; c += kColumnTile) {
    vi acc[R][kColumnTile];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kColumnTile; ++v) acc[r][v] = all_i(terms[r]);
    const uint8_t* k = keys + c * kLanes * 4;
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
        store(out + r * kPage + (c + v) * kLanes, to_float(acc[r][v]));
  }
}

// sums = sums * correction + scale * (weights uint8 [R][64] times values).
template <int R, int C>
void values_int8(const uint8_t* p, const float* scale, const int8_t* values, int dim,
                 const float* correction, float* sums, int column) {
  vi acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) acc[r][v] = zero_i();
  const int8_t* b = values + column * 4;
  for (int s = 0; s < kPage; s += 4, b += dim * 4) {
    vi w[C];
    for (int v = 0; v < C; ++v) w[v] = load_i(b + v * kLanes * 4);
    for (int r = 0; r < R; ++r) {
      vi a = all_i(*(const Quad*)(p + r * kPage + s));
      for (int v = 0; v < C; ++v) acc[r][v] = dot_u8s8(acc[r][v], a, w[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) {
      float* to = sums + r * dim + column + v * kLanes;
      store(to, fma(to_float(acc[r][v]), all(scale[r]), mul(load(to), all(correction[r]))));
    }
}
#endif

template <int R, typename T>
void weighted_values(const T* p, const float* scale, const T* values, int dim,
                     const float* correction, float* sums) {
  int column = 0;
  auto run = [&](auto width) {
    constexpr int C = decltype(width)::value;
    for (; column + C * kLanes <= dim; column += C * kLanes) {
      if constexpr (sizeof(T) == 4) values_f32<R, C>(p, values, dim, correction, sums, column);
      if constexpr (sizeof(T) == 2) values_bf16<R, C>(p, values, dim, correction, sums, column);
#if defined(DEEPSEEK_VNNI)
      if constexpr (sizeof(T) == 1)
        values_int8<R, C>((const uint8_t*)p, scale, values, dim, correction, sums, column);
#endif
    }
  };
  run(std::integral_constant<int, kColumnTile>{});
  if constexpr (kColumnTile > 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
  (void)scale;
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

// The softmax state of R queries, in powers of two, moves on by one page.
template <int R, typename T>
void attend_page(const Attend& a, const PageView<T>& page, const T* const* q, const float* scales,
                 const int* terms, const Query* queries, int first_slot, float* sums, float* most,
                 float* total) {
  int dim = a.layout->dim_padded;
  alignas(64) float s[R * kPage];
  alignas(64) T p[R * kPage];
  float correction[R], weight_scale[R];
  if constexpr (sizeof(T) == 4) scores_f32<R>(q, page.keys, dim, s);
  if constexpr (sizeof(T) == 2) scores_bf16<R>(q, page.keys, dim, s);
#if defined(DEEPSEEK_VNNI)
  if constexpr (sizeof(T) == 1) scores_int8<R>(q, terms, (const uint8_t*)page.keys, dim, s);
#endif
  constexpr int terms_of_power = sizeof(T) == 4 ? 7 : 4;
  // in rounds over all rows: their chains of operations overlap
  bool is_cut[R];
  alignas(64) float before[16] = {}, bounds[16] = {}, factors[16];
  for (int r = 0; r < R; ++r) {
    float* row = s + r * kPage;
    int low = queries[r].low - first_slot, high = queries[r].high - first_slot;
    is_cut[r] = low > 0 || high < kPage;
    vf peak = all(most[r]), factor = all(a.scale * kLog2E * scales[r]);
    for (int v = 0; v < kPageVectors; ++v) {
      vf x = mul(load(row + v * kLanes), factor);
      if (page.key_scale) x = mul(x, load(page.key_scale + v * kLanes));
      if (is_cut[r]) x = where_between(x, v * kLanes, low, high, -INFINITY);
      store(row + v * kLanes, x);
      peak = vmax(peak, x);
    }
    bounds[r] = largest(peak);
  }
  for (int r = 0; r < R; ++r) {
    bool sees = bounds[r] != -INFINITY;  // this page or one before
    before[r] = most[r] == -INFINITY ? -1000.0f : most[r] - bounds[r];
    most[r] = bounds[r];
    bounds[r] = sees ? bounds[r] : 0.0f;
  }
  for (int i = 0; i < 16; i += kLanes)
    store(factors + i, power_of_two<terms_of_power>(load(before + i)));
  for (int r = 0; r < R; ++r) {
    float* row = s + r * kPage;
    vf mass = zero(), peak = zero(), bound = all(bounds[r]);
    for (int v = 0; v < kPageVectors; ++v) {
      vf x = power_of_two<terms_of_power>(sub(load(row + v * kLanes), bound));
      mass = add(mass, x);
      if (page.value_scale) x = mul(x, load(page.value_scale + v * kLanes));
      if constexpr (sizeof(T) == 4) store(p + r * kPage + v * kLanes, x);
      if constexpr (sizeof(T) == 2) store_bf16(p + r * kPage + v * kLanes, x);
      if constexpr (sizeof(T) == 1) store(row + v * kLanes, x), peak = vmax(peak, x);
    }
    correction[r] = factors[r];
    total[r] = total[r] * correction[r] + sum(mass);
    if constexpr (sizeof(T) == 1) weight_scale[r] = largest(peak) * (1.0f / 255.0f);
  }
  if constexpr (sizeof(T) == 1)
    for (int r = 0; r < R; ++r) {  // unsigned levels of 0 … 255, of the row's largest weight
      vf inverse = all(weight_scale[r] > 0 ? 1.0f / weight_scale[r] : 0.0f);
      for (int v = 0; v < kPageVectors; ++v)
        store_u8((uint8_t*)p + r * kPage + v * kLanes,
                 to_int(mul(load(s + r * kPage + v * kLanes), inverse)));
    }
  weighted_values<R, T>(p, weight_scale, page.values, dim, correction, sums);
  (void)terms;
}

template <typename T>
void attend_tiles(const Attend& a, const PageView<T>& page, const T* q, const float* scales,
                  const int* terms, const Query* queries, int count, int slot, float* sums,
                  float* most, float* total) {
  int dim = a.layout->dim_padded;
  auto run = [&](auto rows, int start) {
    constexpr int R = decltype(rows)::value;
    bool any = false;
    for (int r = 0; r < R; ++r) {
      const Query& query = queries[start + r];
      any = any || (query.high > slot && query.low < slot + kPage);
    }
    if (!any) return;
    const T* vectors[R];
    for (int r = 0; r < R; ++r) vectors[r] = q + size_t(start + r) * dim;
    attend_page<R, T>(a, page, vectors, scales + start, terms + start, queries + start, slot, sums + size_t(start) * dim,
                      most + start, total + start);
  };
  int i = 0;
  for (; i + kQueryTile <= count; i += kQueryTile)
    run(std::integral_constant<int, kQueryTile>{}, i);
  if constexpr (kQueryTile > 3)
    for (; i + 3 <= count; i += 3) run(std::integral_constant<int, 3>{}, i);
  for (; i < count; ++i) run(std::integral_constant<int, 1>{}, i);
}

template <typename T>
void attend_typed(const Attend& a, const Query* queries, int count, int start, int stop,
                  float* sums, float* most, float* total, T* scratch) {
  const PageLayout& l = *a.layout;
  int dim = l.dim_padded;
  T* q = scratch;
  T* wide = scratch + size_t(kMaxQueries) * dim;
  float scales[kMaxQueries];
  int terms[kMaxQueries];
  alignas(64) float vector[kMaxDim];
  for (int i = 0; i < count; ++i) {
    most[i] = -INFINITY, total[i] = 0.0f, scales[i] = 1.0f, terms[i] = 0;
    std::memset(sums + size_t(i) * dim, 0, size_t(dim) * sizeof(float));
    std::memcpy(vector, queries[i].vector, size_t(l.dim) * sizeof(float));
    for (int d = l.dim; d < dim; ++d) vector[d] = 0.0f;
    if (l.kind == Kind::int8) rotate_if_whole(vector, dim);
    if constexpr (sizeof(T) == 4) std::memcpy(q + size_t(i) * dim, vector, size_t(dim) * 4);
    if constexpr (sizeof(T) == 2)
      for (int d = 0; d < dim; d += kLanes) store_bf16(q + size_t(i) * dim + d, load(vector + d));
    if constexpr (sizeof(T) == 1) {
      scales[i] = quantize_vector(vector, dim, q + size_t(i) * dim, &terms[i]);
      terms[i] *= -128;
    }
  }
  for (int slot = start / kPage * kPage; slot < stop; slot += kPage) {
    const uint8_t* head = a.pages + size_t(a.table[slot / kPage]) * l.page_bytes +
                          a.kv_head * l.head_bytes;
    PageView<T> page;
    if constexpr (sizeof(T) == 2) page = view_bf16(l, head, wide);
    else page = {(const T*)head, (const T*)(head + l.value_offset)};
    if constexpr (sizeof(T) == 1) {
      page.key_scale = (const float*)(head + l.key_scale_offset);
      page.value_scale = (const float*)(head + l.value_scale_offset);
    }
    attend_tiles<T>(a, page, q, scales, terms, queries, count, slot, sums, most, total);
  }
  (void)wide;
}

void attend_span(const Attend& a, const Query* queries, int count, int start, int stop, float* sums,
                 float* most, float* total, void* scratch) {
  auto run = [&](auto* typed) {
    attend_typed(a, queries, count, start, stop, sums, most, total, typed);
  };
  if (a.layout->kind == Kind::f32) return run((float*)scratch);
#if defined(DEEPSEEK_VNNI)
  if (a.layout->kind == Kind::int8) return run((int8_t*)scratch);
#endif
  run((uint16_t*)scratch);
}

constexpr size_t kAttendScratch = size_t(4) * (kMaxQueries + 2 * kPage) * kMaxDim;

// Two spans as one: the sums of the next are scaled into those before it.
void merge(float* sums, float* most, float* total, const float* next, float most_next,
           float total_next, int dim) {
  float bound = *most > most_next ? *most : most_next;
  if (bound == -INFINITY) return;
  float before = *most == -INFINITY ? 0.0f : std::exp2(*most - bound);
  float after = most_next == -INFINITY ? 0.0f : std::exp2(most_next - bound);
  for (int d = 0; d < dim; d += kLanes)
    store(sums + d, fma(load(next + d), all(after), mul(load(sums + d), all(before))));
  *total = *total * before + total_next * after;
  *most = bound;
}

}  // namespace
