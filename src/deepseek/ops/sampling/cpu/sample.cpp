#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace deepseek {

namespace {

struct Candidate {
  float score;
  int token;
};

// A softmax over the candidates, in double.
std::vector<double> probabilities(const std::vector<Candidate>& kept, float most) {
  std::vector<double> p(kept.size());
  double total = 0;
  for (size_t i = 0; i < kept.size(); ++i) total += p[i] = std::exp(double(kept[i].score) - most);
  for (double& value : p) value /= total;
  return p;
}

void keep_top_k(std::vector<Candidate>& kept, int top_k) {
  if (top_k <= 0 || size_t(top_k) >= kept.size()) return;
  std::vector<float> scores(kept.size());
  for (size_t i = 0; i < kept.size(); ++i) scores[i] = kept[i].score;
  std::nth_element(scores.begin(), scores.begin() + (top_k - 1), scores.end(), std::greater<float>());
  float least = scores[top_k - 1];
  std::erase_if(kept, [&](const Candidate& c) { return c.score < least; });
}

void keep_top_p(std::vector<Candidate>& kept, double top_p, float most) {
  double total = 0;
  for (const Candidate& c : kept) total += std::exp(double(c.score) - most);
  auto before = [](const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token);
  };
  // the likeliest few hold the mass nearly always: sort more only when they do not
  size_t sorted = 0;
  double mass = 0;
  size_t count = 0;
  while (count < kept.size() && (count == 0 || mass / total < top_p)) {
    if (count == sorted) {
      sorted = std::min(kept.size(), sorted == 0 ? size_t(64) : sorted * 8);
      std::partial_sort(kept.begin() + count, kept.begin() + sorted, kept.end(), before);
    }
    mass += std::exp(double(kept[count++].score) - most);
  }
  kept.resize(count);
  std::sort(kept.begin(), kept.end(), [](const auto& a, const auto& b) { return a.token < b.token; });
}

}  // namespace

int largest_place(const float* logits, int count) {
  float most = -INFINITY;
  bool has_nan = false;
  for (int i = 0; i < count; ++i) {
    most = logits[i] > most ? logits[i] : most;
    has_nan |= logits[i] != logits[i];
  }
  for (int i = 0; i < count; ++i)
    if (has_nan ? logits[i] != logits[i] : logits[i] == most) return i;
  return 0;
}

int choose_token(float* logits, int count, const Choice& choice, const uint8_t* seen,
                 const float* counts, double uniform) {
  if (seen && choice.repetition != 1.0f)
    for (int i = 0; i < count; ++i)
      if (seen[i]) logits[i] = logits[i] < 0 ? logits[i] * choice.repetition : logits[i] / choice.repetition;
  if (counts && (choice.frequency != 0.0f || choice.presence != 0.0f))
    for (int i = 0; i < count; ++i)
      if (counts[i] > 0) logits[i] -= choice.frequency * counts[i] + choice.presence;
  int best = largest_place(logits, count);
  if (choice.temperature == 0 || !std::isfinite(logits[best])) return best;
  float inverse = float(choice.temperature), most = logits[best] / inverse;
  std::vector<Candidate> kept(count);
  for (int i = 0; i < count; ++i) kept[i] = {logits[i] / inverse, i};
  keep_top_k(kept, choice.top_k);
  if (choice.top_p < 1) keep_top_p(kept, choice.top_p, most);
  std::vector<double> p = probabilities(kept, most);
  if (choice.min_p > 0) {
    double least = choice.min_p * *std::max_element(p.begin(), p.end());
    size_t place = 0;
    for (size_t i = 0; i < kept.size(); ++i)
      if (p[i] >= least) p[place] = p[i], kept[place++] = kept[i];
    p.resize(place), kept.resize(place);
  }
  double total = 0, target = 0;
  for (double value : p) total += value;
  target = total * uniform;
  double cumulative = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    cumulative += p[i];
    if (cumulative > target) return kept[i].token;
  }
  return kept.back().token;
}

}  // namespace deepseek
