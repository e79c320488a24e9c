// Attention of query vectors over pages of keys and values, by one softmax, a span at a time.
#pragma once

#include "../../cpu/types.h"
#include "../../cpu/vec.h"

namespace {

using namespace deepseek;

constexpr int kPageVectors = kPage / kLanes;
#if defined(__AVX512F__)
constexpr int kQueryTile = 6, kColumnTile = 4;
#else
constexpr int kQueryTile = 3, kColumnTile = 2;
#endif

void store_kv(const PageLayout& l, uint8_t* page, int kv_head, int slot, const float* key,
              const float* value) {
  uint8_t* head = page + kv_head * l.head_bytes;
  uint8_t* values = head + l.value_offset;
  if (l.kind == Kind::f32) {
    for (int d = 0; d < l.dim; ++d) ((float*)head)[d * kPage + slot] = key[d];
    std::memcpy((float*)values + size_t(slot) * l.dim_padded, value, size_t(l.dim) * 4);
    return;
  }
  auto place_key = [&](int d) { return size_t(d / 2 * kPage + slot) * 2 + d % 2; };
  auto place_value = [&](int d) { return (size_t(slot / 2) * l.dim_padded + d) * 2 + slot % 2; };
  if (l.kind == Kind::bf16) {
    for (int d = 0; d < l.dim; ++d) {
      ((uint16_t*)head)[place_key(d)] = float_to_bf16(key[d]);
      ((uint16_t*)values)[place_value(d)] = float_to_bf16(value[d]);
    }
    return;
  }
  float key_bound = 0, value_bound = 0;
  for (int d = 0; d < l.dim; ++d) {
    key_bound = std::fmax(key_bound, std::fabs(key[d]));
    value_bound = std::fmax(value_bound, std::fabs(value[d]));
  }
  ((float*)(head + l.key_scale_offset))[slot] = key_bound / 127.0f;
  ((float*)(head + l.value_scale_offset))[slot] = value_bound / 127.0f;
  float key_inverse = key_bound > 0 ? 127.0f / key_bound : 0.0f;
  float value_inverse = value_bound > 0 ? 127.0f / value_bound : 0.0f;
  for (int d = 0; d < l.dim; ++d) {
    ((int8_t*)head)[place_key(d)] = int8_t(std::nearbyint(key[d] * key_inverse));
    ((int8_t*)values)[place_value(d)] = int8_t(std::nearbyint(value[d] * value_inverse));
  }
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
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kColumnTile; ++v) acc[r][v] = dot_bf16(acc[r][v], b[v], q[r] + d);
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
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < C; ++v) acc[r][v] = dot_bf16(acc[r][v], w[v], p + r * kPage + s);
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

template <int R, typename T>
void weighted_values(const T* p, const T* values, int dim, const float* correction, float* sums) {
  int column = 0;
  auto run = [&](auto width) {
    constexpr int C = decltype(width)::value;
    for (; column + C * kLanes <= dim; column += C * kLanes) {
      if constexpr (sizeof(T) == 2) values_bf16<R, C>(p, values, dim, correction, sums, column);
      else values_f32<R, C>(p, values, dim, correction, sums, column);
    }
  };
  run(std::integral_constant<int, kColumnTile>{});
  if constexpr (kColumnTile > 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
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

// The softmax state of R queries moves on by one page.
template <int R, typename T>
void attend_page(const Attend& a, const PageView<T>& page, const T* const* q, const Query* queries,
                 int first_slot, float* sums, float* most, float* total) {
  int dim = a.layout->dim_padded;
  alignas(64) float s[R * kPage];
  alignas(64) T p[R * kPage];
  float correction[R];
  if constexpr (sizeof(T) == 2) scores_bf16<R>(q, page.keys, dim, s);
  else scores_f32<R>(q, page.keys, dim, s);
  for (int r = 0; r < R; ++r) {
    float* row = s + r * kPage;
    int low = queries[r].low - first_slot, high = queries[r].high - first_slot;
    bool is_cut = low > 0 || high < kPage;
    vf peak = all(most[r]);
    for (int v = 0; v < kPageVectors; ++v) {
      vf x = mul(load(row + v * kLanes), all(a.scale));
      if (page.key_scale) x = mul(x, load(page.key_scale + v * kLanes));
      if (is_cut) x = where_between(x, v * kLanes, low, high, -INFINITY);
      store(row + v * kLanes, x);
      peak = vmax(peak, x);
    }
    float bound = largest(peak);
    if (bound == -INFINITY) bound = 0.0f;  // nothing is seen yet
    correction[r] = most[r] == -INFINITY ? 0.0f : std::exp(most[r] - bound);
    vf mass = zero();
    for (int v = 0; v < kPageVectors; ++v) {
      vf x = exponential(sub(load(row + v * kLanes), all(bound)));
      if (is_cut) x = where_between(x, v * kLanes, low, high, 0.0f);
      mass = add(mass, x);
      if (page.value_scale) x = mul(x, load(page.value_scale + v * kLanes));
      if constexpr (sizeof(T) == 2) store_bf16(p + r * kPage + v * kLanes, x);
      else store(p + r * kPage + v * kLanes, x);
    }
    bool sees = high > 0 && low < kPage;
    most[r] = sees || most[r] != -INFINITY ? bound : -INFINITY;
    total[r] = total[r] * correction[r] + sum(mass);
  }
  weighted_values<R, T>(p, page.values, dim, correction, sums);
}

template <typename T>
void attend_tiles(const Attend& a, const PageView<T>& page, const T* q, const Query* queries,
                  int count, int slot, float* sums, float* most, float* total) {
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
    attend_page<R, T>(a, page, vectors, queries + start, slot, sums + size_t(start) * dim,
                      most + start, total + start);
  };
  int i = 0;
  for (; i + kQueryTile <= count; i += kQueryTile)
    run(std::integral_constant<int, kQueryTile>{}, i);
  if constexpr (kQueryTile > 3)
    for (; i + 3 <= count; i += 3) run(std::integral_constant<int, 3>{}, i);
  for (; i < count; ++i) run(std::integral_constant<int, 1>{}, i);
}

constexpr int kMaxQueries = 48, kMaxDim = 256;

template <typename T>
void attend_typed(const Attend& a, const Query* queries, int count, int start, int stop,
                  float* sums, float* most, float* total, T* scratch) {
  const PageLayout& l = *a.layout;
  T* q = scratch;
  T* wide = scratch + size_t(kMaxQueries) * l.dim_padded;
  for (int i = 0; i < count; ++i) {
    most[i] = -INFINITY, total[i] = 0.0f;
    for (int d = 0; d < l.dim_padded; ++d) {
      float value = d < l.dim ? queries[i].vector[d] : 0.0f;
      if constexpr (sizeof(T) == 2) q[i * l.dim_padded + d] = float_to_bf16(value);
      else q[i * l.dim_padded + d] = value;
      sums[i * l.dim_padded + d] = 0.0f;
    }
  }
  for (int slot = start / kPage * kPage; slot < stop; slot += kPage) {
    const uint8_t* head = a.pages + size_t(a.table[slot / kPage]) * l.page_bytes +
                          a.kv_head * l.head_bytes;
    PageView<T> page;
    if constexpr (sizeof(T) == 2) page = view_bf16(l, head, wide);
    else page = {(const float*)head, (const float*)(head + l.value_offset)};
    attend_tiles<T>(a, page, q, queries, count, slot, sums, most, total);
  }
}

void attend_span(const Attend& a, const Query* queries, int count, int start, int stop, float* sums,
                 float* most, float* total, void* scratch) {
  if (a.layout->kind == Kind::f32)
    attend_typed<float>(a, queries, count, start, stop, sums, most, total, (float*)scratch);
  else
    attend_typed<uint16_t>(a, queries, count, start, stop, sums, most, total, (uint16_t*)scratch);
}

constexpr size_t kAttendScratch = size_t(4) * (kMaxQueries + 2 * kPage) * kMaxDim;

// Two spans as one: the sums of the next are scaled into those before it.
void merge(float* sums, float* most, float* total, const float* next, float most_next,
           float total_next, int dim) {
  float bound = *most > most_next ? *most : most_next;
  if (bound == -INFINITY) return;
  float before = *most == -INFINITY ? 0.0f : std::exp(*most - bound);
  float after = most_next == -INFINITY ? 0.0f : std::exp(most_next - bound);
  for (int d = 0; d < dim; d += kLanes)
    store(sums + d, fma(load(next + d), all(after), mul(load(sums + d), all(before))));
  *total = *total * before + total_next * after;
  *most = bound;
}

}  // namespace
