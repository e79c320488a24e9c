#include "tiled_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <stdexcept>

namespace deepseek {

namespace {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kBlind = 1e30f;
// Units are dealt to so many sums of a page's gradients, which are added up in order: whoever computes them, the
// bits are the same.
constexpr int kLanes = 4;
constexpr int kMostTokens = 256, kLeastTokens = 64, kMostRows = 1024;

int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Bits first ... last - 1.
void set_bits(uint32_t* words, int first, int last) {
  for (int at = first; at < last;) {
    int end = std::min(last, (at / 32 + 1) * 32), count = end - at;
    words[at / 32] |= (count == 32 ? ~0u : (1u << count) - 1) << (at % 32);
    at = end;
  }
}

// Everything that is the same for a whole call.
struct Plan {
  const TiledCall& call;
  const Kernels& kernels;
  TiledPass pass;
  bool is_backward;
  Kind kind;
  int dim, value_dim, width, repeats, blocks, pages, unit_tokens, element;
  int query_blocks = 0;  // of the longest row

  Plan(const TiledCall& c, const Kernels& k, TiledPass which)
      : call(c), kernels(k), pass(which), is_backward(which == TiledPass::backward) {
    kind = c.source == Kind::bf16 && k.has_tiles ? Kind::bf16 : Kind::f32;
    element = kind == Kind::bf16 ? 2 : 4;
    dim = round_up(c.dim, kTiledPad), value_dim = round_up(c.value_dim, kTiledPad);
    width = round_up(c.block, kTiledPad), repeats = c.heads / c.kv_heads;
    blocks = ((c.mean_from < 0 ? c.slots : c.mean_from) + c.block - 1) / c.block;
    pages = (c.slots + c.block - 1) / c.block;
    unit_tokens = kMostTokens;
    while (unit_tokens > kLeastTokens && c.queries < 2 * kLanes * unit_tokens) unit_tokens /= 2;
    while (unit_tokens > 16 && unit_tokens * repeats > kMostRows) unit_tokens /= 2;
    unit_tokens = round_up(unit_tokens, c.query_size);
    for (int row = 0; row < c.rows; ++row) {
      int start = c.query_start[row], last = start + c.queries - 1;
      query_blocks = std::max(query_blocks, last / c.query_size - start / c.query_size + 1);
    }
  }

  size_t page_bytes(int channels) const { return size_t(width) * channels * element; }
  int most_rows() const { return round_up(unit_tokens * repeats, kTiledPad) + kTiledPad; }
  // Units of a row's queries begin at multiples of `unit_tokens` slots.
  int units(int row) const {
    int start = call.query_start[row];
    return (start + call.queries - 1) / unit_tokens - start / unit_tokens + 1;
  }
  int lanes(int row) const { return std::min(kLanes, units(row)); }
};

// The pages of one KV head of one row, and the gradients of each lane.
struct HeadPages {
  Memory keys_across, values_along, values_across, keys_along;
  Memory bias, place;  // [pages][width]
  std::vector<Memory> to_keys, to_values;

  explicit HeadPages(const Plan& p) {
    keys_across = Memory(p.pages * p.page_bytes(p.dim));
    if (p.is_backward) {
      values_across = Memory(p.pages * p.page_bytes(p.value_dim));
      keys_along = Memory(p.pages * p.page_bytes(p.dim));
      for (int i = 0; i < kLanes; ++i) {
        to_keys.emplace_back(size_t(p.pages) * p.width * p.dim * 4);
        to_values.emplace_back(size_t(p.pages) * p.width * p.value_dim * 4);
      }
    } else if (p.pass == TiledPass::forward) {
      values_along = Memory(p.pages * p.page_bytes(p.value_dim));
    }
    if (p.call.bias.data) bias = Memory(size_t(p.pages) * p.width * 4);
    if (p.call.slopes) place = Memory(size_t(p.pages) * p.width * 4);
  }
};

// What one thread works in.
struct Workplace {
  Memory scratch, queries, queries_across, gradients, gradients_across, sums, to_queries;
  std::vector<float> top, mass, lse, delta, slopes, own;
  std::vector<const void*> sources;
  std::vector<void*> targets;
  std::vector<int32_t> rows, starts, entries, listed;
  std::vector<uint32_t> shown;
  std::vector<uint64_t> unseen;

  explicit Workplace(const Plan& p) {
    size_t rows_at_most = p.most_rows(), bytes = rows_at_most * p.element;
    scratch = Memory(p.kernels.tiled_scratch_bytes(p.dim, p.value_dim, p.width));
    queries = Memory(bytes * p.dim);
    if (p.is_backward) {
      queries_across = Memory(bytes * p.dim);
      gradients = Memory(bytes * p.value_dim), gradients_across = Memory(bytes * p.value_dim);
      to_queries = Memory(rows_at_most * p.dim * 4);
    } else {
      sums = Memory(rows_at_most * p.value_dim * 4);
    }
    for (auto* each : {&top, &mass, &lse, &delta, &slopes, &own}) each->resize(rows_at_most);
    sources.resize(rows_at_most), rows.resize(rows_at_most);
    targets.resize(std::max<size_t>(rows_at_most, p.width));
    shown.resize(rows_at_most * (p.width / 32));
  }
};

// The queries of a unit: tokens first ... last - 1 of a row, and for each of them the heads of a KV head.
class Unit {
 public:
  Unit(const Plan& plan, const TiledResult& result, HeadPages& pages, Workplace& place, int row, int kv_head, int index)
      : p_(plan), c_(plan.call), r_(result), pages_(pages), w_(place), row_(row), kv_head_(kv_head), lane_(index % kLanes) {
    start_ = c_.query_start[row];
    int from = (start_ / plan.unit_tokens + index) * plan.unit_tokens;
    first_ = std::max(0, from - start_), last_ = std::min(c_.queries, from + plan.unit_tokens - start_);
    count_ = (last_ - first_) * plan.repeats;
    length_ = c_.key_length[row];
  }

  void run() {
    load();
    list_pages();
    for (int page = 0; page < p_.blocks; ++page) meet(page);
    if (c_.mean_from >= 0) {
      find_unseen();
      for (int page = p_.blocks; page < p_.pages; ++page) meet_means(page);
    }
    if (p_.is_backward) store_gradients();
    else if (p_.pass == TiledPass::forward) store_outputs();
  }

 private:
  int head_of(int i) const { return kv_head_ * p_.repeats + i % p_.repeats; }
  int slot_of(int i) const { return start_ + first_ + i / p_.repeats; }
  size_t place_of(int i) const {
    return (size_t(row_) * c_.heads + head_of(i)) * c_.queries + first_ + i / p_.repeats;
  }

  void load() {
    size_t bytes = c_.source == Kind::bf16 ? 2 : 4;
    int filled = round_up(count_, kTiledPad) + kTiledPad;
    unit_ = {};
    unit_.kind = p_.kind, unit_.pitch = filled;
    auto take = [&](const void* from, int dim, int padded, Memory& to, Memory& across) {
      for (int i = 0; i < count_; ++i) w_.sources[i] = (const uint8_t*)from + place_of(i) * dim * bytes;
      p_.kernels.tiled_load(p_.kind, c_.source, w_.sources.data(), count_, dim, padded, filled, to.data(),
                            p_.is_backward ? across.data() : nullptr);
    };
    take(c_.query, c_.dim, p_.dim, w_.queries, w_.queries_across);
    unit_.queries = w_.queries.data();
    if (p_.is_backward) {
      take(r_.gradient, c_.value_dim, p_.value_dim, w_.gradients, w_.gradients_across);
      unit_.queries_across = w_.queries_across.data();
      unit_.gradients = w_.gradients.data(), unit_.gradients_across = w_.gradients_across.data();
      unit_.lse = w_.lse.data(), unit_.delta = w_.delta.data(), unit_.to_queries = (float*)w_.to_queries.data();
      std::memset(unit_.to_queries, 0, size_t(count_) * p_.dim * 4);
      for (int i = 0; i < count_; ++i) {
        size_t at = place_of(i), from = at * c_.value_dim * bytes;
        w_.lse[i] = std::isinf(r_.lse[at]) ? kBlind : r_.lse[at] * kLog2E;
        w_.delta[i] = p_.kernels.tiled_dot(c_.source, (const uint8_t*)r_.out + from, (const uint8_t*)r_.gradient + from,
                                           c_.value_dim) - (r_.lse_gradient ? r_.lse_gradient[at] : 0.0f);
      }
    } else {
      unit_.top = w_.top.data(), unit_.mass = w_.mass.data(), unit_.sums = (float*)w_.sums.data();
      std::fill_n(unit_.top, count_, -1e20f), std::fill_n(unit_.mass, count_, 0.0f);
      std::memset(unit_.sums, 0, size_t(count_) * p_.value_dim * 4);
    }
    if (c_.slopes)
      for (int i = 0; i < count_; ++i) w_.slopes[i] = c_.slopes[head_of(i)] * kLog2E, w_.own[i] = float(slot_of(i));
  }

  // Query blocks of the unit, counted from the row's first.
  int first_block() const { return (start_ + first_) / c_.query_size - start_ / c_.query_size; }
  int last_block() const { return (start_ + last_ - 1) / c_.query_size - start_ / c_.query_size; }
  const int32_t* list_of(int block) const {
    return c_.indices.data + row_ * c_.indices.row + kv_head_ * c_.indices.head + ptrdiff_t(block) * c_.width;
  }
  int length_of(int block) const { return c_.counts.data[row_ * c_.counts.row + kv_head_ * c_.counts.head + block]; }

  // For each page the query blocks that list it, ascending, and where in their lists.
  void list_pages() {
    if (!c_.indices.data) return;
    w_.starts.assign(p_.blocks + 1, 0);
    for (int block = first_block(); block <= last_block(); ++block)
      for (int at = 0; at < length_of(block); ++at) ++w_.starts[list_of(block)[at] + 1];
    for (int page = 0; page < p_.blocks; ++page) w_.starts[page + 1] += w_.starts[page];
    w_.entries.resize(2 * size_t(w_.starts[p_.blocks]));
    w_.listed.assign(w_.starts.begin(), w_.starts.end() - 1);
    for (int block = first_block(); block <= last_block(); ++block)
      for (int at = 0; at < length_of(block); ++at) {
        size_t to = 2 * size_t(w_.listed[list_of(block)[at]]++);
        w_.entries[to] = block, w_.entries[to + 1] = at;
      }
  }

  void meet(int page) {
    found_ = 0, sees_all_ = true;
    if (!c_.indices.data) {
      add_rows(page, 0, count_, -1, -1);
    } else {
      for (int i = w_.starts[page]; i < w_.starts[page + 1]; ++i) {
        int block = w_.entries[2 * size_t(i)], from = (start_ / c_.query_size + block) * c_.query_size - start_;
        int first = std::max(from, first_) - first_, last = std::min(from + c_.query_size, last_) - first_;
        add_rows(page, first * p_.repeats, last * p_.repeats, block, w_.entries[2 * size_t(i) + 1]);
      }
    }
    run_page(page);
  }

  // Adds those of the rows first ... last - 1 that see some of a page that their block lists.
  void add_rows(int page, int first, int last, int block, int entry) {
    int from = page * c_.block, words = p_.width / 32;
    bool is_near = !c_.is_causal || slot_of(first) >= from + c_.block - 1;
    if (is_near && length_ >= from + c_.block && p_.width == c_.block && !c_.skip.data && !c_.reach.data) {
      for (int i = first; i < last; ++i) w_.rows[found_] = i, set_all(found_++, words);
      return;
    }
    for (int i = first; i < last; ++i) {
      if (c_.skip.data && skips(i, block, entry)) continue;
      int slot = slot_of(i);
      int end = std::min(c_.block, (c_.is_causal ? std::min(length_, slot + 1) : length_) - from), low = 0;
      if (c_.reach.data) {
        int64_t reach = c_.reach.data[row_ * c_.reach.row + head_of(i) * c_.reach.head + std::max(block, 0) * c_.reach.block];
        low = int(std::clamp<int64_t>(int64_t(slot) - reach + 1 - from, 0, c_.block));
      }
      int always = c_.reach.data ? std::clamp(c_.first - from, 0, std::max(end, 0)) : 0;
      if (end <= 0 || (low >= end && !always)) continue;
      uint32_t* bits = w_.shown.data() + size_t(found_) * words;
      std::fill_n(bits, words, 0u);
      set_bits(bits, low, end), set_bits(bits, 0, always);
      sees_all_ = sees_all_ && end == p_.width && (low == 0 || always >= low);
      w_.rows[found_++] = i;
    }
  }

  bool skips(int i, int block, int entry) const {
    return c_.skip.data[row_ * c_.skip.row + head_of(i) * c_.skip.head + ptrdiff_t(block) * c_.width + entry];
  }
  void set_all(int at, int words) { std::fill_n(w_.shown.data() + size_t(at) * words, words, ~0u); }

  int bit_words() const { return (p_.blocks + 63) / 64; }
  int heads_apart() const { return c_.skip.data ? p_.repeats : 1; }

  // For each query block (and head, where they skip) the blocks before its own that it does not see, as bits.
  void find_unseen() {
    int words = bit_words(), apart = heads_apart();
    w_.unseen.assign(size_t(last_block() - first_block() + 1) * apart * words, 0);
    for (int block = first_block(); block <= last_block(); ++block)
      for (int head = 0; head < apart; ++head) {
        uint64_t* bits = w_.unseen.data() + size_t((block - first_block()) * apart + head) * words;
        // a row shorter than the longest has queries behind its last block, which nobody reads
        int own = std::min((start_ / c_.query_size + block) * c_.query_size / c_.block, p_.blocks);
        for (int i = 0; i < own; ++i) bits[i / 64] |= uint64_t(1) << (i % 64);
        for (int at = 0; at < length_of(block); ++at) {
          int page = list_of(block)[at];
          if (!c_.skip.data || !skips(head, block, at)) bits[page / 64] &= ~(uint64_t(1) << (page % 64));
        }
      }
  }

  void meet_means(int page) {
    found_ = 0, sees_all_ = false;
    int from = (page - p_.blocks) * c_.block, words = p_.width / 32, apart = heads_apart();
    for (int i = 0; i < count_; ++i) {
      // means are for those that see a slot
      if (p_.is_backward ? w_.lse[i] == kBlind : w_.mass[i] == 0) continue;
      int block = slot_of(i) / c_.query_size - start_ / c_.query_size - first_block();
      const uint64_t* unseen = w_.unseen.data() + size_t(block * apart + (apart > 1 ? i % apart : 0)) * bit_words();
      uint32_t* bits = w_.shown.data() + size_t(found_) * words;
      uint32_t any = 0;
      for (int word = 0; word < words; ++word) {
        int at = from + 32 * word, count = std::min(32, c_.block - 32 * word);
        bits[word] = count > 0 && at < p_.blocks ? uint32_t(unseen[at / 64] >> (at % 64)) : 0;
        if (count > 0 && count < 32) bits[word] &= (1u << count) - 1;
        any |= bits[word];
      }
      if (any) w_.rows[found_++] = i;
    }
    run_page(page);
  }

  void run_page(int page) {
    if (!found_) return;
    size_t at = size_t(page) * p_.width;
    TiledPage t;
    t.dim = p_.dim, t.value_dim = p_.value_dim, t.width = p_.width;
    t.scale = c_.scale * (p_.pass == TiledPass::peaks ? 1.0f : kLog2E), t.slope_scale = c_.scale;
    t.keys_across = pages_.keys_across.data() + page * p_.page_bytes(p_.dim);
    if (c_.bias.data) t.bias = (const float*)pages_.bias.data() + at;
    if (c_.slopes) t.place = (const float*)pages_.place.data() + at, t.slopes = w_.slopes.data(), t.own = w_.own.data();
    t.count = found_, t.rows = w_.rows.data(), t.is_run = w_.rows[found_ - 1] - w_.rows[0] == found_ - 1;
    t.shown = sees_all_ ? nullptr : w_.shown.data();
    if (p_.is_backward) {
      t.values_across = pages_.values_across.data() + page * p_.page_bytes(p_.value_dim);
      t.keys_along = pages_.keys_along.data() + page * p_.page_bytes(p_.dim);
      t.to_keys = (float*)pages_.to_keys[lane_].data() + at * p_.dim;
      t.to_values = (float*)pages_.to_values[lane_].data() + at * p_.value_dim;
      p_.kernels.tiled_backward(t, unit_, w_.scratch.data());
    } else if (p_.pass == TiledPass::peaks) {
      p_.kernels.tiled_peaks(t, unit_, w_.scratch.data());
      for (int i = 0; i < found_; ++i)
        ((float*)r_.out)[place_of(w_.rows[i]) * p_.blocks + page] = w_.top[w_.rows[i]];
    } else {
      t.values_along = pages_.values_along.data() + page * p_.page_bytes(p_.value_dim);
      p_.kernels.tiled_forward(t, unit_, w_.scratch.data());
    }
  }

  void store_outputs() {
    for (int i = 0; i < count_; ++i) {
      float mass = w_.mass[i];
      r_.lse[place_of(i)] = mass > 0 ? w_.top[i] * kLn2 + std::log(mass) : -INFINITY;
      w_.mass[i] = mass > 0 ? 1 / mass : 0.0f;
    }
    store_rows(unit_.sums, p_.value_dim, w_.mass.data(), c_.value_dim, r_.out);
  }

  void store_gradients() { store_rows(unit_.to_queries, p_.dim, nullptr, c_.dim, r_.to_queries); }

  void store_rows(const float* from, int padded, const float* factors, int dim, void* to) {
    size_t bytes = c_.source == Kind::bf16 ? 2 : 4;
    for (int i = 0; i < count_; ++i) w_.targets[i] = (uint8_t*)to + place_of(i) * dim * bytes;
    p_.kernels.tiled_store(c_.source, from, padded, factors, count_, dim, w_.targets.data());
  }

  const Plan& p_;
  const TiledCall& c_;
  const TiledResult& r_;
  HeadPages& pages_;
  Workplace& w_;
  TiledUnit unit_;
  int row_, kv_head_, lane_;
  int start_, first_, last_, count_, length_;
  int found_ = 0;
  bool sees_all_ = true;
};

// The threads that work on a KV head together, and which of them this is.
struct Team {
  int size = 1, member = 0;
};

// Packs this member's pages of a KV head, and empties its lanes.
void pack_pages(const Plan& p, HeadPages& pages, Workplace& w, int row, int kv_head, Team team) {
  const TiledCall& c = p.call;
  size_t bytes = c.source == Kind::bf16 ? 2 : 4, head = size_t(row) * c.kv_heads + kv_head;
  for (int page = team.member; page < p.pages; page += team.size) {
    int first = page * c.block, count = std::min(c.block, c.slots - first);
    auto pack = [&](const void* from, int dim, int padded, Memory* across, Memory* along) {
      p.kernels.tiled_pack(p.kind, c.source, (const uint8_t*)from + (head * c.slots + first) * dim * bytes, count, dim,
                           padded, p.width, across ? across->data() + page * p.page_bytes(padded) : nullptr,
                           along ? along->data() + page * p.page_bytes(padded) : nullptr, w.scratch.data());
    };
    pack(c.key, c.dim, p.dim, &pages.keys_across, p.is_backward ? &pages.keys_along : nullptr);
    if (p.pass != TiledPass::peaks)
      pack(c.value, c.value_dim, p.value_dim, p.is_backward ? &pages.values_across : nullptr,
         p.is_backward ? nullptr : &pages.values_along);
    for (int i = 0; i < count; ++i) {
      size_t at = size_t(page) * p.width + i;
      if (c.bias.data) ((float*)pages.bias.data())[at] = c.bias.data[row * c.bias.row + first + i] * kLog2E;
      if (c.slopes) ((float*)pages.place.data())[at] = c.place[first + i];
    }
  }
  if (!p.is_backward) return;
  for (int lane = team.member; lane < p.lanes(row); lane += team.size) {
    std::memset(pages.to_keys[lane].data(), 0, size_t(p.pages) * p.width * p.dim * 4);
    std::memset(pages.to_values[lane].data(), 0, size_t(p.pages) * p.width * p.value_dim * 4);
  }
}

// Writes the sums of all lanes' gradients of this member's pages.
void store_page_gradients(const Plan& p, HeadPages& pages, Workplace& w, const TiledResult& r, int row, int kv_head,
                          Team team) {
  const TiledCall& c = p.call;
  size_t head = size_t(row) * c.kv_heads + kv_head, bytes = c.source == Kind::bf16 ? 2 : 4;
  int lanes = p.lanes(row);
  const float* parts[kLanes];
  for (int page = team.member; page < p.pages; page += team.size) {
    int first = page * c.block, count = std::min(c.block, c.slots - first);
    auto store = [&](const std::vector<Memory>& of, int dim, int padded, void* to) {
      for (int i = 0; i < lanes; ++i) parts[i] = (const float*)of[i].data() + size_t(page) * padded * p.width;
      float* rows = (float*)w.scratch.data();
      p.kernels.tiled_sum(parts, lanes, padded, p.width, rows);
      for (int i = 0; i < count; ++i) w.targets[i] = (uint8_t*)to + (head * c.slots + first + i) * dim * bytes;
      p.kernels.tiled_store(c.source, rows, padded, nullptr, count, dim, w.targets.data());
    };
    store(pages.to_keys, c.dim, p.dim, r.to_keys), store(pages.to_values, c.value_dim, p.value_dim, r.to_values);
  }
}

// Throws where a list is longer than its room, or names a block that is not there, or one twice: threads would write
// where they have no place.
void check_lists(const Plan& p) {
  const TiledCall& c = p.call;
  if (!c.indices.data) return;
  std::vector<int64_t> named(p.blocks, -1);
  int64_t list = 0;
  for (int row = 0; row < (c.counts.row || c.indices.row ? c.rows : 1); ++row)
    for (int head = 0; head < (c.counts.head || c.indices.head ? c.kv_heads : 1); ++head)
      for (int block = 0; block < p.query_blocks; ++block, ++list) {
        int count = c.counts.data[row * c.counts.row + head * c.counts.head + block];
        if (count < 0 || count > c.width) throw std::invalid_argument("a list is longer than its room");
        const int32_t* blocks = c.indices.data + row * c.indices.row + head * c.indices.head + ptrdiff_t(block) * c.width;
        for (int at = 0; at < count; ++at) {
          if (blocks[at] < 0 || blocks[at] >= p.blocks) throw std::invalid_argument("a list names a block that is not there");
          if (named[blocks[at]] == list) throw std::invalid_argument("a list names a block twice");
          named[blocks[at]] = list;
        }
      }
}

// How many threads share a KV head: as few as leave none idle for long.
int team_size(int threads, int heads) {
  for (int size = 1; size <= std::min(threads, kLanes); ++size) {
    int teams = threads / size;
    if (threads % size == 0 && (heads % teams == 0 || heads >= 4 * teams)) return size;
  }
  return std::min(threads, kLanes);
}

}  // namespace

TiledAttention::TiledAttention(const Kernels& kernels, int threads) : kernels_(kernels), pool_(threads) {}

void TiledAttention::run(TiledPass pass, const TiledCall& call, const TiledResult& result) {
  std::lock_guard<std::mutex> lock(one_at_a_time_);
  int threads = pool_.size(), heads = call.rows * call.kv_heads, size = team_size(threads, heads), teams = threads / size;
  Plan plan(call, kernels_, pass);
  check_lists(plan);
  std::vector<Workplace> places;
  std::vector<HeadPages> pages;
  std::deque<Barrier> barriers;
  for (int i = 0; i < threads; ++i) places.emplace_back(plan);
  for (int i = 0; i < teams; ++i) pages.emplace_back(plan), barriers.emplace_back(size);
  pool_.run([&](int thread) {
    int which = thread / size;
    if (which >= teams) return;
    Team team{size, thread % size};
    HeadPages& mine = pages[which];
    Workplace& place = places[thread];
    for (int at = which; at < heads; at += teams) {
      int row = at / call.kv_heads, head = at % call.kv_heads;
      pack_pages(plan, mine, place, row, head, team);
      barriers[which].wait();
      for (int lane = team.member; lane < kLanes; lane += size)
        for (int unit = lane; unit < plan.units(row); unit += kLanes)
          Unit(plan, result, mine, place, row, head, unit).run();
      barriers[which].wait();
      if (pass != TiledPass::backward) continue;
      store_page_gradients(plan, mine, place, result, row, head, team);
      barriers[which].wait();  // nobody packs the next pages while somebody still adds these up
    }
  });
}

}  // namespace deepseek
