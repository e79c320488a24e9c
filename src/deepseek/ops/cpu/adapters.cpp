// Adapters: what comes with them, which rows of a step they change, and their two products.
#include "adapters.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "pass.h"

namespace deepseek {

namespace {

constexpr int kAdaptedRows = 16;  // that go to a kernel together

}  // namespace

Adapter::Adapter(const std::vector<Weight>& weights, const std::vector<GivenLowRank>& given)
    : parts_(weights.size()) {
  size_t floats = 0;
  auto take = [&](size_t count) { return std::exchange(floats, floats + aligned(count, 16)); };
  std::vector<std::pair<size_t, size_t>> places;
  for (const GivenLowRank& g : given) {
    const Weight& w = weights[g.weight];
    LowRank& part = parts_[g.weight];
    part = {g.rank, int(aligned(w.k, 16)), g.scale};
    rank_padded_ = std::max(rank_padded_, part.rank_padded());
    size_t down = take(size_t(part.rank_padded()) * part.k_padded);
    places.emplace_back(down, take(size_t(w.panels()) * part.rank * kPanel));
  }
  memory_ = Memory(floats * sizeof(float));
  for (size_t i = 0; i < given.size(); ++i) {
    const GivenLowRank& g = given[i];
    const Weight& w = weights[g.weight];
    LowRank& part = parts_[g.weight];
    float* down = (float*)memory_.data() + places[i].first;
    float* up = (float*)memory_.data() + places[i].second;
    part.down = down, part.up = up;
    for (int r = 0; r < g.rank; ++r)
      std::memcpy(down + size_t(r) * part.k_padded, g.down + size_t(r) * w.k, w.k * sizeof(float));
    for (int n = 0; n < w.n; ++n)
      for (int r = 0; r < g.rank; ++r)
        up[(size_t(n / kPanel) * g.rank + r) * kPanel + n % kPanel] = g.up[size_t(n) * g.rank + r];
  }
}

int AdapterTable::add(std::shared_ptr<const Adapter> adapter) {
  std::lock_guard guard(lock_);
  adapters_.emplace(next_, std::move(adapter));
  return next_++;
}

void AdapterTable::drop(int number) {
  std::shared_ptr<const Adapter> last;  // given back outside the lock
  std::lock_guard guard(lock_);
  auto found = adapters_.find(number);
  if (found == adapters_.end()) throw std::invalid_argument("no adapter of number " + std::to_string(number));
  last = std::move(found->second);
  adapters_.erase(found);
}

std::shared_ptr<const Adapter> AdapterTable::find(int number) const {
  std::lock_guard guard(lock_);
  auto found = adapters_.find(number);
  return found == adapters_.end() ? nullptr : found->second;
}

size_t AdapterTable::bytes() const {
  std::lock_guard guard(lock_);
  size_t total = 0;
  for (const auto& [number, adapter] : adapters_) total += adapter->bytes();
  return total;
}

// Whether a weight's product is one that adapters are added to.
bool Program::can_adapt(int weight) const {
  bool is_found = false;
  for (const Instruction& in : instructions_) {
    if (std::find(in.weights.begin(), in.weights.end(), weight) == in.weights.end()) continue;
    if (in.op == Op::embed || in.op == Op::experts || in.out < 0) return false;
    is_found = true;
  }
  return is_found;
}

int Program::add_adapter(const std::vector<GivenLowRank>& matrices) {
  std::vector<bool> is_given(weights_.size(), false);
  for (const GivenLowRank& g : matrices) {
    auto refuse = [&](const std::string& what) {
      throw std::invalid_argument("weight " + std::to_string(g.weight) + " " + what);
    };
    if (g.weight < 0 || g.weight >= int(weights_.size())) refuse("is none of the program's");
    if (!can_adapt(g.weight)) refuse("is of the embedding, the head or routed experts, which take no adapter");
    if (g.rank < 1 || g.rank > kMaxRank) refuse("has an adapter whose rank is not from 1 to 256");
    if (is_given[g.weight]) refuse("has two adapters");
    is_given[g.weight] = true;
  }
  return adapters_.add(std::make_shared<const Adapter>(weights_, matrices));
}

// Finds the adapters of a step and their rows, and makes room for what they compute.
void Program::plan_adapters(Pass& pass) {
  const Step& step = pass.step;
  std::map<int, std::shared_ptr<const Adapter>> found;
  for (int t = 0; t < step.count; ++t) {
    int number = step.adapters[t];
    if (number == -1 || found.count(number)) continue;
    auto adapter = adapters_.find(number);
    if (!adapter) throw std::invalid_argument("no adapter of number " + std::to_string(number));
    found.emplace(number, std::move(adapter));
  }
  int rank = 0;
  for (const auto& [number, adapter] : found) {
    rank = std::max(rank, adapter->rank_padded());
    Pass::Adapted all{adapter, {}}, picked{adapter, {}};
    for (int t = 0; t < step.count; ++t)
      if (step.adapters[t] == number) all.rows.push_back(t);
    for (int r = 0; r < step.num_selected; ++r)
      if (step.adapters[step.selected[r]] == number) picked.rows.push_back(r);
    pass.adapted.push_back(std::move(all));
    if (!picked.rows.empty()) pass.adapted_picked.push_back(std::move(picked));
  }
  if (!rank) return;
  size_t places = 1;
  for (const Weight& w : weights_) adapted_width_ = std::max(adapted_width_, aligned(w.k, 16));
  for (const Instruction& in : instructions_)
    if (in.op == Op::linear || in.op == Op::swiglu) places = std::max(places, in.weights.size());
  low_rank_width_ = rank, low_rank_places_ = places;
  size_t inputs = (max_tokens_ + size_t(pool_.size()) * kFewTokens) * adapted_width_ * sizeof(float);
  size_t products = max_tokens_ * places * rank * sizeof(float);
  if (inputs > adapted_inputs_.bytes()) adapted_inputs_ = Memory(inputs);
  if (products > low_rank_.bytes()) low_rank_ = Memory(products);
}

bool Program::is_adapted(const Pass& pass, const Instruction& in) const {
  for (const Pass::Adapted& each : pass.adapted_of(in))
    for (int weight : in.weights)
      if (each.adapter->of(weight).rank) return true;
  return false;
}

// The input of a row after its norm. Of few rows every thread has its own copy.
float* Program::adapted_input(const Pass& pass, const Instruction& in, int row, int thread) const {
  size_t place = rows_of(pass, in) > kFewTokens ? row : max_tokens_ + size_t(thread) * kFewTokens + row;
  return (float*)adapted_inputs_.data() + place * adapted_width_;
}

// scale * down x of a row, for the weight at a place of the instruction.
float* Program::low_rank_of(int row, int place) const {
  return (float*)low_rank_.data() + (size_t(row) * low_rank_places_ + place) * low_rank_width_;
}

void Program::prepare_adapted(const Pass& pass, const Instruction& in, int thread) const {
  bool is_alone = rows_of(pass, in) <= kFewTokens;
  Weight exact;  // its inputs are the normed values themselves, with zeros behind them
  exact.k = weights_[in.weights[0]].k, exact.k_padded = int(aligned(exact.k, 16));
  const float* norm = in.norm < 0 ? nullptr : vectors_[in.norm];
  for (const Pass::Adapted& each : pass.adapted_of(in)) {
    int count = int(each.rows.size());
    auto [first, last] = is_alone ? std::pair{0, count} : share(count, pool_.size(), thread);
    for (int i = first; i < last; ++i) {
      const float* x = buffer(in.in) + size_t(source_of(pass, in, each.rows[i])) * buffers_[in.in].width;
      Inputs to;
      to.data = (uint8_t*)adapted_input(pass, in, each.rows[i], thread);
      kernels_.prepare(exact, x, norm, shape_.norm_eps, to, 0, nullptr);
    }
  }
}

// Shares out blocks of rows and ranks.
void Program::project_down(const Pass& pass, const Instruction& in, int thread) const {
  for (const Pass::Adapted& each : pass.adapted_of(in))
    for (int place = 0; place < int(in.weights.size()); ++place) {
      const LowRank& part = each.adapter->of(in.weights[place]);
      int count = int(each.rows.size()), blocks = part.rank_padded() / kRankBlock;
      int units = (count + kAdaptedRows - 1) / kAdaptedRows * blocks;
      auto [first, last] = share(units, pool_.size(), thread);
      for (int u = first; u < last; ++u) {
        const float* x[kAdaptedRows];
        float* hidden[kAdaptedRows];
        int start = u / blocks * kAdaptedRows, rows = std::min(kAdaptedRows, count - start);
        for (int i = 0; i < rows; ++i) {
          x[i] = adapted_input(pass, in, each.rows[start + i], thread);
          hidden[i] = low_rank_of(each.rows[start + i], place);
        }
        kernels_.low_rank_down(part, x, hidden, rows, u % blocks * kRankBlock);
      }
    }
}

// Adds to a panel of the product of the weight at a place of the instruction, in the rows start ...
// stop - 1; `out` is row `start` in the panel's first column.
void Program::project_up(const Pass& pass, const Instruction& in, int place, int panel, int start, int stop,
                         float* out, ptrdiff_t stride) const {
  const Weight& w = weights_[in.weights[place]];
  int columns = std::min(kPanel, w.n - panel * kPanel);
  for (const Pass::Adapted& each : pass.adapted_of(in)) {
    const LowRank& part = each.adapter->of(in.weights[place]);
    if (!part.rank) continue;
    auto next = std::lower_bound(each.rows.begin(), each.rows.end(), start);
    auto end = std::lower_bound(next, each.rows.end(), stop);
    while (next != end) {
      const float* hidden[kAdaptedRows];
      float* target[kAdaptedRows];
      int rows = 0;
      for (; next != end && rows < kAdaptedRows; ++next, ++rows) {
        hidden[rows] = low_rank_of(*next, place);
        target[rows] = out + (*next - start) * stride;
      }
      kernels_.low_rank_up(part, hidden, target, rows, panel, columns);
    }
  }
}

}  // namespace deepseek
