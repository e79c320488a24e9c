// Which pages a query is to see: scores of whole pages, and the choice among them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pages.h"

namespace {

constexpr int kPeakPages = 16;  // pages whose largest scores are put side by side

// The largest of each of kLanes rows of a page's scores.
inline vf largest_in_rows(const float* scores) {
  vf each[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const float* row = scores + i * kSpan;
    vf a = load(row), b = load(row + kLanes);
    for (int v = 2; v < kPageVectors; v += 2)
      a = vmax(a, load(row + v * kLanes)), b = vmax(b, load(row + (v + 1) * kLanes));
    each[i] = vmax(a, b);
  }
  return largest_of_each(each);
}

// Largest scores of queries with the keys that they see in one page, into `peaks`: [count], room for 16 more.
// `channels` of them from `first` on are multiplied.
template <typename T>
void page_peaks(const PageView<T>& page, const Prepared<T>& from, const Query* queries, int count, int slot, int dim,
                int first, float* peaks) {
  bool is_whole = std::all_of(queries, queries + count, [&](const Query& q) { return q.low <= slot && q.high >= slot + kPage; });
  int channels = dim - first;
  const T* keys = page.keys + size_t(first) * kPage;
  alignas(64) float s[kPageRows * kSpan];
  [[maybe_unused]] bool fits = channels * sizeof(T) <= 64;
  if constexpr (kHasTiles && sizeof(T) < 4) if (fits) load_peak_keys(keys);
  for (int base = 0; base < count; base += kPageRows) {
    int some = std::min(kPageRows, count - base);
    auto largest_seen = [&](int start) {
      vf each[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        int r = std::min(start + i, some - 1);
        const Query& query = queries[base + r];
        each[i] = all(-INFINITY);
        for (int v = 0; v < kPageVectors; ++v) {
          vf x = load(s + r * kSpan + v * kLanes);
          if constexpr (kHasTiles && sizeof(T) == 1) x = to_float(add_i(as_int(x), all_i(from.terms[base + r])));
          if (page.key_scale) x = mul(x, load(page.key_scale + v * kLanes));
          each[i] = vmax(each[i], where_between(x, v * kLanes, query.low - slot, query.high - slot, -INFINITY));
        }
      }
      return largest_of_each(each);
    };
    const T* q = from.queries + size_t(base) * dim + first;
    const int* terms = from.terms + base;
    if constexpr (kHasTiles && sizeof(T) < 4) {
      if (fits) peak_scores(q, dim, s);
      else tile_scores(q, dim, keys, channels, s);
    } else {
      auto run = [&](auto rows, int r) {
        constexpr int R = decltype(rows)::value;
        const T* vectors[R];
        for (int k = 0; k < R; ++k) vectors[k] = q + size_t(r + k) * dim;
        scores_of<R>(vectors, terms + r, keys, channels, s + r * kSpan);
      };
      int r = 0;
      for (; r + 3 <= some; r += 3) run(std::integral_constant<int, 3>{}, r);
      for (; r < some; ++r) run(std::integral_constant<int, 1>{}, r);
    }
    for (int start = 0; start < some; start += kLanes)
      store(peaks + base + start, is_whole && !page.key_scale ? largest_in_rows(s + start * kSpan) : largest_seen(start));
  }
}

template <typename T>
void page_scores_typed(const Attend& a, const Query* queries, int count, int first, int last,
                       float* out, ptrdiff_t stride, Prepared<T> from) {
  const PageLayout& l = *a.layout;
  alignas(64) static thread_local float peaks[kPeakPages][kMaxQueries + kPageRows];
  if constexpr (kHasTiles && sizeof(T) < 4) {
    int rows = std::min(kPageRows, count), channels = l.dim_padded - l.scored_from;
    if (channels * sizeof(T) <= 64) configure_peaks<T>(rows, channels);
    else configure_attention<T>(rows, channels);
  }
  for (int start = first; start < last; start += kPeakPages) {
    int some = std::min(kPeakPages, last - start);
    for (int i = 0; i < some; ++i) {
      const uint8_t* head = head_of(a, start + i);
      if (start + i + 1 < last)
        prefetch(head_of(a, start + i + 1) + l.value_offset / l.dim_padded * l.scored_from,
                 l.value_offset / l.dim_padded * (l.dim_padded - l.scored_from));
      PageView<T> page;
      if constexpr (sizeof(T) == 2) page = view_bf16(l, head, from.wide);
      else page = {(const T*)head, nullptr};
      if constexpr (sizeof(T) == 1) page.key_scale = (const float*)(head + l.key_scale_offset);
      page_peaks(page, from, queries, count, (start + i) * kPage, l.dim_padded, l.scored_from, peaks[i]);
    }
    for (int r = 0; r < count; ++r) {
      float factor = a.scale * from.scales[r];
      factor = factor > 0 ? factor : 1e-30f;  // of a query of zeros: what it may not see stays out
      for (int i = 0; i < some; ++i) out[size_t(r) * stride + start + i] = peaks[i][r] * factor;
    }
  }
  if constexpr (kHasTiles && sizeof(T) < 4) tile_release();
}

void page_scores(const Attend& a, const Query* queries, int count, int first, int last, float* out,
                 ptrdiff_t stride, void* scratch) {
  typed(*a.layout, scratch, [&](auto from) {
    page_scores_typed(a, queries, count, first, last, out, stride, from);
  });
}

// A bound that just `wanted` of the values are above, or the largest that fewer are above, by bisection;
// values as integers in the order of the floats.
inline int32_t bound_of_largest(const int32_t* values, int count, int wanted) {
  int32_t least = values[0], most = values[0];
  for (int i = 1; i < count; ++i) least = std::min(least, values[i]), most = std::max(most, values[i]);
  int64_t low = least, high = most;  // at least `wanted` are above low - 1, fewer above high
  while (low < high) {
    int32_t middle = int32_t((low + high) >> 1);
    int above = 0;
    for (int i = 0; i < count; ++i) above += values[i] > middle;
    if (above == wanted) return middle;
    if (above < wanted) high = middle;
    else low = int64_t(middle) + 1;
  }
  return int32_t(low);
}

// The pages that `count` heads see together, of `pages` that hold something: all if the budget has room for
// them; or else the first ones, the recent ones, and of those between the largest, up to `budget` in all,
// whose share is above the `least` one. A page counts by the head to which it matters most; its share of a
// head is its score less the logarithm of the sum of the exponentials of all. Of equals the first.
// `scratch` holds 2 * (pages + 16) floats.
int choose_pages(float* scores, ptrdiff_t stride, int count, int pages, int first_pages,
                 int recent_pages, int budget, float least_share, int32_t* chosen, float* scratch) {
  int low = std::min(first_pages, pages), high = std::max(low, pages - recent_pages);
  int wanted = std::min(budget - low - (pages - high), high - low), taken = 0;
  for (int p = 0; p < low; ++p) chosen[taken++] = p;
  if (wanted > 0 && wanted == high - low) {
    for (int p = low; p < high; ++p) chosen[taken++] = p;
  } else if (wanted > 0) {
    float* best = scratch;
    for (int h = 0; h < count; ++h) {
      const float* row = scores + h * stride;
      vf peak = all(row[0]), total = zero();
      int p = 0;
      for (; p + kLanes <= pages; p += kLanes) peak = vmax(peak, load(row + p));
      float most = largest(peak);
      for (; p < pages; ++p) most = std::max(most, row[p]);
      for (p = 0; p + kLanes <= pages; p += kLanes)
        total = add(total, power_of_two<7>(mul(sub(load(row + p), all(most)), all(kLog2E))));
      float mass = sum(total);
      for (; p < pages; ++p) mass += std::exp(row[p] - most);
      float bound = most + std::log(mass);
      for (p = 0; p < pages; p += kLanes) {  // behind the pages there is room, which nobody reads
        vf share = sub(load(row + p), all(bound));
        store(best + p, h ? vmax(load(best + p), share) : share);
      }
    }
    int32_t* ordered = (int32_t*)(scratch + pages + 16);
    for (int p = low; p < high; ++p) {
      int32_t bits;
      std::memcpy(&bits, best + p, 4);
      ordered[p] = bits ^ (bits >> 31 & 0x7fffffff);
    }
    int32_t least;
    std::memcpy(&least, &least_share, 4);
    least ^= least >> 31 & 0x7fffffff;
    int above = 0, equals = 0;
    for (int p = low; p < high; ++p) above += ordered[p] > least;
    if (above > wanted) {
      least = bound_of_largest(ordered + low, high - low, wanted), equals = wanted;
      for (int p = low; p < high; ++p) equals -= ordered[p] > least;
    }
    for (int p = low; p < high; ++p)
      if (ordered[p] > least || (ordered[p] == least && equals-- > 0)) chosen[taken++] = p;
  }
  for (int p = high; p < pages; ++p) chosen[taken++] = p;
  return taken;
}

}  // namespace
