#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../cpu/choose_isa.h"
#include "exponentials.h"
#include "philox.h"

namespace rlhf_fast {
namespace {

// Where a uniform number falls in a cumulative distribution: below its end whatever the rounding, so that the token
// found there has a probability above 0.
double target(double uniform, double total) { return std::min(uniform * total, std::nextafter(total, 0.0)); }

// softmax(x / temperature) of a row that stays where it is.
class Softmax {
 public:
  void of(const float* x, int64_t n, double temperature) {
    x_ = x, n_ = n, temperature_ = temperature;
    const int64_t blocks = (n + kExponentialsBlock - 1) / kExponentialsBlock;
    maxima_.resize(blocks);
    sums_.resize(blocks);
    RLHF_FAST_KERNEL(isa(), block_maxima)(x, n, maxima_.data());
    largest_ = *std::max_element(maxima_.begin(), maxima_.end());
    RLHF_FAST_KERNEL(isa(), block_sums)(x, n, largest_, temperature, sums_.data());
    total_ = 0;
    for (const float sum : sums_) total_ += sum;
  }

  bool finite() const { return total_ > 0 && std::isfinite(total_); }  // false for NaN
  float largest() const { return largest_; }
  double total() const { return total_; }  // of e^((x - largest) / temperature)
  float logprob(int32_t token) const {
    return float((double(x_[token]) - largest_) / temperature_ - std::log(total_));
  }

  int32_t likeliest() const {
    const int64_t block = std::find(maxima_.begin(), maxima_.end(), largest_) - maxima_.begin();
    return int32_t(std::find(x_ + block * kExponentialsBlock, x_ + n_, largest_) - x_);
  }

  int32_t draw(double uniform) const {
    const double goal = target(uniform, total_);
    int64_t block = 0;
    double before = 0;
    while (before + sums_[block] <= goal) before += sums_[block++];

    float terms[kExponentialsBlock];
    const int64_t begin = block * kExponentialsBlock, count = std::min(n_ - begin, kExponentialsBlock);
    RLHF_FAST_KERNEL(isa(), exponentials)(x_ + begin, count, largest_, temperature_, terms);
    int64_t last = 0;  // of those above 0: the terms' sum in another order may stay a little below the block's
    for (int64_t j = 0; j < count; ++j) {
      if (terms[j] > 0) last = j;
      before += terms[j];
      if (before > goal) break;
    }
    return int32_t(begin + last);
  }

  // Calls use(token, logit) in vocabulary order for each logit from `floor` on.
  template <typename Use>
  void for_each_from(float floor, Use use) const {
    int32_t places[kExponentialsBlock];
    for (size_t block = 0; block < maxima_.size(); ++block) {
      if (maxima_[block] < floor) continue;
      const int64_t begin = int64_t(block) * kExponentialsBlock, n = std::min(n_ - begin, kExponentialsBlock);
      const int64_t count = RLHF_FAST_KERNEL(isa(), select)(x_ + begin, n, floor, places);
      for (int64_t i = 0; i < count; ++i) use(int32_t(begin + places[i]), x_[begin + places[i]]);
    }
  }

  // The k-th largest logit. The k blocks of the largest maxima hold k logits from the k-th of them on: those below it
  // need not be compared.
  float kth_largest(int64_t k, std::vector<float>& scratch) const {
    float floor = -std::numeric_limits<float>::infinity();
    if (k <= int64_t(maxima_.size())) {
      scratch = maxima_;
      std::nth_element(scratch.begin(), scratch.begin() + k - 1, scratch.end(), std::greater<>());
      floor = scratch[k - 1];
    }
    scratch.clear();
    for_each_from(floor, [&](int32_t, float logit) { scratch.push_back(logit); });
    std::nth_element(scratch.begin(), scratch.begin() + k - 1, scratch.end(), std::greater<>());
    return scratch[k - 1];
  }

 private:
  const float* x_ = nullptr;
  int64_t n_ = 0;
  double temperature_ = 1;
  float largest_ = 0;
  double total_ = 0;
  std::vector<float> maxima_, sums_;  // [blocks]
};

// A token that the filters may leave.
struct Candidate {
  int32_t token;
  float logit;   // divided by the temperature
  float weight;  // e^(logit - largest)
};

// By probability; of equal ones the lower id first.
bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

double total_weight(std::vector<Candidate>::const_iterator begin, std::vector<Candidate>::const_iterator end) {
  double total = 0;
  for (; begin != end; ++begin) total += begin->weight;
  return total;
}

// The last candidate, likeliest first, that has less than `weight` before it. Weights are summed in buckets by logit;
// only the bucket that it lies in is ordered, and of that, by halves, only as much as must be.
Candidate last_within(const std::vector<Candidate>& candidates, float largest, double weight,
                      std::vector<Candidate>& scratch) {
  constexpr int kBuckets = 1536, kPerUnit = 16;  // weights end at e^-88
  const auto bucket = [&](const Candidate& candidate) {
    return int(std::min((largest - candidate.logit) * kPerUnit, kBuckets - 1.0f));
  };
  double weights[kBuckets] = {};
  for (const Candidate& candidate : candidates) weights[bucket(candidate)] += candidate.weight;
  int border = 0;
  double before = 0, through = 0;
  for (int i = 0; i < kBuckets && through < weight; ++i) {
    if (weights[i] == 0) continue;
    border = i;
    before = through;
    through += weights[i];
  }

  scratch.clear();
  for (const Candidate& candidate : candidates) {
    if (bucket(candidate) == border) scratch.push_back(candidate);
  }
  auto begin = scratch.begin(), end = scratch.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, likelier);
    const double half = total_weight(begin, middle);
    if (before + half < weight) {
      before += half;
      begin = middle;
    } else {
      end = middle;
    }
  }
  return *begin;
}

// Memory that a thread keeps from one row to the next.
struct Scratch {
  Softmax full, allowed;
  std::vector<float> row, values;
  std::vector<Candidate> candidates, others;
};

// The candidates that min_p, top_k and top_p leave, in vocabulary order. `largest` of the row is divided by the
// temperature.
void filter(const Softmax& row, float largest, int64_t vocabulary, const SamplingOptions& options, Scratch& scratch) {
  const auto temperature = float(options.temperature);
  float floor = -std::numeric_limits<float>::infinity();
  if (options.min_p > 0) floor = largest + float(std::log(options.min_p));
  if (0 < options.top_k && options.top_k < vocabulary) {
    floor = std::max(floor, row.kth_largest(options.top_k, scratch.values) / temperature);
  }
  const bool top_p_alone = std::isinf(floor);
  if (top_p_alone) {
    // All tokens below this one have less than 1 - top_p together; the margin is more than rounding takes.
    floor = largest + float(std::log((1 - options.top_p) * row.total() / double(vocabulary)) - 1e-3);
  }

  auto& candidates = scratch.candidates;
  candidates.clear();
  scratch.values.clear();
  const float about = floor * temperature;
  row.for_each_from(about - 1e-6f * std::abs(about), [&](int32_t token, float undivided) {
    const float logit = undivided / temperature;
    if (logit < floor) return;
    candidates.push_back({token, logit, 0});
    scratch.values.push_back(logit);
  });
  auto* const weights = scratch.values.data();
  RLHF_FAST_KERNEL(isa(), exponentials)(weights, int64_t(candidates.size()), largest, 1.0, weights);
  for (size_t i = 0; i < candidates.size(); ++i) candidates[i].weight = weights[i];

  if (options.top_p < 1) {
    const double total = top_p_alone ? row.total() : total_weight(candidates.begin(), candidates.end());
    const Candidate last = last_within(candidates, largest, options.top_p * total, scratch.others);
    std::erase_if(candidates, [&](const Candidate& candidate) { return likelier(last, candidate); });
  }
}

// The row after min_tokens and penalty.
void process(const float* logits, int64_t vocabulary, const SamplingOptions& options, bool masked,
             const uint64_t* seen, std::vector<float>& row) {
  row.assign(logits, logits + vocabulary);
  if (masked) {
    for (int64_t i = 0; i < options.stop_count; ++i) row[options.stop_ids[i]] = -std::numeric_limits<float>::infinity();
  }
  if (options.repetition_penalty == 1) return;
  const auto penalty = float(options.repetition_penalty);
  for (int64_t word = 0; word * 64 < vocabulary; ++word) {
    for (uint64_t bits = seen[word]; bits != 0; bits &= bits - 1) {
      float& logit = row[word * 64 + __builtin_ctzll(bits)];
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
  }
}

}  // namespace

Sampled sample(const float* logits, int64_t vocabulary, const SamplingOptions& options, Place place,
               const uint64_t* seen) {
  thread_local Scratch scratch;
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const bool greedy = options.temperature == 0;
  const double temperature = greedy ? 1 : options.temperature;
  const double number = greedy ? 0 : uniform(place.seed, place.sample, place.position);

  const Softmax& full = scratch.full;
  scratch.full.of(logits, vocabulary, temperature);
  if (!full.finite()) return {0, kNaN, kNaN};

  const Softmax* allowed = &full;
  const bool masked = place.position < options.min_tokens && options.stop_count > 0;
  if (masked || options.repetition_penalty != 1) {
    process(logits, vocabulary, options, masked, seen, scratch.row);
    scratch.allowed.of(scratch.row.data(), vocabulary, temperature);
    allowed = &scratch.allowed;
    if (!allowed->finite()) return {0, kNaN, kNaN};
  }

  const bool top_k = 0 < options.top_k && options.top_k < vocabulary;
  if (greedy || !(options.min_p > 0 || top_k || options.top_p < 1)) {
    const int32_t token = greedy ? allowed->likeliest() : allowed->draw(number);
    return {token, full.logprob(token), allowed->logprob(token)};
  }

  const float largest = allowed->largest() / float(temperature);
  if (!std::isfinite(largest)) return {0, kNaN, kNaN};
  filter(*allowed, largest, vocabulary, options, scratch);
  const auto& candidates = scratch.candidates;
  const double total = total_weight(candidates.begin(), candidates.end()), goal = target(number, total);
  double before = 0;
  const auto drawn = std::find_if(candidates.begin(), candidates.end(), [&](const Candidate& candidate) {
    before += candidate.weight;
    return before > goal;
  });
  return {drawn->token, full.logprob(drawn->token), float(double(drawn->logit) - largest - std::log(total))};
}

}  // namespace rlhf_fast
