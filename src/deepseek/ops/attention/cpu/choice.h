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

// The largest of kLanes rows of a page's scores, of the keys that each sees: of all where `queries` is null.
template <typename T>
vf largest_seen(const PageView<T>& page, const float* scores, const int* terms, const Query* queries, int some,
                int slot) {
  vf each[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    int r = std::min(i, some - 1);
    each[i] = all(-INFINITY);
    for (int v = 0; v < kPageVectors; ++v) {
      vf x = load(scores + r * kSpan + v * kLanes);
      if constexpr (kHasTiles && sizeof(T) == 1) x = to_float(add_i(as_int(x), all_i(terms[r])));
      if (page.key_scale) x = mul(x, load(page.key_scale + v * kLanes));
      if (queries) x = where_between(x, v * kLanes, queries[r].low - slot, queries[r].high - slot, -INFINITY);
      each[i] = vmax(each[i], x);
    }
  }
  return largest_of_each(each);
}

// The largest score of each of up to kPageRows rows, as `largest_seen`, into `peaks`: room for kPageRows.
template <typename T>
void store_peaks(const PageView<T>& page, const float* scores, const int* terms, const Query* queries, int some, int slot,
                 float* peaks) {
  for (int r = 0; r < some; r += kLanes) {
    const float* row = scores + r * kSpan;
    bool is_plain = !queries && !page.key_scale;
    store(peaks + r, is_plain ? largest_in_rows(row)
                              : largest_seen(page, row, terms + r, queries ? queries + r : nullptr, some - r, slot));
  }
}

// Largest scores of queries with the keys that they see in one page, into `peaks`: [count], room for 16 more.
// `channels` of them from `first` on are multiplied.
template <typename T>
void page_peaks(const PageView<T>& page, const Prepared<T>& from, const Query* queries, int count, int slot, int dim,
                int first, float* peaks) {
  auto sees_all = [&](const Query& q) { return q.low <= slot && q.high >= slot + kPage; };
  bool is_whole = std::all_of(queries, queries + count, sees_all);
  int channels = dim - first;
  const T* keys = page.keys + size_t(first) * kPage;
  alignas(64) float s[kPageRows * kSpan];
  load_scored(keys, channels);
  for (int base = 0; base < count; base += kPageRows) {
    int some = std::min(kPageRows, count - base);
    channel_scores(keys, from, base, some, dim, first, s);
    store_peaks(page, s, from.terms + base, is_whole ? nullptr : queries + base, some, slot, peaks + base);
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
PageView<T> keys_of(const PageLayout& l, const uint8_t* head, const Prepared<T>& from) {
  PageView<T> page;
  if constexpr (sizeof(T) == 2) page = view_bf16(l, head, from.wide);
  else page = {(const T*)head, nullptr};
  if constexpr (sizeof(T) == 1) page.key_scale = (const float*)(head + l.key_scale_offset);
  return page;
}

inline void prefetch_scored(const PageLayout& l, const uint8_t* head) {
  size_t bytes = l.value_offset / l.dim_padded;
  prefetch(head + bytes * l.scored_from, bytes * (l.dim_padded - l.scored_from));
}

// Of a query of zeros it is above zero too: what it may not see stays out.
inline float factor_of(const Attend& a, float scale) { return std::max(a.scale * scale, 1e-30f); }

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
      if (start + i + 1 < last) prefetch_scored(l, head_of(a, start + i + 1));
      page_peaks(keys_of(l, head, from), from, queries, count, (start + i) * kPage, l.dim_padded, l.scored_from,
                 peaks[i]);
    }
    for (int r = 0; r < count; ++r) {
      float factor = factor_of(a, from.scales[r]);
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

// Loaded queries side by side that are anywhere among the others.
template <typename T>
struct GatheredRows {
  alignas(64) T queries[kPageRows * kMaxDim + 64 / sizeof(T)];  // room behind the last, for whole vectors
  float scales[kPageRows];
  int terms[kPageRows];

  void gather(const PageLayout& l, const Prepared<T>& from, int place, int row) {
    T* to = queries + place * l.dim_padded;
    const T* query = from.queries + size_t(row) * l.dim_padded;
    constexpr int step = kLanes * 4 / int(sizeof(T));  // in whole vectors, that a tile is loaded from them at once
    for (int d = l.scored_from; d < l.dim_padded; d += step) store_i(to + d, load_i(query + d));
    scales[place] = from.scales[row], terms[place] = from.terms[row];
  }
};

template <typename T>
void visitor_scores_typed(const Attend& a, const Visitors& v, float* out, Prepared<T> from) {
  const PageLayout& l = *a.layout;
  GatheredRows<T> some;
  alignas(64) float s[kPageRows * kSpan], peaks[kPageRows];
  Prepared<T> rows = from;
  rows.queries = some.queries, rows.terms = some.terms, rows.scales = some.scales;
  configure_scores<T>(l, kPageRows);
  for (int i = 0; i < v.pages; ++i) {
    const int32_t *groups = v.groups + v.first[i], count = (v.first[i + 1] - v.first[i]) * v.width;
    if (!count) continue;
    const uint8_t* head = head_of(a, v.page[i]);
    if (i + 1 < v.pages) prefetch_scored(l, head_of(a, v.page[i + 1]));
    PageView<T> page = keys_of(l, head, from);
    const T* keys = page.keys + size_t(l.scored_from) * kPage;
    load_scored(keys, l.dim_padded - l.scored_from);
    float* to = out + size_t(v.first[i]) * v.width;
    for (int base = 0, group = 0, member = 0; base < count; base += kPageRows) {
      int gathered = std::min(kPageRows, count - base);
      for (int r = 0; r < gathered; ++r) {
        some.gather(l, from, r, groups[group] * v.width + member);
        if (++member == v.width) member = 0, ++group;
      }
      channel_scores(keys, rows, 0, gathered, l.dim_padded, l.scored_from, s);
      store_peaks(page, s, some.terms, nullptr, gathered, 0, peaks);
      for (int r = 0; r < gathered; ++r) to[base + r] = peaks[r] * factor_of(a, some.scales[r]);
    }
  }
  if constexpr (kHasTiles && sizeof(T) < 4) tile_release();
}

void visitor_scores(const Attend& a, const Visitors& visitors, float* out, void* scratch) {
  typed(*a.layout, scratch, [&](auto from) { visitor_scores_typed(a, visitors, out, from); });
}

// Keys of the scored channels of a page, the mean keys of its clusters, and their radii: root mean squares of
// the distances to the mean.
struct Clusters {
  int dim;
  alignas(64) float keys[kMaxDim][kPage], means[kSummary][kMaxDim], away[kPage], nearest[kPage], radii[kSummary];
  int belongs[kPage];

  // Squared distances of all keys to a point, into `away`.
  void measure(const float* point) {
    vf total[kPageVectors];
    std::fill_n(total, kPageVectors, zero());
    for (int d = 0; d < dim; ++d)
      for (int v = 0; v < kPageVectors; ++v) {
        vf by = sub(load(keys[d] + v * kLanes), all(point[d]));
        total[v] = fma(by, by, total[v]);
      }
    for (int v = 0; v < kPageVectors; ++v) store(away + v * kLanes, total[v]);
  }
  // Farthest point first, from the mean of all, then twice the means of the keys that are nearest.
  void find() {
    alignas(64) float middle[kMaxDim];
    for (int d = 0; d < dim; ++d) {
      vf total = zero();
      for (int v = 0; v < kPageVectors; ++v) total = add(total, load(keys[d] + v * kLanes));
      middle[d] = sum(total) * (1.0f / kPage);
    }
    measure(middle);
    std::copy_n(away, kPage, nearest);
    for (int i = 0; i < kSummary; ++i) {
      int far = int(std::max_element(nearest, nearest + kPage) - nearest);
      for (int d = 0; d < dim; ++d) means[i][d] = keys[d][far];
      measure(means[i]);
      for (int s = 0; s < kPage; ++s) nearest[s] = i ? std::min(nearest[s], away[s]) : away[s];
    }
    for (int round = 0; round < 2; ++round) move();
    for (int i = 0; i < kSummary; ++i) radii[i] = radius(i);
  }
  void move() {
    int counts[kSummary] = {};
    std::fill_n(nearest, kPage, INFINITY), std::fill_n(belongs, kPage, 0);
    for (int i = 0; i < kSummary; ++i) {
      measure(means[i]);
      for (int s = 0; s < kPage; ++s) {
        belongs[s] = away[s] < nearest[s] ? i : belongs[s];
        nearest[s] = away[s] < nearest[s] ? away[s] : nearest[s];
      }
    }
    for (int s = 0; s < kPage; ++s) ++counts[belongs[s]];
    for (int d = 0; d < dim; ++d) {
      float sums[kSummary] = {};
      for (int s = 0; s < kPage; ++s) sums[belongs[s]] += keys[d][s];
      for (int i = 0; i < kSummary; ++i)
        if (counts[i]) means[i][d] = sums[i] / float(counts[i]);
    }
  }
  float radius(int cluster) {
    measure(means[cluster]);
    float total = 0;
    int count = 0;
    for (int s = 0; s < kPage; ++s)
      if (belongs[s] == cluster) total += away[s], ++count;
    return count ? std::sqrt(total / float(count)) : 0.0f;
  }
};

// Bytes that a page of this layout holds side by side of a key.
inline int chunk_bytes(const PageLayout& l) { return l.kind == Kind::int8 ? kStep : 4; }

void page_summary(const PageLayout& l, const uint8_t* page, int kv_head, uint8_t* summary) {
  static thread_local Clusters clusters;
  Clusters& c = clusters;
  const uint8_t* head = page + kv_head * l.head_bytes;
  PageLayout part = l;  // of the scored channels
  part.dim_padded = c.dim = l.dim_padded - l.scored_from;
  for (int d = 0; d < c.dim; ++d)
    for (int s = 0; s < kPage; ++s) c.keys[d][s] = key_in(l, head, l.scored_from + d, s);
  c.find();
  int bytes = chunk_bytes(l), chunks = int(part.dim_padded * element_bytes(l)) / bytes;
  float* scales = (float*)(summary + size_t(chunks) * bytes * kSummary);
  std::copy_n(c.radii, kSummary, scales + kSummary);
  for (int i = 0; i < kSummary; ++i) {
    alignas(64) uint8_t narrow[4 * kMaxDim];
    if (l.kind == Kind::int8) rotate_if_whole(c.means[i], c.dim);
    scales[i] = narrow_key(part, c.means[i], narrow);
    for (int k = 0; k < chunks; ++k)
      std::memcpy(summary + size_t(k * kSummary + i) * bytes, narrow + k * bytes, bytes);
  }
}

// Keys of a page whose slots are the summaries of up to kTogether pages: the first ones of all, then the second
// ones, so that the largest of each page's is a maximum down the slots.
constexpr int kTogether = kPage / kSummary;
static_assert(kTogether == 4);
struct SummaryPage {
  alignas(64) uint8_t keys[4 * kPage * kMaxDim];
  alignas(64) uint16_t wide[kPage * kMaxDim];
  alignas(64) float scales[kPage], radii[kPage];

  void gather(const PageLayout& l, uint8_t* const* summaries, int count) {
    int chunks = int((l.dim_padded - l.scored_from) * element_bytes(l)) / chunk_bytes(l);
    if (chunk_bytes(l) == 4) weave<uint32_t>(summaries, count, chunks, keys);
    else weave<uint16_t>(summaries, count, chunks, keys);
    for (int i = 0; i < count; ++i) {
      const float* from = (const float*)(summaries[i] + size_t(chunks) * chunk_bytes(l) * kSummary);
      for (int c = 0; c < kSummary; ++c)
        scales[c * kTogether + i] = from[c], radii[c * kTogether + i] = from[kSummary + c];
    }
  }
  template <typename Chunk>
  static void weave(uint8_t* const* summaries, int count, int chunks, uint8_t* keys) {
    for (int i = 0; i < count; ++i) {
      const Chunk* from = (const Chunk*)summaries[i];
      Chunk* to = (Chunk*)keys + i;
      for (int k = 0; k < chunks * kSummary; ++k) to[k * kTogether] = from[k];
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
  // The largest guess of each page times a factor, of a row of scores, into `most`: room for kLanes or kTogether.
  // A guess is the score of a mean key and, for the keys on its side of it, `reach` times the radius.
  void largest_of_pages(const float* scores, float reach, float factor, float* most) const {
    vf each = all(-INFINITY);
    for (int v = 0; v < kPageVectors; ++v) {
      vf guess = fma(load(radii + v * kLanes), all(reach), mul(load(scores + v * kLanes), load(scales + v * kLanes)));
      each = vmax(each, guess);
    }
    store(most, mul(largest_of_fours(each), all(factor)));
  }
};

// The length of a loaded query, of the channels from `first` on, in the unit that it is loaded in.
template <typename T>
float length_of(const T* query, int first, int dim) {
  float total = 0;
  for (int d = first; d < dim; ++d) {
    float x;
    if constexpr (sizeof(T) == 2) x = bf16_to_float(query[d]);
    else x = float(query[d]);
    total += x * x;
  }
  return std::sqrt(total);
}

template <typename T>
void summary_scores_typed(const Attend& a, uint8_t* const* summaries, int count, int first, int last, float* out,
                          ptrdiff_t stride, Prepared<T> from) {
  static thread_local SummaryPage page;
  const PageLayout& l = *a.layout;
  alignas(64) float s[kPageRows * kSpan], most[std::max(kLanes, kTogether)];
  float reach[kMaxQueries];
  for (int r = 0; r < count; ++r)
    reach[r] = kSpread * length_of(from.queries + size_t(r) * l.dim_padded, l.scored_from, l.dim_padded);
  configure_scores<T>(l, count);
  for (int start = first; start < last; start += kTogether) {
    int some = std::min(kTogether, last - start);
    page.gather(l, summaries + start, some);
    const T* keys = page.as<T>(l);
    load_scored(keys, l.dim_padded - l.scored_from);
    for (int base = 0; base < count; base += kPageRows) {
      int rows = std::min(kPageRows, count - base);
      channel_scores(keys, from, base, rows, l.dim_padded, l.scored_from, s);
      if constexpr (kHasTiles) add_terms<T>(from.terms + base, rows, s);
      for (int r = 0; r < rows; ++r) {
        page.largest_of_pages(s + r * kSpan, reach[base + r], factor_of(a, from.scales[base + r]), most);
        float* to = out + size_t(base + r) * stride + start;
        if (some == kTogether) std::memcpy(to, most, kTogether * sizeof(float));
        else std::copy_n(most, some, to);
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

// The pages that `count` heads see together, of `pages` that hold something: the first ones, the recent ones,
// and of those between the largest, up to `budget` in all, whose share is above the `least` one. A page counts
// by the head to which it matters most; its share of a head is its score less the logarithm of the sum of the
// exponentials of all. Of equals the first. `chosen` has room for the budget, `scratch` 2 * (pages + 16) floats.
int choose_pages(float* scores, ptrdiff_t stride, int count, int pages, int first_pages,
                 int recent_pages, int budget, float least_share, int32_t* chosen, float* scratch) {
  int low = std::min(first_pages, pages), high = std::max(low, pages - recent_pages);
  int wanted = std::min(budget - low - (pages - high), high - low), taken = 0;
  for (int p = 0; p < low; ++p) chosen[taken++] = p;
  if (wanted > 0) {
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
    for (int p = low; p < high; ++p) {  // without a branch, which nothing could foretell; the recent pages follow
      int is_equal = ordered[p] == least && equals > 0;
      chosen[taken] = p, taken += (ordered[p] > least) | is_equal, equals -= is_equal;
    }
  }
  for (int p = high; p < pages; ++p) chosen[taken++] = p;
  return taken;
}

}  // namespace
