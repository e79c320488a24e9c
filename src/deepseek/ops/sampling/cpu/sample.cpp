#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "../../cpu/types.h"

namespace deepseek {

namespace {

struct Candidate {
  float score, weight;
  int token;
};

// A row with the largest value of each block.
struct Row {
  const Kernels& kernels;
  const float* logits;
  int count;
  std::vector<float> largest;

  Row(const Kernels& kernels, const float* logits, int count)
      : kernels(kernels), logits(logits), count(count), largest((count + kSampleBlock - 1) / kSampleBlock) {
    kernels.block_largest(logits, count, largest.data());
  }

  // The first block whose largest value is the row's, or is NaN.
  int best_block() const {
    int best = 0;
    for (int block = 0; block < int(largest.size()); ++block) {
      if (largest[block] != largest[block]) return block;
      if (largest[block] > largest[best]) best = block;
    }
    return best;
  }

  int largest_place() const {
    int block = best_block();
    float value = largest[block];
    for (int i = block * kSampleBlock; i < count; ++i)
      if (value != value ? logits[i] != logits[i] : logits[i] == value) return i;
    return 0;
  }

  template <typename Take>
  void each_from(float least, Take take) const {
    for (int block = 0; block < int(largest.size()); ++block) {
      if (!(largest[block] >= least)) continue;
      int stop = std::min(count, (block + 1) * kSampleBlock);
      for (int i = block * kSampleBlock; i < stop; ++i)
        if (logits[i] >= least) take(i);
    }
  }
};

// A bound that at least `top_k` values reach.
float bound_of(const Row& row, int top_k) {
  if (size_t(top_k) > row.largest.size()) return -INFINITY;
  std::vector<float> blocks = row.largest;
  std::nth_element(blocks.begin(), blocks.begin() + (top_k - 1), blocks.end(), std::greater<float>());
  return blocks[top_k - 1];
}

// The `top_k` largest values and all that equal the last of them.
float least_of_top_k(const Row& row, int top_k) {
  std::vector<float> scores;
  row.each_from(bound_of(row, top_k), [&](int i) { scores.push_back(row.logits[i]); });
  std::nth_element(scores.begin(), scores.begin() + (top_k - 1), scores.end(), std::greater<float>());
  return scores[top_k - 1];
}

bool comes_first(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

// The fewest likeliest tokens whose mass reaches `top_p` of the total; of those at least `least`.
std::vector<Candidate> keep_top_p(const Row& row, const float* weights, float most, float temperature,
                                  float least, double needed) {
  std::vector<Candidate> found;
  // the likeliest few hold the mass nearly always: look at more only when they do not
  for (float depth : {4.0f, 8.0f, 16.0f, INFINITY}) {
    float bound = std::max(least, most - depth * temperature);
    double mass = 0;
    found.clear();
    row.each_from(bound, [&](int i) {
      found.push_back({row.logits[i], weights[i], i}), mass += weights[i];
    });
    if (mass >= needed * (1 + 1e-9) || bound == least || depth == INFINITY) break;
  }
  double mass = 0;
  size_t count = 0, sorted = 0;
  while (count < found.size() && (count == 0 || mass < needed)) {
    if (count == sorted) {
      sorted = std::min(found.size(), sorted == 0 ? size_t(64) : sorted * 8);
      std::partial_sort(found.begin() + count, found.begin() + sorted, found.end(), comes_first);
    }
    mass += found[count++].weight;
  }
  found.resize(count);
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.token < b.token; });
  return found;
}

int draw(const std::vector<Candidate>& kept, double uniform) {
  double total = 0, cumulative = 0;
  int last = kept.front().token;
  for (const Candidate& c : kept) total += c.weight;
  for (const Candidate& c : kept) {
    cumulative += c.weight;
    if (c.weight > 0) last = c.token;
    if (cumulative > total * uniform) return c.token;
  }
  return last;
}

int draw_from_all(const float* weights, const std::vector<float>& sums, int count, double target) {
  double cumulative = 0;
  int last = 0;
  for (int block = 0; block < int(sums.size()); ++block) {
    if (cumulative + sums[block] <= target) {
      cumulative += sums[block];
      continue;
    }
    int stop = std::min(count, (block + 1) * kSampleBlock);
    for (int i = block * kSampleBlock; i < stop; ++i) {
      cumulative += weights[i];
      if (weights[i] > 0) last = i;
      if (cumulative > target) return i;
    }
  }
  return last;
}

void penalize(float* logits, int count, const Choice& choice, const uint8_t* seen, const float* counts) {
  if (seen && choice.repetition != 1.0f)
    for (int i = 0; i < count; ++i)
      if (seen[i]) logits[i] = logits[i] < 0 ? logits[i] * choice.repetition : logits[i] / choice.repetition;
  if (counts && (choice.frequency != 0.0f || choice.presence != 0.0f))
    for (int i = 0; i < count; ++i)
      if (counts[i] > 0) logits[i] -= choice.frequency * counts[i] + choice.presence;
}

}  // namespace

int largest_place(const Kernels& kernels, const float* logits, int count) {
  return Row(kernels, logits, count).largest_place();
}

int choose_token(const Kernels& kernels, float* logits, int count, const Choice& choice,
                 const uint8_t* seen, const float* counts, double uniform) {
  penalize(logits, count, choice, seen, counts);
  Row row(kernels, logits, count);
  int best = row.largest_place();
  float most = logits[best], temperature = float(choice.temperature);
  if (temperature == 0 || !std::isfinite(most)) return best;
  std::vector<float> weights(count), sums(row.largest.size());
  double total = kernels.weigh(logits, count, most, 1 / temperature, weights.data(), sums.data()).total;
  bool has_top_k = choice.top_k > 0 && choice.top_k < count;
  if (!has_top_k && choice.top_p >= 1 && choice.min_p <= 0)
    return draw_from_all(weights.data(), sums, count, total * uniform);
  float least = has_top_k ? least_of_top_k(row, choice.top_k) : -INFINITY;
  std::vector<Candidate> kept;
  auto take = [&](int i) { kept.push_back({logits[i], weights[i], i}); };
  if (choice.top_p < 1) {
    if (has_top_k) total = 0, row.each_from(least, [&](int i) { total += weights[i]; });
    kept = keep_top_p(row, weights.data(), most, temperature, least, choice.top_p * total);
  } else if (choice.min_p > 0) {  // below that bound is nothing that min_p keeps
    row.each_from(std::max(least, most + temperature * (float(std::log(choice.min_p)) - 1e-3f)), take);
  } else {
    row.each_from(least, take);
  }
  if (choice.min_p > 0)
    std::erase_if(kept, [&](const Candidate& c) { return c.weight < choice.min_p; });
  return draw(kept, uniform);
}

Certainty certainty_of(const Kernels& kernels, const float* logits, int count) {
  Row row(kernels, logits, count);
  float most = row.largest[row.best_block()];
  std::vector<float> weights(count), sums(row.largest.size());
  Mass mass = kernels.weigh(logits, count, most, 1.0f, weights.data(), sums.data());
  double log_total = std::log(mass.total);
  return {float(most + log_total), float(log_total - mass.moment / mass.total)};
}

}  // namespace deepseek
