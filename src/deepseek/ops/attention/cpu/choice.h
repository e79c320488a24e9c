// Which pages a query is to see: scores of whole pages, and the choice among them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pages.h"

namespace {

constexpr int kScoredPages = kSpan / kPage;

template <typename T>
void page_scores_typed(const Attend& a, const Query* queries, int count, int first, int last,
                       float* out, ptrdiff_t stride, Prepared<T> from) {
  const PageLayout& l = *a.layout;
  int dim = l.dim_padded;
  constexpr int kRows = 16;
  alignas(64) float s[kRows * kSpan];
  [[maybe_unused]] int configured = 0;
  for (int start = first; start < last; start += kScoredPages) {
    int some_pages = std::min(kScoredPages, last - start);
    PageView<T> pages[kScoredPages] = {};
    for (int i = 0; i < some_pages; ++i) {
      const uint8_t* head = a.pages + size_t(a.table[start + i]) * l.page_bytes + a.kv_head * l.head_bytes;
      if constexpr (sizeof(T) == 2) pages[i] = view_bf16(l, head, from.wide + size_t(2 * i) * kPage * dim);
      else pages[i] = {(const T*)head, nullptr};
      if constexpr (sizeof(T) == 1) pages[i].key_scale = (const float*)(head + l.key_scale_offset);
    }
    for (int base = 0; base < count; base += kRows) {
      int some = std::min(kRows, count - base);
      const T* q = from.queries + size_t(base) * dim;
#if defined(DEEPSEEK_AMX) || defined(DEEPSEEK_AMX_EMULATED)
      if constexpr (sizeof(T) < 4) {
        if (some != configured) configure_attention<T>(configured = some, dim);
        for (int i = 0; i < some_pages; ++i)
          tile_scores(q, from.terms + base, some, pages[i].keys, dim, s + i * kPage);
      }
#endif
      if constexpr (sizeof(T) == 4 || !kHasTiles)
        for (int i = 0; i < some_pages; ++i) {
          auto run = [&](auto rows, int r) {
            constexpr int R = decltype(rows)::value;
            const T* vectors[R];
            for (int k = 0; k < R; ++k) vectors[k] = q + size_t(r + k) * dim;
            scores_of<R>(vectors, from.terms + base + r, pages[i].keys, dim, s + r * kSpan + i * kPage);
          };
          int r = 0;
          for (; r + 3 <= some; r += 3) run(std::integral_constant<int, 3>{}, r);
          for (; r < some; ++r) run(std::integral_constant<int, 1>{}, r);
        }
      for (int r = 0; r < some; ++r)
        for (int i = 0; i < some_pages; ++i) {
          const Query& query = queries[base + r];
          int slot = (start + i) * kPage, low = query.low - slot, high = query.high - slot;
          bool is_cut = low > 0 || high < kPage;
          vf peak = all(-INFINITY);
          for (int v = 0; v < kPageVectors; ++v) {
            vf x = load(s + r * kSpan + i * kPage + v * kLanes);
            if (pages[i].key_scale) x = mul(x, load(pages[i].key_scale + v * kLanes));
            if (is_cut) x = where_between(x, v * kLanes, low, high, -INFINITY);
            peak = vmax(peak, x);
          }
          float factor = a.scale * from.scales[base + r];
          factor = factor > 0 ? factor : 1e-30f;  // of a query of zeros: what it may not see stays out
          out[size_t(base + r) * stride + start + i] = largest(peak) * factor;
        }
    }
  }
#if defined(DEEPSEEK_AMX) || defined(DEEPSEEK_AMX_EMULATED)
  if constexpr (sizeof(T) < 4) tile_release();
#endif
}

void page_scores(const Attend& a, const Query* queries, int count, int first, int last, float* out,
                 ptrdiff_t stride, void* scratch) {
  typed(*a.layout, scratch, [&](auto from) {
    page_scores_typed(a, queries, count, first, last, out, stride, from);
  });
}

// Largest bound that fewer than `wanted` of the values are above, by bisection; values as integers in
// the order of the floats.
inline int32_t bound_of_largest(const int32_t* values, int count, int wanted) {
  int64_t low = INT32_MIN, high = INT32_MAX;  // at least `wanted` are above low - 1, fewer above high
  while (low < high) {
    int32_t middle = int32_t((low + high) >> 1);
    int above = 0;
    for (int i = 0; i < count; ++i) above += values[i] > middle;
    if (above < wanted) high = middle;
    else low = int64_t(middle) + 1;
  }
  return int32_t(low);
}

// The pages that `count` heads see together, of `pages` that hold something: the first ones, the recent
// ones, and of those between the largest, up to `budget` in all. A page counts by the head to which it
// matters most, each head's scores less the logarithm of the sum of their exponentials. Of equals the
// first. `scratch` holds 2 * (pages + 16) floats.
int choose_pages(float* scores, ptrdiff_t stride, int count, int pages, int first_pages,
                 int recent_pages, int budget, int32_t* chosen, float* scratch) {
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
    int32_t least = bound_of_largest(ordered + low, high - low, wanted);
    int equals = wanted;
    for (int p = low; p < high; ++p) equals -= ordered[p] > least;
    for (int p = low; p < high; ++p)
      if (ordered[p] > least || (ordered[p] == least && equals-- > 0)) chosen[taken++] = p;
  }
  for (int p = high; p < pages; ++p) chosen[taken++] = p;
  return taken;
}

}  // namespace
