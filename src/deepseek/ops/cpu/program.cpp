#include "pass.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

namespace deepseek {

namespace {

constexpr int kFewestRows = 32;  // that a product is divided into: those of a block of tiles

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kArenaBytes = 0;     // every weight on its own, so that a read past it is seen
#else
constexpr size_t kArenaBytes = size_t(64) << 20;
#endif

}  // namespace

KvPages::KvPages(Kind kind, const Shape& shape, int pages)
    : num_pages(pages), layers_(shape.layers), most_chosen_(shape.route.most()), has_means_(shape.route.has_means),
      has_summaries_(shape.route.has_summaries) {
  layout.kind = kind;
  layout.kv_heads = shape.kv_heads;
  layout.dim = shape.head_dim;
  layout.dim_padded = int(aligned(shape.head_dim, 16));
  // int8 keys are mixed before they are rounded: each holds something of all channels
  layout.scored_from = kind != Kind::int8 && turns_in_order(shape.head_dim) ? shape.head_dim / 2 : 0;
  size_t element = kind == Kind::f32 ? 4 : kind == Kind::bf16 ? 2 : 1;
  layout.value_offset = element * layout.dim_padded * kPage;
  layout.key_scale_offset = 2 * layout.value_offset;
  layout.value_scale_offset = layout.key_scale_offset + kPage * sizeof(float);
  layout.head_bytes = kind == Kind::int8 ? layout.value_scale_offset + kPage * sizeof(float)
                                         : layout.key_scale_offset;
  layout.page_bytes = layout.head_bytes * layout.kv_heads;
  memory_ = Memory(layout.page_bytes * num_pages * layers_);
  if (!most_chosen_) return;
  choice_bytes_ = (2 + most_chosen_) * sizeof(int32_t);
  choices_ = Memory(choice_bytes_ * layout.kv_heads * num_pages * layers_);
  layout.mean_bytes = aligned(2 * element * layout.dim_padded + 2 * sizeof(float), 64);
  if (has_means_) means_ = Memory(layout.mean_bytes * layout.kv_heads * num_pages * layers_);
  layout.summary_bytes = aligned((element * (layout.dim_padded - layout.scored_from) + 2 * sizeof(float)) * kSummary, 64);
  if (has_summaries_) summaries_ = Memory(layout.summary_bytes * layout.kv_heads * num_pages * layers_);
}

void KvPages::copy(int target, int source) {
  for (int i = 0; i < layers_; ++i)
    std::memcpy(layer(i) + target * layout.page_bytes, layer(i) + source * layout.page_bytes,
                layout.page_bytes);
  for (int i = 0; i < layers_ && most_chosen_; ++i)
    std::memcpy(&choice(i, target, 0), &choice(i, source, 0), choice_bytes_ * layout.kv_heads);
  for (int i = 0; i < layers_ && has_means_; ++i)
    std::memcpy(mean(i, target, 0), mean(i, source, 0), layout.mean_bytes * layout.kv_heads);
  for (int i = 0; i < layers_ && has_summaries_; ++i)
    std::memcpy(summary(i, target, 0), summary(i, source, 0), layout.summary_bytes * layout.kv_heads);
}

double KvPages::mean_chosen() {
  double sum = 0, count = 0;
  for (int i = 0; i < layers_ && most_chosen_; ++i)
    for (int p = 0; p < num_pages; ++p)
      for (int h = 0; h < layout.kv_heads; ++h) {
        const Choice& each = choice(i, p, h);
        if (each.group > 0) sum += each.count, ++count;
      }
  return count ? sum / count : 0;
}

Program::Program(const Kernels& kernels, Shape shape, std::vector<Buffer> buffers,
                 std::vector<Instruction> instructions, int max_tokens, int threads)
    : kernels_(kernels), shape_(std::move(shape)), buffers_(std::move(buffers)),
      instructions_(std::move(instructions)), max_tokens_(max_tokens), pool_(threads) {
  seconds.assign(instructions_.size() + 1, 0.0);
}

uint8_t* Program::allocate(size_t bytes) {
  bytes = aligned(bytes, 256);
  if (arenas_.empty() || arena_used_ + bytes > arenas_.back().bytes()) {
    arenas_.emplace_back(std::max(bytes, kArenaBytes));
    arena_used_ = 0;
  }
  uint8_t* data = arenas_.back().data() + arena_used_;
  arena_used_ += bytes;
  return data;
}

Weight Program::new_weight(Kind kind, int group, bool rotated, int n, int k, const float* bias) {
  Weight w;
  w.kind = kind, w.n = n, w.k = k, w.rotated = rotated;
  if (group == 0) {
    if (kind != Kind::int8 || k > kMaxRow)
      throw std::invalid_argument("a scale for a whole row is of int8 and at most 65536 channels");
    group = int(aligned(k, kRotation));
  }
  w.group = kind == Kind::int8 ? std::max(rotated ? kRotation : 1, group) : kind == Kind::int4 ? group : kind == Kind::bf16 ? 2 : 1;
  w.k_padded = int(aligned(k, rotated ? std::max(kRotation, w.group) : w.group));
  w.column_bytes = kind == Kind::f32    ? size_t(w.k_padded) * 4
                   : kind == Kind::bf16 ? size_t(w.k_padded) * 2
                   : kind == Kind::int8 ? w.k_padded + aligned(w.groups(), 2) * 2
                                        : size_t(w.groups()) * (w.group / 2 + 4);
  if (bias) {
    float* copy = (float*)allocate(w.columns() * sizeof(float));
    std::memcpy(copy, bias, n * sizeof(float));
    w.bias = copy;
  }
  return w;
}

int Program::add_weight(Kind kind, int group, bool rotated, int n, int k, const void* source,
                        Kind source_kind, ptrdiff_t stride, const float* bias) {
  int index = add_room(kind, group, rotated, 0, n, k, bias);
  Weight& w = weights_[index];
  std::vector<std::vector<float>> scratch(pool_.size(), std::vector<float>(size_t(w.k_padded) * 16));
  std::atomic<int> next{0};
  pool_.run([&](int thread) {
    for (int p; (p = next.fetch_add(1)) < w.panels();)
      kernels_.pack_panel(w, source, source_kind, stride, p, scratch[thread].data());
  });
  return index;
}

namespace {

// The columns of a panel, in the layout of types.h; what is padded is zero, and meets inputs that are.
void pack_codes(const Weight& w, const uint8_t* codes, const uint16_t* scale, const uint16_t* least, int panel) {
  int width = w.width(panel), groups = w.groups();
  uint8_t* data = w.panel(panel);
  std::memset(data, 0, width * w.column_bytes);
  for (int column = 0; column < width && panel * kPanel + column < w.n; ++column) {
    size_t row = size_t(panel) * kPanel + column;
    const uint8_t* from = codes + row * w.k;
    if (w.kind == Kind::int8) {
      for (int i = 0; i < w.k; ++i) data[(size_t(i / 4) * width + column) * 4 + i % 4] = from[i];
      uint16_t* halves = (uint16_t*)(data + size_t(width) * w.k_padded) + column;
      for (int g = 0; g < groups; ++g) halves[size_t(g) * width] = scale[row * groups + g];
      continue;
    }
    for (int g = 0; g < groups; ++g) {
      uint8_t* block = data + size_t(g) * width * (w.group / 2 + 4);
      for (int i = 0; i < w.group && g * w.group + i < w.k; ++i)
        block[(size_t(i / 8) * width + column) * 4 + i % 4] |= from[g * w.group + i] << (i % 8 < 4 ? 0 : 4);
      uint16_t* halves = (uint16_t*)(block + size_t(width) * w.group / 2) + column;
      halves[0] = scale[row * groups + g], halves[width] = least[row * groups + g];
    }
  }
}

}  // namespace

int Program::add_codes(Kind kind, int group, bool rotated, float input_scale, int n, int k, const uint8_t* codes,
                       const uint16_t* scale, const uint16_t* least, const float* bias) {
  int index = add_room(kind, group, rotated, input_scale, n, k, bias);
  const Weight& w = weights_[index];
  std::atomic<int> next{0};
  pool_.run([&](int) {
    for (int p; (p = next.fetch_add(1)) < w.panels();) pack_codes(w, codes, scale, least, p);
  });
  return index;
}

int Program::add_room(Kind kind, int group, bool rotated, float input_scale, int n, int k, const float* bias) {
  Weight w = new_weight(kind, group, rotated, n, k, bias);
  w.input_scale = input_scale;
  w.data = allocate(w.bytes());
  weights_.push_back(w);
  return int(weights_.size()) - 1;
}

int Program::add_vector(const float* values, int count) {
  float* copy = (float*)allocate((count + 16) * sizeof(float));
  std::memcpy(copy, values, count * sizeof(float));
  vectors_.push_back(copy), vector_counts_.push_back(count);
  return int(vectors_.size()) - 1;
}

size_t Program::weight_bytes() const {
  size_t total = 0;
  for (const Weight& w : weights_) total += size_t(w.n) * w.column_bytes;
  return total;
}

void Program::start() {
  size_t floats = 0;
  for (const Buffer& b : buffers_) floats = std::max(floats, b.offset + size_t(b.width));
  states_ = Memory(floats * max_tokens_ * sizeof(float));
  int widest = 0;
  for (const Weight& w : weights_) {
    input_row_bytes_ = std::max(input_row_bytes_, kernels_.row_bytes(w));
    max_groups_ = std::max(max_groups_, w.kind == Kind::f32 || w.kind == Kind::bf16 ? 0 : w.groups());
    widest = std::max(widest, w.k_padded);
  }
  int active = 1;
  size_t expert_floats = 0;
  for (const Instruction& in : instructions_)
    if (in.op == Op::experts) {
      const Weight& down = weights_[in.weights[2]];
      active = std::max(active, in.num_active);
      expert_floats = std::max(expert_floats, size_t(in.num_active) * (down.k + down.n));
    }
  input_rows_ = max_tokens_ * active;
  expert_states_ = Memory(expert_floats * max_tokens_ * sizeof(float));
  for (auto* each : {&routing_.expert, &routing_.place, &routing_.slot_at}) each->resize(input_rows_);
  routing_.share.resize(input_rows_);
  // the inputs of all rows, then those that each thread prepares for itself
  inputs_bytes_ = aligned(input_rows_ * (input_row_bytes_ + size_t(max_groups_) * 8));
  size_t own = aligned(kFewTokens * (input_row_bytes_ + size_t(max_groups_) * 8));
  size_t state = aligned(size_t(kQueryBlock) * (kernels_.attend_scratch_bytes ? 2 : 1) *
                         (aligned(shape_.head_dim, 16) + 2) * sizeof(float));
  thread_offset_ = inputs_bytes_;
  thread_bytes_ = own + aligned((widest + 64) * sizeof(float)) +
                  aligned(2 * kSwigluRows * kPanel * sizeof(float)) + state +
                  aligned(kQueryBlock * (sizeof(Query) + shape_.head_dim * sizeof(float))) +
                  aligned(kernels_.attend_scratch_bytes) + 4096;
  scratch_ = Memory(thread_offset_ + pool_.size() * thread_bytes_);
  cosines_.resize(size_t(max_tokens_) * shape_.head_dim / 2);
  sines_.resize(cosines_.size());
  counters_ = std::make_unique<std::atomic<int>[]>(instructions_.size() * kCounters);
}

void Program::check(const Step& s, const KvPages& pages) const {
  auto refuse = [](const char* what) { throw std::invalid_argument(what); };
  if (s.count < 1 || s.count > max_tokens_) refuse("tokens of a step out of range");
  for (int i = 0; i < s.count; ++i) {
    if (s.tokens[i] < 0 || s.tokens[i] >= shape_.vocab) refuse("token outside the vocabulary");
    if (s.positions[i] < 0 || s.positions[i] >= s.pages_per_row * kPage)
      refuse("position outside the pages of its row");
    if (s.rows[i] < 0) refuse("row outside the page table");
    bool follows = i > 0 && s.rows[i] == s.rows[i - 1];
    if (follows && s.positions[i] != s.positions[i - 1] + 1)
      refuse("tokens of a row must follow one another");
    const int32_t* table = s.page_table + size_t(s.rows[i]) * s.pages_per_row;
    bool is_last = i + 1 == s.count || s.rows[i + 1] != s.rows[i];
    if (is_last)
      for (int p = 0; p <= s.positions[i] / kPage; ++p)
        if (table[p] < 0 || table[p] >= pages.num_pages) refuse("page outside the pool");
  }
  if (pages.most_chosen() < shape_.route.most() || pages.has_means() < shape_.route.has_means ||
      pages.has_summaries() < shape_.route.has_summaries)
    refuse("pages made for a program that is not routed");
  check_tables(s);
  if (!shape_.is_causal)
    for (int i = 0; i < s.count; ++i)
      if ((i == 0 || s.rows[i] != s.rows[i - 1]) && s.positions[i] != 0) refuse("a row must be whole");
  if (s.num_selected > max_tokens_) refuse("more tokens selected than a step takes");
  for (int i = 0; i < s.num_selected; ++i)
    if (s.selected[i] < 0 || s.selected[i] >= s.count) refuse("selected token out of range");
}

void Program::run(const Step& step, KvPages& pages) {
  check(step, pages);
  Pass pass{step, pages};
  if (step.adapters) plan_adapters(pass);
  for (int i = 0; i < step.count;) {
    int stop = i + 1;
    while (stop < step.count && step.rows[stop] == step.rows[i]) ++stop;
    pass.runs.push_back({i, stop - i, step.rows[i]});
    pass.is_decode = pass.is_decode && stop - i == 1 && shape_.is_causal;
    pass.last_position = std::max(pass.last_position, int(step.positions[stop - 1]));
    i = stop;
  }
  pass.max_parts = pass.last_position / kSpan + 1;
  if (!pass.is_decode) plan_blocks(pass);
  if (shape_.route.refresh) plan_routes(pass);
  if (pass.is_decode) {
    size_t units = pass.runs.size() * shape_.heads * pass.max_parts;
    size_t bytes = units * (aligned(shape_.head_dim, 16) + 2) * sizeof(float);
    if (bytes > partials_.bytes()) partials_ = Memory(bytes + bytes / 2);
  }
  for (size_t i = 0; i < instructions_.size() * kCounters; ++i) counters_[i].store(0, std::memory_order_relaxed);
  pool_.run([&](int thread) { work(pass, thread); });
}

void Program::turn_back(KvPages& pages, const int32_t* numbers, int count, int positions) {
  auto refuse = [](const char* what) { throw std::invalid_argument(what); };
  if (shape_.inverse_frequencies.empty()) refuse("heads that are not rotated cannot be turned back");
  if (positions < 0) refuse("pages are turned back by no less than 0 positions");
  for (int i = 0; i < count; ++i)
    if (numbers[i] < 0 || numbers[i] >= pages.num_pages) refuse("page outside the pool");
  int half = shape_.head_dim / 2;
  std::vector<float> cosines(half), sines(half);
  for (int i = 0; i < half; ++i) {
    double angle = double(positions) * shape_.inverse_frequencies[i];
    cosines[i] = float(std::cos(angle)), sines[i] = float(std::sin(angle));
  }
  const PageLayout& l = pages.layout;
  std::vector<const Instruction*> layers;
  for (const Instruction& in : instructions_)
    if (in.op == Op::attend) layers.push_back(&in);
  pool_.run([&](int thread) {
    auto [start, stop] = share(int(layers.size()) * count, pool_.size(), thread);
    for (int u = start; u < stop; ++u) {
      const Instruction& in = *layers[u / count];
      int page = numbers[u % count];
      for (int h = 0; h < l.kv_heads; ++h) {
        kernels_.turn_back(l, pages.layer(in.layer) + size_t(page) * l.page_bytes, h, cosines.data(), sines.data());
        keep_of_full(pages, in, page, h);
      }
    }
  });
}

void Program::plan_blocks(Pass& pass) const {
  int group = shape_.heads / shape_.kv_heads;
  auto plan = [&](auto& blocks, auto tokens_of) {
    for (int r = 0; r < int(pass.runs.size()); ++r)
      for (int q = tokens_of(pass.runs[r]) * group; q > 0; q -= kQueryBlock)
        blocks.push_back({r, std::max(0, q - kQueryBlock), q});
    // the longest first, so that no thread waits at the end
    std::stable_sort(blocks.begin(), blocks.end(), [&](const auto& a, const auto& b) {
      auto last = [&](const auto& block) {
        const Run& run = pass.runs[block[0]];
        return pass.step.positions[run.start + (block[2] - 1) / group];
      };
      return last(a) > last(b);
    });
  };
  plan(pass.blocks, [](const Run& run) { return run.count; });
  if (shape_.route.refresh) plan(pass.dense_blocks, [&](const Run& run) { return dense_tokens(pass, run); });
}

void Program::work(Pass& pass, int thread) {
  using Clock = std::chrono::steady_clock;
  auto before = Clock::now();
  auto note = [&](size_t place) {
    if (!is_timed || thread != 0) return;
    auto now = Clock::now();
    seconds[place] += std::chrono::duration<double>(now - before).count();
    before = now;
  };
  prepare_step(pass, thread);
  note(instructions_.size());
  for (int i = 0; i < int(instructions_.size()); ++i) {
    const Instruction& in = instructions_[i];
    if (in.is_head && pass.step.is_states) return put_states(pass, in, thread);
    switch (in.op) {
      case Op::embed: embed(pass, in, thread); break;
      case Op::copy: copy(pass, in, thread); break;
      case Op::linear:
      case Op::swiglu: linear(pass, in, i, thread); break;
      case Op::attend: attend(pass, in, i, thread); break;
      case Op::experts: experts(pass, in, i, thread); break;
      case Op::layer_norm: layer_norm(pass, in, thread); break;
    }
    pool_.barrier().wait();
    note(i);
  }
}

void Program::prepare_step(Pass& pass, int thread) {
  int half = shape_.inverse_frequencies.empty() ? 0 : shape_.head_dim / 2;
  auto [start, stop] = share(pass.step.count, pool_.size(), thread);
  for (int t = start; t < stop; ++t)
    for (int i = 0; i < half; ++i) {
      float angle = float(pass.step.positions[t]) * shape_.inverse_frequencies[i];
      cosines_[size_t(t) * half + i] = std::cos(angle) * shape_.rope_factor;
      sines_[size_t(t) * half + i] = std::sin(angle) * shape_.rope_factor;
    }
}

void Program::embed_row(const Weight& w, int row, float* out) const {
  int panel = row / kPanel, column = row % kPanel, width = w.width(panel);
  const uint8_t* data = w.panel(panel);
  auto half = [](uint16_t h) {
    uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;  // exact, for denormal halves too: the exponents' offsets differ by 112
    return h & 0x8000 ? -value : value;
  };
  for (int i = 0; i < w.k_padded; ++i) {
    float value = 0;
    switch (w.kind) {
      case Kind::f32: value = ((const float*)data)[size_t(i) * width + column]; break;
      case Kind::bf16: {
        uint32_t bits = uint32_t(((const uint16_t*)data)[(size_t(i / 2) * width + column) * 2 + i % 2]) << 16;
        std::memcpy(&value, &bits, 4);
        break;
      }
      case Kind::int8: {
        const uint16_t* scales = (const uint16_t*)(data + size_t(width) * w.k_padded);
        int level = data[(size_t(i / 4) * width + column) * 4 + i % 4];
        value = float(level - 128) * half(scales[size_t(i / w.group) * width + column]);
        break;
      }
      case Kind::int4: {
        const uint8_t* block = data + size_t(i / w.group) * width * (w.group / 2 + 4);
        int inside = i % w.group;
        uint8_t both = block[(size_t(inside / 8) * width + column) * 4 + inside % 4];
        const uint16_t* halves = (const uint16_t*)(block + size_t(width) * w.group / 2);
        int level = inside % 8 < 4 ? both & 15 : both >> 4;
        value = float(level) * half(halves[column]) + half(halves[width + column]);
        break;
      }
    }
    out[i] = value;
  }
  if (!w.rotated) return;
  for (int start = 0; start < w.k_padded; start += kRotation) {
    float* v = out + start;
    for (int step = 1; step < kRotation; step *= 2)
      for (int i = 0; i < kRotation; i += 2 * step)
        for (int j = i; j < i + step; ++j) {
          float a = v[j], b = v[j + step];
          v[j] = a + b, v[j + step] = a - b;
        }
    for (int i = 0; i < kRotation; ++i) v[i] *= 1.0f / std::sqrt(float(kRotation));
  }
}

void Program::embed(Pass& pass, const Instruction& in, int thread) {
  const Weight& w = weights_[in.weights[0]];
  auto [start, stop] = share(pass.step.count, pool_.size(), thread);
  std::vector<float> padded(w.k_padded);
  for (int t = start; t < stop; ++t) {
    embed_row(w, pass.step.tokens[t], padded.data());
    std::memcpy(buffer(in.out) + size_t(t) * w.k, padded.data(), w.k * sizeof(float));
    add_tables(pass, in, t);
  }
}

int Program::rows_of(const Pass& pass, const Instruction& in) const {
  return in.rows == RowSet::all ? pass.step.count : pass.step.num_selected;
}

// The row of the input of a row of an instruction.
int Program::source_of(const Pass& pass, const Instruction& in, int row) const {
  return in.rows == RowSet::pick ? pass.step.selected[row] : row;
}

void Program::copy(Pass& pass, const Instruction& in, int thread) {
  auto [start, stop] = share(rows_of(pass, in), pool_.size(), thread);
  float* out = in.out < 0 ? pass.step.logits : buffer(in.out);
  int width = buffers_[in.in].width;
  for (int r = start; r < stop; ++r) {
    int source = source_of(pass, in, r);
    std::memcpy(out + size_t(r) * width, buffer(in.in) + size_t(source) * width, width * sizeof(float));
  }
}

// Slot 0 is shared; slot 1 + i belongs to thread i.
Inputs Program::inputs_for(const Weight& w, int slot) const {
  Inputs x;
  int rows = slot == 0 ? input_rows_ : kFewTokens;
  x.data = slot == 0 ? scratch_.data() : thread_scratch(slot - 1);
  x.row_bytes = kernels_.row_bytes(w);
  x.groups = w.kind == Kind::f32 || w.kind == Kind::bf16 ? 0 : w.groups();
  x.scale = (float*)(x.data + rows * input_row_bytes_);
  x.term = x.scale + size_t(rows) * max_groups_;
  return x;
}

// The thread's memory for one row and the tiles of a product.
float* Program::product_scratch(int thread) const {
  size_t inputs = aligned(kFewTokens * (input_row_bytes_ + size_t(max_groups_) * 8));
  return (float*)(thread_scratch(thread) + inputs);
}

// silu(gate) * up of the rows start ... stop - 1, in the columns of one panel, with what the adapters of the
// step add to both; `out` is row `start`.
void Program::adapted_swiglu(const Pass& pass, const Instruction& in, const Inputs& x, int start, int stop, int panel,
                             float* tiles, float* out, ptrdiff_t stride) const {
  const Weight &gate = weights_[in.weights[0]], &up = weights_[in.weights[1]];
  int width = gate.width(panel), columns = std::min(gate.n - panel * kPanel, width);
  float* ups = tiles + kSwigluRows * kPanel;
  for (int r = start; r < stop; r += kSwigluRows) {
    int end = std::min(stop, r + kSwigluRows);
    kernels_.linear(gate, x, r, end, panel, tiles, kPanel, Store::set);
    kernels_.linear(up, x, r, end, panel, ups, kPanel, Store::set);
    project_up(pass, in, 0, panel, r, end, tiles, kPanel);
    project_up(pass, in, 1, panel, r, end, ups, kPanel);
    for (int i = r; i < end; ++i) {
      float* values = tiles + (i - r) * kPanel;
      kernels_.silu_mul(values, ups + (i - r) * kPanel, values, width);
      std::memcpy(out + (i - start) * stride, values, columns * sizeof(float));
    }
  }
}

void Program::linear(Pass& pass, const Instruction& in, int index, int thread) {
  const Weight& w = weights_[in.weights[0]];
  int rows = rows_of(pass, in);
  if (rows == 0) return;
  bool is_alone = rows <= kFewTokens, has_adapters = is_adapted(pass, in);
  Inputs x = inputs_for(w, is_alone ? 1 + thread : 0);
  float* scratch = product_scratch(thread);
  float* tiles = scratch + aligned(w.k_padded + 64, 16);
  const float* norm = in.norm < 0 ? nullptr : vectors_[in.norm];
  int in_width = buffers_[in.in].width;
  auto prepare = [&](int first, int last) {
    for (int r = first; r < last; ++r) {
      int source = source_of(pass, in, r);
      kernels_.prepare(w, buffer(in.in) + size_t(source) * in_width, norm, shape_.norm_eps, x, r, scratch);
    }
  };
  if (is_alone) prepare(0, rows);
  else share_rows(rows, counters_[kCounters * index + 1], thread, prepare);
  if (has_adapters) prepare_adapted(pass, in, thread);
  if (!is_alone) pool_.barrier().wait();
  if (has_adapters) {
    project_down(pass, in, thread);
    pool_.barrier().wait();
  }
  float* out = in.out < 0 ? pass.step.logits : buffer(in.out);
  ptrdiff_t stride = in.out < 0 ? shape_.outputs : buffers_[in.out].width;
  Store store = in.adds ? Store::add : Store::set;
  // the panels of all weights of the instruction, side by side in the output
  int panels = 0;
  for (int index : in.weights) panels += in.op == Op::swiglu ? 0 : weights_[index].panels();
  if (in.op == Op::swiglu) panels = w.panels();
  auto unit = [&](int p, int first, int last) {
    float* target = out + first * stride;
    int rows = last - first;
    if (in.op == Op::linear) {
      for (int place = 0; place < int(in.weights.size()); ++place) {
        const Weight& part = weights_[in.weights[place]];
        if (p < part.panels()) {
          kernels_.linear(part, x, first, last, p, target + p * kPanel, stride, store);
          if (has_adapters) project_up(pass, in, place, p, first, last, target + p * kPanel, stride);
          finish_panel(in, first, last, p * kPanel, std::min(part.n - p * kPanel, kPanel), target + p * kPanel, stride);
          return;
        }
        p -= part.panels(), target += part.n;
      }
      return;
    }
    target += p * kPanel;
    if (has_adapters) adapted_swiglu(pass, in, x, first, last, p, tiles, target, stride);
    else kernels_.swiglu(w, weights_[in.weights[1]], x, first, last, p, tiles, target, stride);
  };
  if (rows < 16) {
    auto [start, stop] = share(panels, pool_.size(), thread);
    for (int p = start; p < stop; ++p) unit(p, 0, rows);
    return;
  }
  // the last panels in halves of the rows, so that no thread waits long for another
  int middle = rows / 2 / kFewestRows * kFewestRows, split = middle ? std::min(panels, pool_.size()) : 0;
  for (int u; (u = counters_[kCounters * index].fetch_add(1)) < panels + split;) {
    int late = u - (panels - split);
    if (late < 0) unit(u, 0, rows);
    else unit(panels - split + late / 2, late % 2 ? middle : 0, late % 2 ? rows : middle);
  }
}

// Calls f(first, last) for all rows in shares: many go to whoever is free, since somebody else may be using a core.
template <typename F>
void Program::share_rows(int rows, std::atomic<int>& counter, int thread, F f) const {
  constexpr int kShare = 16;
  if (rows < 4 * kShare * pool_.size()) {
    auto [first, last] = share(rows, pool_.size(), thread);
    return f(first, last);
  }
  for (int start; (start = counter.fetch_add(kShare)) < rows;) f(start, std::min(rows, start + kShare));
}

// What a product becomes while it is still near: `columns` from `first` on of each row, at `out`.
void Program::finish_panel(const Instruction& in, int start, int stop, int first, int columns, float* out,
                           ptrdiff_t stride) {
  if (in.closes_below >= 0) become_gates(in, start, stop, first, first + columns);
  if (in.activation == Activation::none) return;
  for (int r = start; r < stop; ++r) kernels_.activate(in.activation, out + (r - start) * stride, columns);
}

// Makes gates of the columns first ... last - 1 of what was computed.
void Program::become_gates(const Instruction& in, int start, int stop, int first, int last) {
  int closed = 0, width = buffers_[in.out].width;
  for (int r = start; r < stop; ++r)
    for (int i = first; i < last; ++i) {
      float& gate = buffer(in.out)[size_t(r) * width + i];
      gate = 2.0f / (1.0f + std::exp(-gate));
      if (gate < in.closes_below) gate = 0.0f, ++closed;
    }
  gates_ += int64_t(stop - start) * (last - first), closed_ += closed;
}

float Program::gate_of(const Instruction& in, int token, int head) const {
  return in.gates < 0 ? 1.0f : buffer(in.gates)[size_t(token) * buffers_[in.gates].width + head];
}

// Those of `count` heads from `first` on that are computed, and their number.
int Program::open_heads(const Instruction& in, int token, int first, int count, int* heads) const {
  int open = 0;
  for (int head = first; head < first + count; ++head)
    if (!is_closed(in, token, head)) heads[open++] = head;
  return open;
}

void Program::rope_head(const Pass&, int token, float* head, int norm) const {
  if (shape_.inverse_frequencies.empty()) return;
  size_t angles = size_t(token) * (shape_.head_dim / 2);
  kernels_.rope(head, shape_.head_dim, &cosines_[angles], &sines_[angles],
                norm < 0 ? nullptr : vectors_[norm], shape_.norm_eps);
}

void Program::store_token(Pass& pass, const Instruction& in, int token, int kv_head) {
  int dim = shape_.head_dim, position = pass.step.positions[token];
  float* qkv = buffer(in.in) + size_t(token) * buffers_[in.in].width;
  float* key = qkv + (shape_.heads + kv_head) * dim;
  const float* value = qkv + (shape_.heads + shape_.kv_heads + kv_head) * dim;
  rope_head(pass, token, key, in.k_norm);
  int page = pass.step.page_table[size_t(pass.step.rows[token]) * pass.step.pages_per_row + position / kPage];
  uint8_t* place = pass.pages.layer(in.layer) + size_t(page) * pass.pages.layout.page_bytes;
  kernels_.store_kv(pass.pages.layout, place, kv_head, position % kPage, key, value);
  if (shape_.route.refresh && position % kPage == 0)
    pass.pages.choice(in.layer, page, kv_head).group = 0;  // what a former owner of the page chose
  if (pass.is_decode && position % kPage == kPage - 1) keep_of_full(pass.pages, in, page, kv_head);
}

void Program::attend(Pass& pass, const Instruction& in, int index, int thread) {
  if (pass.is_decode) return attend_tokens(pass, in, index, thread);
  auto [start, stop] = share(pass.step.count, pool_.size(), thread);
  for (int t = start; t < stop; ++t) {
    float* qkv = buffer(in.in) + size_t(t) * buffers_[in.in].width;
    for (int h = 0; h < shape_.heads; ++h) rope_head(pass, t, qkv + h * shape_.head_dim, in.q_norm);
    for (int h = 0; h < shape_.kv_heads; ++h) store_token(pass, in, t, h);
  }
  pool_.barrier().wait();
  bool has_route = in.is_routed && shape_.route.refresh;
  if (has_route && keeps_of_full()) {
    int full = int(pass.full_pages.size()) * shape_.kv_heads;
    for (int u; (u = counters_[kCounters * index + 1].fetch_add(1)) < full;)
      keep_of_full(pass.pages, in, pass.full_pages[u / shape_.kv_heads], u % shape_.kv_heads);
    pool_.barrier().wait();
  }
  const auto& dense = has_route ? pass.dense_blocks : pass.blocks;
  int routed = has_route ? int(pass.routed_blocks.size()) * shape_.kv_heads : 0;
  int units = routed + int(dense.size()) * shape_.kv_heads;
  for (int u; (u = counters_[kCounters * index].fetch_add(1)) < units;) {
    auto [run, first, last] = u < routed ? pass.routed_blocks[u / shape_.kv_heads]
                                         : dense[(u - routed) / shape_.kv_heads];
    int kv_head = (u < routed ? u : u - routed) % shape_.kv_heads;
    if (u < routed) route_block(pass, in, pass.runs[run], kv_head, first, last, thread);
    else attend_block(pass, in, pass.runs[run], kv_head, first, last, thread);
  }
}

void* Program::attend_scratch(int thread) const {
  return AttendMemory(thread_scratch(thread), int(aligned(shape_.head_dim, 16)), shape_.head_dim).scratch;
}

Attend Program::attend_of(const Pass& pass, const Instruction& in, const Run& run, int kv_head) const {
  const int32_t* table = pass.step.page_table + size_t(run.row) * pass.step.pages_per_row;
  return {&pass.pages.layout, pass.pages.layer(in.layer), table, kv_head, shape_.score_scale};
}

// Attention of the loaded queries over the slots low ... high - 1, span after span.
void Program::attend_pages(const Attend& a, int count, int low, int high, const AttendMemory& m) const {
  bool is_first = true;
  for (int span = low / kSpan; span * kSpan < high; ++span) {
    int from = std::max(low, span * kSpan), to = std::min(high, (span + 1) * kSpan);
    kernels_.attend_span(a, m.queries, count, from, to, is_first ? m.sums : m.next,
                         is_first ? m.most : m.most_next, is_first ? m.total : m.total_next, m.scratch);
    if (!is_first)
      kernels_.merge(m.sums, m.most, m.total, m.next, m.most_next, m.total_next, count, a.layout->dim_padded);
    is_first = false;
  }
}

void Program::attend_block(Pass& pass, const Instruction& in, const Run& run, int kv_head,
                           int start, int stop, int thread) {
  const PageLayout& l = pass.pages.layout;
  AttendMemory m(thread_scratch(thread), l.dim_padded, l.dim);
  int group = shape_.heads / shape_.kv_heads, count = 0;
  int low = 1 << 30, high = 0;
  std::pair<int, int> places[kQueryBlock];  // token and head of each query
  for (int i = start; i < stop; ++i) {
    int token = run.start + i / group, head = kv_head * group + i % group, position = pass.step.positions[token];
    if (is_closed(in, token, head)) {
      write_out(in, token, head, nullptr, 0);
      continue;
    }
    int first = in.window > 0 ? std::max(0, position + 1 - in.window) : 0;
    places[count] = {token, head};
    int behind = shape_.is_causal ? position + 1 : run.count;
    m.queries[count++] = {query_of(in, token, head), first, behind};
    low = std::min(low, first), high = std::max(high, behind);
  }
  if (!count) return;
  kernels_.load_queries(l, m.queries, count, m.scratch);
  attend_pages(attend_of(pass, in, run, kv_head), count, low, high, m);
  for (int i = 0; i < count; ++i)
    write_out(in, places[i].first, places[i].second, m.sums + size_t(i) * l.dim_padded, m.total[i]);
}

float* Program::query_of(const Instruction& in, int token, int head) const {
  return buffer(in.in) + size_t(token) * buffers_[in.in].width + head * shape_.head_dim;
}

// Zeros where there are no sums: the head is closed.
void Program::write_out(const Instruction& in, int token, int head, const float* sums, float total) const {
  float* out = buffer(in.out) + size_t(token) * buffers_[in.out].width + head * shape_.head_dim;
  if (!sums) return void(std::fill_n(out, shape_.head_dim, 0.0f));
  float factor = gate_of(in, token, head) / total;
  for (int d = 0; d < shape_.head_dim; ++d) out[d] = sums[d] * factor;
}

void Routing::sort(int count, int num_experts) {
  first.assign(num_experts + 1, 0);
  for (int i = 0; i < count; ++i) ++first[expert[i] + 1];
  for (int e = 0; e < num_experts; ++e) first[e + 1] += first[e];
  std::vector<int> next(first.begin(), first.end() - 1);
  for (int i = 0; i < count; ++i) {
    place[i] = next[expert[i]]++;
    slot_at[place[i]] = i;
  }
  busy.clear();
  for (int e = 0; e < num_experts; ++e)
    if (first[e + 1] > first[e]) busy.push_back(e);
}

namespace {

// Marks the `count` largest of `scores`, the first of equals.
std::vector<int> largest_places(const std::vector<float>& scores, int count) {
  std::vector<int> places(scores.size());
  for (size_t i = 0; i < places.size(); ++i) places[i] = int(i);
  std::partial_sort(places.begin(), places.begin() + count, places.end(), [&](int a, int b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  });
  places.resize(count);
  return places;
}

// Lowers the scores outside the best groups, by the sum of a group's two largest.
void close_groups(std::vector<float>& scores, int num_groups, int num_active) {
  int size = int(scores.size()) / num_groups;
  std::vector<float> sums;
  for (int g = 0; g < num_groups; ++g) {
    std::vector<float> group(scores.begin() + g * size, scores.begin() + (g + 1) * size);
    std::partial_sort(group.begin(), group.begin() + 2, group.end(), std::greater<>());
    sums.push_back(group[0] + group[1]);
  }
  std::vector<bool> is_open(num_groups, false);
  for (int g : largest_places(sums, num_active)) is_open[g] = true;
  for (size_t i = 0; i < scores.size(); ++i)
    if (!is_open[i / size]) scores[i] = -INFINITY;
}

// Experts of one token and the weights of their outputs. Source: DeepSeek-V3 (2412.19437), section
// 2.1.2, where there is a balancing vector; else softmax over all experts.
void choose_experts(const Instruction& in, const float* logits, int count, const float* balance,
                    int* chosen, float* shares) {
  std::vector<float> scores(count), weights(count);
  float most = *std::max_element(logits, logits + count);
  double total = 0;
  for (int e = 0; e < count; ++e) {
    weights[e] = balance ? 1.0f / (1.0f + std::exp(-logits[e])) : std::exp(logits[e] - most);
    total += weights[e];
    scores[e] = balance ? weights[e] + balance[e] : logits[e];
  }
  if (in.num_groups > 1) close_groups(scores, in.num_groups, in.num_active_groups);
  std::vector<int> best = largest_places(scores, in.num_active);
  float divisor = balance ? 1.0f : float(total), sum = 0;
  for (int e : best) sum += weights[e] / divisor;
  for (int i = 0; i < in.num_active; ++i) {
    chosen[i] = best[i];
    shares[i] = weights[best[i]] / divisor * in.scale / (in.normalizes ? sum + 1e-20f : 1.0f);
  }
}

}  // namespace

void Program::experts(Pass& pass, const Instruction& in, int index, int thread) {
  const Weight &gate = weights_[in.weights[0]], &down = weights_[in.weights[2]];
  int rows = rows_of(pass, in), active = in.num_active, slots = rows * active;
  int num_experts = int(in.weights.size()) / 3;
  float* hidden = (float*)expert_states_.data();
  float* outputs = hidden + size_t(max_tokens_) * active * down.k;
  float* scratch = product_scratch(thread);
  float* tiles = scratch + aligned(std::max(gate.k_padded, down.k_padded) + 64, 16);

  auto [first_row, last_row] = share(rows, pool_.size(), thread);
  for (int r = first_row; r < last_row; ++r)
    choose_experts(in, buffer(in.routes) + size_t(r) * buffers_[in.routes].width, num_experts,
                   in.balance < 0 ? nullptr : vectors_[in.balance], &routing_.expert[r * active],
                   &routing_.share[r * active]);
  pool_.barrier().wait();
  if (thread == 0) routing_.sort(slots, num_experts);
  pool_.barrier().wait();

  auto [first, last] = share(slots, pool_.size(), thread);
  Inputs x = inputs_for(gate, 0);
  const float* norm = in.norm < 0 ? nullptr : vectors_[in.norm];
  for (int p = first; p < last; ++p)
    kernels_.prepare(gate, buffer(in.in) + size_t(routing_.slot_at[p] / active) * buffers_[in.in].width,
                     norm, shape_.norm_eps, x, p, scratch);
  pool_.barrier().wait();
  auto each_panel = [&](int panels, std::atomic<int>& counter, auto work) {
    int units = int(routing_.busy.size()) * panels;
    for (int u; (u = counter.fetch_add(1)) < units;) {
      int expert = routing_.busy[u / panels];
      work(expert, u % panels, routing_.first[expert], routing_.first[expert + 1]);
    }
  };
  each_panel(gate.panels(), counters_[kCounters * index], [&](int expert, int panel, int start, int stop) {
    kernels_.swiglu(weights_[in.weights[3 * expert]], weights_[in.weights[3 * expert + 1]], x, start, stop, panel,
                    tiles, hidden + size_t(start) * down.k + panel * kPanel, down.k);
  });
  pool_.barrier().wait();

  x = inputs_for(down, 0);
  for (int p = first; p < last; ++p)
    kernels_.prepare(down, hidden + size_t(p) * down.k, nullptr, 0, x, p, scratch);
  pool_.barrier().wait();
  each_panel(down.panels(), counters_[kCounters * index + 1], [&](int expert, int panel, int start, int stop) {
    kernels_.linear(weights_[in.weights[3 * expert + 2]], x, start, stop, panel,
                    outputs + size_t(start) * down.n + panel * kPanel, down.n, Store::set);
  });
  pool_.barrier().wait();

  for (int r = first_row; r < last_row; ++r) {
    float* out = buffer(in.out) + size_t(r) * buffers_[in.out].width;
    for (int i = 0; i < active; ++i) {
      const float* part = outputs + size_t(routing_.place[r * active + i]) * down.n;
      for (int d = 0; d < down.n; ++d) out[d] += routing_.share[r * active + i] * part[d];
    }
  }
}

}  // namespace deepseek
