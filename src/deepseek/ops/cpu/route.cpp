// Attention to chosen pages, and attention of single tokens, whose spans or pages are shared out.
//
// A group of neighbouring tokens sees the pages that its first token chose. In a prompt a page is
// visited once for all groups of a unit that see it: what they choose differs, so that group after
// group would fetch each page from far many times.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "pass.h"

namespace deepseek {

namespace {

constexpr int kUnitTokens = 256;   // of a unit, at most: whole pages
constexpr int kChunkPages = 32;    // pages that a thread scores for a token
constexpr int kSegment = 8;        // chosen pages that are added up before the sums are merged

}  // namespace

// Tokens of a run that see all that is before them, in a layer that is routed.
int Program::dense_tokens(const Pass& pass, const Run& run) const {
  int before = shape_.route.budget_at(0) * kPage - pass.step.positions[run.start];
  return std::clamp(before, 0, run.count);
}

bool Program::is_routed(const Pass& pass, const Instruction& in, const Run& run) const {
  return in.is_routed && shape_.route.refresh && dense_tokens(pass, run) == 0;
}

// A run's tokens in some pages are a unit: it alone reads and writes the choices of these pages.
void Program::plan_routes(Pass& pass) {
  int group = shape_.heads / shape_.kv_heads;
  int tokens = std::min(kUnitTokens, kMaxQueries / group / kPage * kPage);
  // an odd number of cache lines, so that rows do not share their places in the cache
  pass.score_stride = aligned(pass.last_position / kPage + 1, 16) | 16;
  pass.max_parts = std::max(pass.max_parts, (shape_.route.most() + kSegment - 1) / kSegment + shape_.route.has_means);
  for (int r = int(pass.runs.size()) - 1; r >= 0 && !pass.is_decode; --r) {
    const Run& run = pass.runs[r];
    int start = pass.step.positions[run.start], stop = start + run.count, first = start + dense_tokens(pass, run);
    for (int page = start / kPage; (page + 1) * kPage <= stop; ++page)
      pass.full_pages.push_back(pass.step.page_table[size_t(run.row) * pass.step.pages_per_row + page]);
    for (int unit = (stop - 1) / tokens * tokens; unit + tokens > first && first < stop; unit -= tokens)
      pass.routed_blocks.push_back({r, std::max(unit, first) - start, std::min(unit + tokens, stop) - start});
  }
  routes_.resize(pool_.size());
  if (!pass.is_decode) return;
  size_t bytes = pass.runs.size() * shape_.heads * pass.score_stride * sizeof(float);
  if (bytes > scores_.bytes()) scores_ = Memory(bytes + bytes / 2);
}

KvPages::Choice& Program::choice_at(Pass& pass, const Instruction& in, const Run& run, int kv_head,
                                    int position) const {
  int page = pass.step.page_table[size_t(run.row) * pass.step.pages_per_row + position / kPage];
  return pass.pages.choice(in.layer, page, kv_head);
}

// Whether the choice of the token's group was made in a step before.
bool Program::is_chosen(Pass& pass, const Instruction& in, const Run& run, int kv_head, int position) const {
  int refresh = shape_.route.refresh;
  return position % refresh && choice_at(pass, in, run, kv_head, position).group == position / refresh + 1;
}

// Puts the pages that a token chose into `chosen`, by the scores of its query heads.
int Program::choose(int position, float* scores, ptrdiff_t stride, float least_share, int32_t* chosen, int thread) {
  const Route& route = shape_.route;
  int pages = position / kPage + 1, budget = route.budget_at(position / kPage);
  if (budget < pages) return choose_among(pages, position, scores, stride, least_share, chosen, thread);
  std::iota(chosen, chosen + pages, 0);
  return pages;
}

// The same among `count` pages, of which the first ones and the recent ones are the token's.
int Program::choose_among(int count, int position, float* scores, ptrdiff_t stride, float least_share, int32_t* chosen,
                          int thread) {
  const Route& route = shape_.route;
  std::vector<float>& scratch = routes_[thread].scratch;
  scratch.resize(std::max(scratch.size(), size_t(2 * (count + 16))));
  return kernels_.choose_pages(scores, stride, shape_.heads / shape_.kv_heads, count, route.first_pages,
                               route.recent_pages, route.budget_at(position / kPage), least_share, chosen,
                               scratch.data());
}

// Those of `count` candidates in `chosen`, the best by their guessed scores, that a token chose in the end.
// `found` holds the scores of the older ones, the query heads of each side by side; those of its recent pages
// stand among the guesses.
int Program::choose_again(int count, int position, const float* guesses, ptrdiff_t stride, const float* found,
                          int32_t* chosen, int thread) {
  int group = shape_.heads / shape_.kv_heads, older = older_of(count), padded = int(aligned(count, 16));
  RouteMemory& m = routes_[thread];
  m.best.resize(std::max(m.best.size(), size_t(group) * padded));
  m.places.resize(std::max<size_t>(m.places.size(), count));
  for (int h = 0; h < group; ++h) {
    float* row = m.best.data() + h * padded;
    for (int i = 0; i < older; ++i) row[i] = found[i * group + h];
    for (int i = older; i < count; ++i) row[i] = guesses[h * stride + chosen[i]];
  }
  int left = choose_among(count, position, m.best.data(), padded, shape_.route.least_share, m.places.data(), thread);
  for (int i = 0; i < left; ++i) chosen[i] = chosen[m.places[i]];
  return left;
}

// Guessed scores of loaded queries with the full pages first ... last - 1 of a run.
void Program::guess_scores(Pass& pass, const Instruction& in, const Run& run, int kv_head, int count, int first,
                           int last, float* out, int thread) {
  if (first >= last) return;
  std::vector<uint8_t*>& summaries = routes_[thread].summaries;
  Attend a = attend_of(pass, in, run, kv_head);
  summaries.resize(last);
  for (int p = first; p < last; ++p) summaries[p] = pass.pages.summary(in.layer, a.table[p], kv_head);
  kernels_.summary_scores(a, summaries.data(), count, first, last, out, pass.score_stride, attend_scratch(thread));
}

void Program::keep_choice(KvPages::Choice& choice, int position, const int32_t* chosen, int count) const {
  choice.group = position / shape_.route.refresh + 1, choice.count = count;
  std::memcpy(choice.pages, chosen, count * sizeof(int32_t));
}

// Keeps what stands for a page that is full now.
void Program::keep_of_full(KvPages& pages, const Instruction& in, int page, int kv_head) const {
  if (!in.is_routed) return;
  const PageLayout& l = pages.layout;
  const uint8_t* from = pages.layer(in.layer) + size_t(page) * l.page_bytes;
  if (shape_.route.has_means) kernels_.page_means(l, from, kv_head, pages.mean(in.layer, page, kv_head));
  if (shape_.route.has_summaries) kernels_.page_summary(l, from, kv_head, pages.summary(in.layer, page, kv_head));
}

// Sets the bits of the pages before `own` that were not chosen, and returns their number.
int Program::find_unseen(const int32_t* chosen, int count, int own, uint64_t* bits) const {
  std::fill_n(bits, (own + 63) / 64, ~uint64_t(0));
  if (own % 64) bits[own / 64] >>= 64 - own % 64;
  int seen = 0;
  for (; seen < count && chosen[seen] < own; ++seen) bits[chosen[seen] / 64] &= ~(uint64_t(1) << chosen[seen] % 64);
  return own - seen;
}

// Pages of a run whose slots are the means of its first `count` pages, each slot for kPage tokens.
Attend Program::mean_pages_of(Pass& pass, const Instruction& in, const Run& run, int kv_head, int count,
                              RouteMemory& m) {
  static_assert(kPage == 64);
  const PageLayout& l = pass.pages.layout;
  int pages = (count + kPage - 1) / kPage;
  if (pages * l.page_bytes > m.mean_pages.bytes()) m.mean_pages = Memory(2 * pages * l.page_bytes);
  for (int p = int(m.mean_table.size()); p < pages; ++p) m.mean_table.push_back(p);
  Attend a = attend_of(pass, in, run, kv_head);
  m.means.clear();
  for (int p = 0; p < count; ++p) m.means.push_back(pass.pages.mean(in.layer, a.table[p], kv_head));
  for (int p = 0; p < count; p += kPage)
    kernels_.gather_means(l, m.means.data() + p, std::min(kPage, count - p),
                          m.mean_pages.data() + size_t(p / kPage) * l.page_bytes, kv_head);
  a.pages = m.mean_pages.data(), a.table = m.mean_table.data(), a.bias = std::log2(float(kPage));
  return a;
}

// The groups of tokens start ... stop - 1 of a run, with the pages that each of them chose.
void Program::choose_groups(Pass& pass, const Instruction& in, const Run& run, int kv_head, int start,
                            int stop, int thread) {
  int group = shape_.heads / shape_.kv_heads, refresh = shape_.route.refresh, most = shape_.route.most();
  RouteMemory& m = routes_[thread];
  auto position_of = [&](int token) { return pass.step.positions[run.start + token]; };
  m.groups.clear(), m.queries.clear();
  for (int t = start; t < stop; t = m.groups.back().stop)
    m.groups.push_back({t, std::min(stop, t + refresh - position_of(t) % refresh), 0, 0});
  m.chosen.resize(m.groups.size() * most);
  bool goes_on = is_chosen(pass, in, run, kv_head, position_of(start));  // every other group begins here
  if (goes_on) {
    const KvPages::Choice& choice = choice_at(pass, in, run, kv_head, position_of(start));
    m.groups[0].count = choice.count;
    std::memcpy(m.chosen.data(), choice.pages, choice.count * sizeof(int32_t));
  }
  for (size_t g = goes_on; g < m.groups.size(); ++g)
    for (int h = 0; h < group; ++h) {
      int token = m.groups[g].start;
      m.queries.push_back({query_of(in, run.start + token, kv_head * group + h), 0, position_of(token) + 1});
    }
  if (m.queries.empty()) return;
  m.scores.resize(std::max(m.scores.size(), m.queries.size() * pass.score_stride));
  kernels_.load_queries(pass.pages.layout, m.queries.data(), int(m.queries.size()), attend_scratch(thread));
  if (shape_.route.has_summaries) choose_by_summaries(pass, in, run, kv_head, goes_on, thread);
  else choose_by_keys(pass, in, run, kv_head, goes_on, thread);
  for (size_t g = goes_on; g < m.groups.size(); ++g) {
    int position = position_of(m.groups[g].start);
    keep_choice(choice_at(pass, in, run, kv_head, position), position, m.chosen.data() + g * most, m.groups[g].count);
  }
}

// The choices of the groups from number `first` on, by the scores of all keys before them.
void Program::choose_by_keys(Pass& pass, const Instruction& in, const Run& run, int kv_head, int first, int thread) {
  RouteMemory& m = routes_[thread];
  ptrdiff_t stride = pass.score_stride;
  int group = shape_.heads / shape_.kv_heads, pages = (m.queries.back().high + kPage - 1) / kPage;
  kernels_.page_scores(attend_of(pass, in, run, kv_head), m.queries.data(), int(m.queries.size()), 0, pages,
                       m.scores.data(), stride, attend_scratch(thread));
  float* scores = m.scores.data();
  for (size_t g = first; g < m.groups.size(); ++g, scores += group * stride)
    m.groups[g].count = choose(pass.step.positions[run.start + m.groups[g].start], scores, stride,
                               shape_.route.least_share, m.chosen.data() + g * shape_.route.most(), thread);
}

// The same, by the scores of those pages that are the best by their summaries, as many as may be seen.
void Program::choose_by_summaries(Pass& pass, const Instruction& in, const Run& run, int kv_head, int first, int thread) {
  RouteMemory& m = routes_[thread];
  const Route& route = shape_.route;
  ptrdiff_t stride = pass.score_stride;
  int group = shape_.heads / shape_.kv_heads, most = route.most(), count = int(m.queries.size());
  auto position_of = [&](size_t g) { return pass.step.positions[run.start + m.groups[g].start]; };
  auto row_of = [&](size_t g) { return m.scores.data() + (g - first) * group * stride; };
  int pages = position_of(m.groups.size() - 1) / kPage + 1;
  Attend a = attend_of(pass, in, run, kv_head);
  int recent = std::max(0, position_of(first) / kPage + 1 - route.recent_pages), width = pages - recent;
  kernels_.page_scores(a, m.queries.data(), count, recent, pages, m.scores.data(), stride, attend_scratch(thread));
  m.recent.resize(std::max(m.recent.size(), size_t(count) * width));
  for (int r = 0; r < count; ++r)
    std::memcpy(m.recent.data() + r * width, m.scores.data() + r * stride + recent, width * sizeof(float));
  guess_scores(pass, in, run, kv_head, count, 0, std::max(0, pages - route.recent_pages), m.scores.data(), thread);
  for (Group& each : m.groups) each.candidates = each.count, each.count = 0;
  for (size_t g = first; g < m.groups.size(); ++g) {
    int own = position_of(g) / kPage, start = std::max(0, own + 1 - route.recent_pages);
    for (int h = 0; h < group; ++h)
      std::memcpy(row_of(g) + h * stride + start, m.recent.data() + ((g - first) * group + h) * width + start - recent,
                  (own + 1 - start) * sizeof(float));
    m.groups[g].candidates = choose(position_of(g), row_of(g), stride, -INFINITY, m.chosen.data() + g * most, thread);
    m.groups[g].count = older_of(m.groups[g].candidates);
  }
  score_candidates(a, first, pages, thread);
  for (size_t g = 0; g < m.groups.size(); ++g) {
    Group& each = m.groups[g];
    each.count = each.candidates;
    if (int(g) >= first && each.count <= position_of(g) / kPage)
      each.count = choose_again(each.count, position_of(g), row_of(g), stride, m.found.data() + g * most * group,
                                m.chosen.data() + g * most, thread);
  }
}

// Scores of the older pages that groups chose, into `found`: [groups][most pages][query heads].
void Program::score_candidates(const Attend& a, int first, int pages, int thread) {
  RouteMemory& m = routes_[thread];
  int group = shape_.heads / shape_.kv_heads, most = shape_.route.most();
  sort_visitors(m, pages);
  for (int& g : m.visitors) g -= first;
  m.places.resize(std::max<size_t>(m.places.size(), pages));
  std::iota(m.places.begin(), m.places.end(), 0);
  m.best.resize(std::max(m.best.size(), m.visitors.size() * group));
  kernels_.visitor_scores(a, {m.places.data(), m.first_visitor.data(), m.visitors.data(), pages, group}, m.best.data(),
                          attend_scratch(thread));
  m.found.resize(std::max(m.found.size(), m.groups.size() * most * group));
  for (Group& each : m.groups) each.seen = 0;
  for (size_t v = 0; v < m.visitors.size(); ++v) {
    size_t g = m.visitors[v] + first, place = g * most + m.groups[g].seen++;
    std::copy_n(m.best.data() + v * group, group, m.found.data() + place * group);
  }
  for (Group& each : m.groups) each.seen = 0;
}

// Finds the groups that chose each page, page after page.
void Program::sort_visitors(RouteMemory& m, int pages) const {
  int most = shape_.route.most();
  auto each_choice = [&](auto f) {
    for (size_t g = 0; g < m.groups.size(); ++g)
      for (int i = 0; i < m.groups[g].count; ++i) f(int(g), m.chosen[g * most + i]);
  };
  m.first_visitor.assign(pages + 1, 0);
  each_choice([&](int, int page) { ++m.first_visitor[page + 1]; });
  for (int page = 0; page < pages; ++page) m.first_visitor[page + 1] += m.first_visitor[page];
  m.visitors.resize(m.first_visitor[pages]);
  each_choice([&](int g, int page) { m.visitors[m.first_visitor[page]++] = g; });
  for (int page = pages; page > 0; --page) m.first_visitor[page] = m.first_visitor[page - 1];
  m.first_visitor[0] = 0;
}

void Program::route_block(Pass& pass, const Instruction& in, const Run& run, int kv_head, int start,
                          int stop, int thread) {
  const PageLayout& l = pass.pages.layout;
  int group = shape_.heads / shape_.kv_heads, rows = (stop - start) * group;
  RouteMemory& m = routes_[thread];
  choose_groups(pass, in, run, kv_head, start, stop, thread);
  m.queries.clear(), m.shown.clear();
  for (int i = 0; i < rows; ++i) {
    int token = run.start + start + i / group, slot = pass.step.positions[token] % kPage;
    m.queries.push_back({query_of(in, token, kv_head * group + i % group), 0, slot + 1});
    m.shown.push_back(~uint64_t(0) >> (kPage - 1 - slot));
  }
  m.all.reset(rows, l.dim_padded), m.segment.reset(rows, l.dim_padded);
  void* scratch = attend_scratch(thread);
  kernels_.load_queries(l, m.queries.data(), rows, scratch);
  Attend a = attend_of(pass, in, run, kv_head);
  const int32_t* table = a.table;
  std::vector<uint64_t> whole(rows, ~uint64_t(0));
  auto is_open = [&](int row) {
    return !is_closed(in, run.start + start + row / group, kv_head * group + row % group);
  };
  auto visit = [&](const uint64_t* seen, std::vector<int32_t>& some) {
    if (!some.empty()) kernels_.add_page(a, seen, some.data(), int(some.size()), m.segment.view(), scratch);
    some.clear();
  };
  int last_page = pass.step.positions[run.start + stop - 1] / kPage;
  sort_visitors(m, last_page + 1);
  for (int page = 0; page <= last_page; ++page) {
    a.table = table + page;
    for (int v = m.first_visitor[page]; v < m.first_visitor[page + 1]; ++v) {
      Group& each = m.groups[m.visitors[v]];
      int row = (each.start - start) * group, count = (each.stop - each.start) * group;
      if (each.seen > 0 && each.seen % kSegment == 0) merge_segment(m, row, count);
      ++each.seen;
      bool is_own = pass.step.positions[run.start + each.start] / kPage == page;
      std::vector<int32_t>& some = is_own ? m.own_rows : m.rows;
      for (int i = row; i < row + count; ++i)
        if (is_open(i)) some.push_back(i);
    }
    visit(whole.data(), m.rows), visit(m.shown.data(), m.own_rows);
  }
  merge_segment(m, 0, rows);
  if (shape_.route.has_means) add_means(pass, in, run, kv_head, start, stop, thread);
  for (int i = 0; i < rows; ++i)
    write_out(in, run.start + start + i / group, kv_head * group + i % group,
              is_open(i) ? m.all.sums.data() + size_t(i) * l.dim_padded : nullptr, m.all.mass[i * kMassLanes]);
}

// Adds the means of the pages that the groups of a unit do not see to what they have.
void Program::add_means(Pass& pass, const Instruction& in, const Run& run, int kv_head, int start, int stop,
                        int thread) {
  int group = shape_.heads / shape_.kv_heads, rows = (stop - start) * group, most = shape_.route.most();
  RouteMemory& m = routes_[thread];
  int last = pass.step.positions[run.start + stop - 1] / kPage, words = (last + kPage - 1) / kPage, any = 0;
  m.unseen.assign(m.groups.size() * words, 0);
  for (size_t g = 0; g < m.groups.size(); ++g)
    any |= find_unseen(m.chosen.data() + g * most, m.groups[g].count,
                       pass.step.positions[run.start + m.groups[g].start] / kPage, m.unseen.data() + g * words);
  if (!any) return;
  Attend a = mean_pages_of(pass, in, run, kv_head, last, m);
  for (int i = 0; i < rows; ++i)
    if (!is_closed(in, run.start + start + i / group, kv_head * group + i % group)) m.rows.push_back(i);
  for (int word = 0; word < words && !m.rows.empty(); ++word, ++a.table) {
    for (size_t g = 0; g < m.groups.size(); ++g)
      std::fill_n(m.shown.begin() + (m.groups[g].start - start) * group, (m.groups[g].stop - m.groups[g].start) * group,
                  m.unseen[g * words + word]);
    kernels_.add_page(a, m.shown.data(), m.rows.data(), int(m.rows.size()), m.segment.view(), attend_scratch(thread));
  }
  merge_segment(m, 0, rows);
  m.rows.clear();
}

// Merges the segment of some rows into what they have, and begins another. The denominators of the
// whole stand in the first lane of its masses.
void Program::merge_segment(RouteMemory& m, int first, int count) const {
  int dim = int(aligned(shape_.head_dim, 16));
  std::vector<float>& totals = m.totals;
  totals.resize(2 * count);
  for (int i = 0; i < count; ++i) {
    const float* mass = m.segment.mass.data() + size_t(first + i) * kMassLanes;
    totals[i] = m.all.mass[size_t(first + i) * kMassLanes];
    totals[count + i] = std::accumulate(mass, mass + kMassLanes, 0.0f);
  }
  kernels_.merge(m.all.sums.data() + size_t(first) * dim, m.all.bound.data() + first, totals.data(),
                 m.segment.sums.data() + size_t(first) * dim, m.segment.bound.data() + first, totals.data() + count,
                 count, dim);
  for (int i = 0; i < count; ++i) m.all.mass[size_t(first + i) * kMassLanes] = totals[i];
  m.segment.clear(first, count, dim);
}

void Program::States::reset(int rows, int dim) {
  sums.assign(size_t(rows) * dim, 0.0f), bound.assign(rows, kNoBound), mass.assign(size_t(rows) * kMassLanes, 0.0f);
}

void Program::States::clear(int first, int count, int dim) {
  std::fill_n(sums.begin() + size_t(first) * dim, size_t(count) * dim, 0.0f);
  std::fill_n(bound.begin() + first, count, kNoBound);
  std::fill_n(mass.begin() + size_t(first) * kMassLanes, size_t(count) * kMassLanes, 0.0f);
}

// A token of each run: the parts of what they see, spans or chosen pages, are shared out, and merged at
// the end.
void Program::attend_tokens(Pass& pass, const Instruction& in, int index, int thread) {
  int runs = int(pass.runs.size());
  auto each = [&](int phase, int parts, auto work) {  // parts of each KV head of each run
    int units = runs * shape_.kv_heads * parts;
    for (int u; (u = counters_[kCounters * index + phase].fetch_add(1)) < units;)
      work(pass.runs[u / (shape_.kv_heads * parts)], u / parts % shape_.kv_heads, parts - 1 - u % parts);
  };
  bool any = std::any_of(pass.runs.begin(), pass.runs.end(), [&](const Run& r) { return is_routed(pass, in, r); });
  if (any) {
    each(0, pass.last_position / (kPage * kChunkPages) + 1, [&](const Run& run, int kv_head, int chunk) {
      if (is_routed(pass, in, run)) score_token(pass, in, run, kv_head, chunk, thread);
    });
    pool_.barrier().wait();
    each(1, 1, [&](const Run& run, int kv_head, int) {
      if (is_routed(pass, in, run)) choose_for_token(pass, in, run, kv_head, thread);
    });
    pool_.barrier().wait();
  }
  each(2, pass.max_parts, [&](const Run& run, int kv_head, int part) {
    attend_token(pass, in, run, kv_head, part, thread);
  });
  if (pass.max_parts == 1) return;
  pool_.barrier().wait();
  for (int u; (u = counters_[kCounters * index + 3].fetch_add(1)) < runs * shape_.heads;)
    merge_parts(pass, in, pass.runs[u / shape_.heads], u % shape_.heads);
}

// Queries of some heads of a token, with their angles.
void Program::rope_queries(Pass& pass, const Instruction& in, int token, const int* heads, int count, int low,
                           int high, const AttendMemory& m) const {
  int dim = shape_.head_dim;
  for (int i = 0; i < count; ++i) {
    float* vector = m.vectors + i * dim;
    std::memcpy(vector, query_of(in, token, heads[i]), dim * sizeof(float));
    rope_head(pass, token, vector, in.q_norm);
    m.queries[i] = {vector, low, high};
  }
}

float* Program::scores_of(const Pass& pass, const Run& run, int kv_head) const {
  size_t place = size_t(&run - pass.runs.data()) * shape_.kv_heads + kv_head;
  return (float*)scores_.data() + place * (shape_.heads / shape_.kv_heads) * pass.score_stride;
}

void Program::score_token(Pass& pass, const Instruction& in, const Run& run, int kv_head, int chunk,
                          int thread) {
  int position = pass.step.positions[run.start], group = shape_.heads / shape_.kv_heads;
  int first = chunk * kChunkPages, last = std::min(first + kChunkPages, position / kPage + 1);
  if (first >= last) return;
  if (last == position / kPage + 1) store_token(pass, in, run.start, kv_head);
  if (is_chosen(pass, in, run, kv_head, position)) return;
  AttendMemory m(thread_scratch(thread), pass.pages.layout.dim_padded, pass.pages.layout.dim);
  int heads[kQueryBlock];  // closed ones too: what they ask for is for the tokens behind as well
  std::iota(heads, heads + group, kv_head * group);
  rope_queries(pass, in, run.start, heads, group, 0, position + 1, m);
  kernels_.load_queries(pass.pages.layout, m.queries, group, m.scratch);
  float* scores = scores_of(pass, run, kv_head);
  if (shape_.route.has_summaries) {  // scores of the recent pages, guesses of those before
    int recent = std::max(0, position / kPage + 1 - shape_.route.recent_pages);
    guess_scores(pass, in, run, kv_head, group, first, std::min(last, recent), scores, thread);
    first = std::max(first, recent);
    if (first >= last) return;
  }
  kernels_.page_scores(attend_of(pass, in, run, kv_head), m.queries, group, first, last, scores, pass.score_stride,
                       m.scratch);
}

void Program::choose_for_token(Pass& pass, const Instruction& in, const Run& run, int kv_head, int thread) {
  int position = pass.step.positions[run.start];
  if (is_chosen(pass, in, run, kv_head, position)) return;
  std::vector<int32_t>& chosen = routes_[thread].chosen;
  chosen.resize(std::max<size_t>(chosen.size(), shape_.route.most()));
  float* scores = scores_of(pass, run, kv_head);
  int count = shape_.route.has_summaries
                  ? choose_scored(pass, in, run, kv_head, scores, chosen.data(), thread)
                  : choose(position, scores, pass.score_stride, shape_.route.least_share, chosen.data(), thread);
  keep_choice(choice_at(pass, in, run, kv_head, position), position, chosen.data(), count);
}

// As choose_by_summaries, of a token alone, whose guesses are there.
int Program::choose_scored(Pass& pass, const Instruction& in, const Run& run, int kv_head, float* guesses,
                           int32_t* chosen, int thread) {
  int position = pass.step.positions[run.start], group = shape_.heads / shape_.kv_heads;
  int count = choose(position, guesses, pass.score_stride, -INFINITY, chosen, thread), older = older_of(count);
  if (count > position / kPage) return count;
  AttendMemory m(thread_scratch(thread), pass.pages.layout.dim_padded, pass.pages.layout.dim);
  std::vector<int> heads(group);
  std::iota(heads.begin(), heads.end(), kv_head * group);
  rope_queries(pass, in, run.start, heads.data(), group, 0, position + 1, m);
  kernels_.load_queries(pass.pages.layout, m.queries, group, m.scratch);
  RouteMemory& r = routes_[thread];
  r.visitors.assign(older, 0), r.first_visitor.resize(older + 1);
  std::iota(r.first_visitor.begin(), r.first_visitor.end(), 0);
  r.found.resize(std::max<size_t>(r.found.size(), older * group));
  kernels_.visitor_scores(attend_of(pass, in, run, kv_head),
                          {chosen, r.first_visitor.data(), r.visitors.data(), older, group}, r.found.data(), m.scratch);
  return choose_again(count, position, guesses, pass.score_stride, r.found.data(), chosen, thread);
}

// The parts that a token sees of its row, first ... last - 1.
std::pair<int, int> Program::parts_of(Pass& pass, const Instruction& in, const Run& run, int kv_head) const {
  int position = pass.step.positions[run.start];
  if (is_routed(pass, in, run)) {
    int count = choice_at(pass, in, run, kv_head, position).count;
    return {0, (count + kSegment - 1) / kSegment + (shape_.route.has_means && count <= position / kPage)};
  }
  int low = in.window > 0 ? std::max(0, position + 1 - in.window) : 0;
  return {low / kSpan, position / kSpan + 1};
}

void Program::attend_token(Pass& pass, const Instruction& in, const Run& run, int kv_head, int part,
                           int thread) {
  const PageLayout& l = pass.pages.layout;
  int token = run.start, position = pass.step.positions[token];
  int group = shape_.heads / shape_.kv_heads;
  auto [first_part, last_part] = parts_of(pass, in, run, kv_head);
  if (part < first_part || part >= last_part) return;
  Attend a = attend_of(pass, in, run, kv_head);
  int high = position + 1, low = in.window > 0 ? std::max(0, high - in.window) : 0;
  int start = part * kSpan, stop = std::min(high, start + kSpan);
  if (is_routed(pass, in, run)) return add_segment(pass, in, run, kv_head, part, thread);
  if (part + 1 == last_part)
    store_token(pass, in, token, kv_head);  // the unit of the newest slots: no other reads them
  AttendMemory m(thread_scratch(thread), l.dim_padded, l.dim);
  for (int first = 0; first < group; first += kQueryBlock) {
    int most = std::min(kQueryBlock, group - first), heads[kQueryBlock];
    int count = open_heads(in, token, kv_head * group + first, most, heads);
    if (pass.max_parts == 1 && count < most)
      for (int h = 0; h < most; ++h) write_out(in, token, kv_head * group + first + h, nullptr, 0);
    if (!count) continue;
    rope_queries(pass, in, token, heads, count, low, high, m);
    kernels_.load_queries(l, m.queries, count, m.scratch);
    kernels_.attend_span(a, m.queries, count, std::max(low, start), stop, m.sums, m.most, m.total, m.scratch);
    for (int i = 0; i < count; ++i) {
      const float* sums = m.sums + size_t(i) * l.dim_padded;
      if (pass.max_parts == 1) {
        write_out(in, token, heads[i], sums, m.total[i]);
        continue;
      }
      float* state = state_of(pass, run, heads[i]) + size_t(part) * (l.dim_padded + 2);
      std::memcpy(state, sums, l.dim_padded * sizeof(float));
      state[l.dim_padded] = m.most[i], state[l.dim_padded + 1] = m.total[i];
    }
  }
}

// A segment of the pages that a token chose, or the means of the others.
void Program::add_segment(Pass& pass, const Instruction& in, const Run& run, int kv_head, int segment,
                          int thread) {
  const PageLayout& l = pass.pages.layout;
  int position = pass.step.positions[run.start], group = shape_.heads / shape_.kv_heads, heads[kQueryBlock];
  int open = open_heads(in, run.start, kv_head * group, group, heads);
  if (!open) return;
  const KvPages::Choice& choice = choice_at(pass, in, run, kv_head, position);
  AttendMemory m(thread_scratch(thread), l.dim_padded, l.dim);
  States& states = routes_[thread].segment;
  states.reset(open, l.dim_padded);
  rope_queries(pass, in, run.start, heads, open, 0, kPage, m);
  kernels_.load_queries(l, m.queries, open, m.scratch);
  Attend a = attend_of(pass, in, run, kv_head);
  const int32_t* table = a.table;
  std::vector<int32_t>& rows = routes_[thread].rows;
  rows.resize(open);
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<uint64_t>& shown = routes_[thread].shown;
  for (int i = segment * kSegment; i < std::min(choice.count, (segment + 1) * kSegment); ++i) {
    if (i + 1 < choice.count) {  // a page comes from memory while the one before it is attended
      const uint8_t* next = a.pages + size_t(table[choice.pages[i + 1]]) * l.page_bytes + kv_head * l.head_bytes;
      for (size_t byte = 0; byte < l.head_bytes; byte += 64) __builtin_prefetch(next + byte);
    }
    a.table = table + choice.pages[i];
    shown.assign(open, ~uint64_t(0) >> (i + 1 == choice.count ? kPage - 1 - position % kPage : 0));
    kernels_.add_page(a, shown.data(), rows.data(), open, states.view(), m.scratch);
  }
  if (segment * kSegment >= choice.count) {  // the means of the pages that were not chosen
    int own = position / kPage;
    std::vector<uint64_t>& unseen = routes_[thread].unseen;
    unseen.resize(own / kPage + 1);
    find_unseen(choice.pages, choice.count, own, unseen.data());
    a = mean_pages_of(pass, in, run, kv_head, own, routes_[thread]);
    for (int word = 0; word * kPage < own; ++word, ++a.table) {
      shown.assign(open, unseen[word]);
      kernels_.add_page(a, shown.data(), rows.data(), open, states.view(), m.scratch);
    }
  }
  for (int i = 0; i < open; ++i) {
    float* state = state_of(pass, run, heads[i]) + size_t(segment) * (l.dim_padded + 2);
    const float* mass = states.mass.data() + size_t(i) * kMassLanes;
    std::memcpy(state, states.sums.data() + size_t(i) * l.dim_padded, l.dim_padded * sizeof(float));
    state[l.dim_padded] = states.bound[i];
    state[l.dim_padded + 1] = std::accumulate(mass, mass + kMassLanes, 0.0f);
  }
  rows.clear();
}

float* Program::state_of(const Pass& pass, const Run& run, int head) const {
  size_t place = size_t(&run - pass.runs.data()) * shape_.heads + head;
  return (float*)partials_.data() + place * pass.max_parts * (pass.pages.layout.dim_padded + 2);
}

void Program::merge_parts(Pass& pass, const Instruction& in, const Run& run, int head) {
  if (is_closed(in, run.start, head)) return write_out(in, run.start, head, nullptr, 0);
  int dim = pass.pages.layout.dim_padded;
  auto [first, last] = parts_of(pass, in, run, head / (shape_.heads / shape_.kv_heads));
  float* states = state_of(pass, run, head);
  float* state = states + size_t(first) * (dim + 2);
  for (int part = first + 1; part < last; ++part) {
    const float* next = states + size_t(part) * (dim + 2);
    kernels_.merge(state, state + dim, state + dim + 1, next, next + dim, next + dim + 1, 1, dim);
  }
  write_out(in, run.start, head, state, state[dim + 1]);
}

}  // namespace deepseek
