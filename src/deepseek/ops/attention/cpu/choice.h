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

// Whether the channels that are scored fill one tile at most.
template <typename T>
constexpr bool fits_a_tile(int channels) { return kHasTiles && sizeof(T) < 4 && channels * sizeof(T) <= 64; }

template <typename T>
void load_scored(const T* keys, int channels) {
  if constexpr (kHasTiles && sizeof(T) < 4) if (fits_a_tile<T>(channels)) load_peak_keys(keys);
}

// Products of up to kPageRows loaded queries, from `base` on, with a page's keys, of the channels from `first` on.
template <typename T>
void channel_scores(const T* keys, const Prepared<T>& from, int base, int some, int dim, int first, float* s) {
  int channels = dim - first;
  const T* q = from.queries + size_t(base) * dim + first;
  const int* terms = from.terms + base;
  if constexpr (kHasTiles && sizeof(T) < 4) {
    if (fits_a_tile<T>(channels)) return peak_scores(q, dim, s);
    return tile_scores(q, dim, keys, channels, s);
  }
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

// Largest scores of queries with the keys that they see in one page, into `peaks`: [count], room for 16 more.
// `channels` of them from `first` on are multiplied.
template <typename T>
void page_peaks(const PageView<T>& page, const Prepared<T>& from, const Query* queries, int count, int slot, int dim,
                int first, float* peaks) {
  bool is_whole = std::all_of(queries, queries + count, [&](const Query& q) { return q.low <= slot && q.high >= slot + kPage; });
  int channels = dim - first;
  const T* keys = page.keys + size_t(first) * kPage;
  alignas(64) float s[kPageRows * kSpan];
  load_scored(keys, channels);
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
    channel_scores(keys, from, base, some, dim, first, s);
    for (int start = 0; start < some; start += kLanes)
      store(peaks + base + start, is_whole && !page.key_scale ? largest_in_rows(s + start * kSpan) : largest_seen(start));
  }
}

template <typename T>
void configure_scores(const PageLayout& l, int count) {
  if constexpr (kHasTiles && sizeof(T) < 4) {
    int rows = std::min(kPageRows, count), channels = l.dim_padded - l.scored_from;
    if (fits_a_tile<T>(channels)) configure_peaks<T>(rows, channels);
    else configure_attention<T>(rows, channels);
  }
}

template <typename T>
void page_scores_typed(const Attend& a, const Query* queries, int count, int first, int last,
                       float* out, ptrdiff_t stride, Prepared<T> from) {
  const PageLayout& l = *a.layout;
  alignas(64) static thread_local float peaks[kPeakPages][kMaxQueries + kPageRows];
  configure_scores<T>(l, count);
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

// Keys of the scored channels of a page, and the mean keys of its clusters.
struct Clusters {
  int dim;
  alignas(64) float keys[kPage][kMaxDim], means[kSummary][kMaxDim];
  float nearest[kPage];  // squared distance of each key to the nearest mean so far

  float distance(const float* a, const float* b) const {
    vf total = zero();
    for (int d = 0; d < dim; d += kLanes) {
      vf by = sub(load(a + d), load(b + d));
      total = fma(by, by, total);
    }
    return sum(total);
  }
  // Farthest point first, from the mean of all, then twice the means of the keys that are nearest.
  void find() {
    alignas(64) float middle[kMaxDim] = {};
    for (int s = 0; s < kPage; ++s)
      for (int d = 0; d < dim; ++d) middle[d] += keys[s][d] * (1.0f / kPage);
    for (int s = 0; s < kPage; ++s) nearest[s] = distance(keys[s], middle);
    for (int i = 0; i < kSummary; ++i) {
      int far = int(std::max_element(nearest, nearest + kPage) - nearest);
      std::memcpy(means[i], keys[far], dim * sizeof(float));
      for (int s = 0; s < kPage; ++s) {
        float to = distance(keys[s], means[i]);
        nearest[s] = i ? std::min(nearest[s], to) : to;
      }
    }
    for (int round = 0; round < 2; ++round) move();
  }
  void move() {
    alignas(64) float sums[kSummary][kMaxDim] = {};
    int counts[kSummary] = {};
    for (int s = 0; s < kPage; ++s) {
      int best = 0;
      float least = INFINITY;
      for (int i = 0; i < kSummary; ++i) {
        float to = distance(keys[s], means[i]);
        if (to < least) least = to, best = i;
      }
      ++counts[best];
      for (int d = 0; d < dim; ++d) sums[best][d] += keys[s][d];
    }
    for (int i = 0; i < kSummary; ++i)
      for (int d = 0; counts[i] && d < dim; ++d) means[i][d] = sums[i][d] / float(counts[i]);
  }
};

// Bytes that a page of this layout holds side by side of a key.
inline int chunk_bytes(const PageLayout& l) { return l.kind == Kind::int8 ? kStep : 4; }

void page_summary(const PageLayout& l, const uint8_t* page, int kv_head, uint8_t* summary) {
  static thread_local Clusters c;
  const uint8_t* head = page + kv_head * l.head_bytes;
  PageLayout part = l;  // of the scored channels
  part.dim_padded = c.dim = l.dim_padded - l.scored_from;
  for (int d = 0; d < c.dim; ++d)
    for (int s = 0; s < kPage; ++s) c.keys[s][d] = key_in(l, head, l.scored_from + d, s);
  c.find();
  int bytes = chunk_bytes(l), chunks = int(part.dim_padded * element_bytes(l)) / bytes;
  float* scales = (float*)(summary + size_t(chunks) * bytes * kSummary);
  for (int i = 0; i < kSummary; ++i) {
    alignas(64) uint8_t narrow[4 * kMaxDim];
    if (l.kind == Kind::int8) rotate_if_whole(c.means[i], c.dim);
    scales[i] = narrow_key(part, c.means[i], narrow);
    for (int k = 0; k < chunks; ++k)
      std::memcpy(summary + size_t(k * kSummary + i) * bytes, narrow + k * bytes, bytes);
  }
}

// Keys of a page whose slots are the summaries of up to kPage / kSummary pages.
struct SummaryPage {
  alignas(64) uint8_t keys[4 * kPage * kMaxDim];
  alignas(64) uint16_t wide[kPage * kMaxDim];
  alignas(64) float scales[kPage];

  void gather(const PageLayout& l, uint8_t* const* summaries, int count) {
    int bytes = chunk_bytes(l), chunks = int((l.dim_padded - l.scored_from) * element_bytes(l)) / bytes;
    size_t row = size_t(bytes) * kSummary;
    for (int i = 0; i < count; ++i) {
      for (int k = 0; k < chunks; ++k)
        std::memcpy(keys + size_t(k) * kPage * bytes + i * row, summaries[i] + k * row, row);
      std::memcpy(scales + i * kSummary, summaries[i] + chunks * row, kSummary * sizeof(float));
    }
  }
  // As a product reads them: int8 is widened where there is none of it.
  template <typename T>
  const T* as(const PageLayout& l) {
    if (sizeof(T) != 2 || l.kind != Kind::int8) return (const T*)keys;
    int count = (l.dim_padded - l.scored_from) * kPage;
    for (int i = 0; i < count; i += 2 * kLanes) {
      vi k = s8_to_bf16((const int8_t*)keys + i);
      std::memcpy(wide + i, &k, sizeof(k));
    }
    return (const T*)wide;
  }
};

template <typename T>
void summary_scores_typed(const Attend& a, uint8_t* const* summaries, int count, int first, int last, float* out,
                          ptrdiff_t stride, Prepared<T> from) {
  constexpr int together = kPage / kSummary;
  static thread_local SummaryPage page;
  const PageLayout& l = *a.layout;
  alignas(64) float s[kPageRows * kSpan];
  configure_scores<T>(l, count);
  for (int start = first; start < last; start += together) {
    int some = std::min(together, last - start);
    page.gather(l, summaries + start, some);
    const T* keys = page.as<T>(l);
    load_scored(keys, l.dim_padded - l.scored_from);
    for (int base = 0; base < count; base += kPageRows) {
      int rows = std::min(kPageRows, count - base);
      channel_scores(keys, from, base, rows, l.dim_padded, l.scored_from, s);
      if constexpr (kHasTiles) add_terms<T>(from.terms + base, rows, s);
      for (int r = 0; r < rows; ++r) {
        float factor = a.scale * from.scales[base + r], *to = out + size_t(base + r) * stride + start;
        for (int i = 0; i < some; ++i) {
          const float *score = s + r * kSpan + i * kSummary, *scale = page.scales + i * kSummary;
          float most = -INFINITY;
          for (int k = 0; k < kSummary; ++k) most = std::max(most, score[k] * scale[k]);
          to[i] = most * factor;
        }
      }
    }
  }
  if constexpr (kHasTiles && sizeof(T) < 4) tile_release();
}

void summary_scores(const Attend& a, uint8_t* const* summaries, int count, int first, int last, float* out,
                    ptrdiff_t stride, void* scratch) {
  typed(*a.layout, scratch, [&](auto from) {
    summary_scores_typed(a, summaries, count, first, last, out, stride, from);
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
