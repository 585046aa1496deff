// Runs one CPU kernel on one thread, without PyTorch around it: bench/profile/kernels.py counts its instructions and
// takes its times.
//
//   kernels NAME ROWS COLUMNS CALLS
//
// Prints the numbers that a call works on (logits or tokens), the bytes that it has to move, and the seconds of the
// fastest call. A call goes over all rows; where they fit the second-level cache, memory is out of the picture.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/gae.h"
#include "../../csrc/cpu/gather_logprobs.h"
#include "../../csrc/cpu/logits_ppo_loss.h"
#include "../../csrc/cpu/masked_whiten.h"
#include "../../csrc/cpu/ppo_loss.h"
#include "../../csrc/cpu/shaped_gae.h"
#include "../../csrc/cpu/token_blocks.h"
#include "../../csrc/cpu/value_loss.h"

using namespace rlhf_fast;
namespace kernels = rlhf_fast::RLHF_FAST_ONLY;

namespace {

struct Job {
  double bytes;  // that each number has to be read or written with
  std::function<void()> call;
};

std::vector<float> normal(int64_t count, float scale, float shift = 0) {
  static std::mt19937 random(0);
  std::normal_distribution<float> distribution(0, 1);
  std::vector<float> numbers(count);
  for (float& x : numbers) x = scale * distribution(random) + shift;
  return numbers;
}

// What nothing does less than: the sum of the numbers, and each written back.
void read(const float* x, int64_t count, float* sink) {
  using namespace kernels;
  Floats sums[4] = {};
  for (int64_t i = 0; i + 4 * kWidth <= count; i += 4 * kWidth) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] = add(sums[lane], load(x + i + lane * kWidth));
  }
  *sink = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void write_back(float* x, int64_t count) {
  using namespace kernels;
  const volatile float one = 1;  // so that the compiler does not see through it
  const Floats factor = splat(one);
  for (int64_t i = 0; i + kWidth <= count; i += kWidth) store(x + i, mul(load(x + i), factor));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return std::fprintf(stderr, "kernels NAME ROWS COLUMNS CALLS\n"), 2;
  const int64_t rows = std::atoll(argv[2]), columns = std::atoll(argv[3]), count = rows * columns;
  const int calls = std::atoi(argv[4]);

  std::vector<float> x = normal(count, 3), y = normal(count, 0.1f), z = normal(count, 1), u = normal(count, 0.1f);
  std::vector<float> out(count), more(count), again(count), stats(2 * rows), found(2 * rows), scores = normal(rows, 1);
  std::vector<int64_t> ids(rows);
  for (int64_t row = 0; row < rows; ++row) ids[row] = row * 7919 % columns;
  const std::vector<double> zeros(rows, -8.0), ones(rows, 1.0);
  std::vector<double> columns_found(6 * rows), sums(8 * (count / kTokenBlock + 1));
  std::vector<uint8_t> bytes(std::max(count, rows), 1);
  const bool* const mask = reinterpret_cast<const bool*>(bytes.data());
  std::vector<Moments> moments(count / kWhitenBlock + 1);
  const int64_t blocks = (count + kTokenBlock - 1) / kTokenBlock;
  const PPOTokenOptions options{0.8, 1.2, 0, 0, 2, 0};
  const RowLayout layout{rows, 0, columns};

  const GatherLogprobs gather{LogitsType::float32, x.data(), layout, columns, ids.data(), -100, 1.0};
  const GatherLogprobsForward forward{gather, found.data(), nullptr, stats.data()};
  const GatherLogprobsForward with_entropy{gather, found.data(), found.data() + rows, stats.data()};
  const GatherLogprobsBackward backward{gather, stats.data(), nullptr, scores.data(), nullptr, x.data(), layout};
  const LogitsLoss loss{LogitsType::float32, x.data(),    layout, columns,       ids.data(),          mask,
                        nullptr,             1.0,         1.0 * rows,            columns_found.data(), rows};
  const LogitsPPOLoss ppo{loss, zeros.data(), ones.data(), nullptr, options};
  const LogitsCrossEntropy cross_entropy{loss};
  const PPOLoss<float> token_loss{count,   y.data(), u.data(), z.data(),  mask,       nullptr, nullptr,
                                  nullptr, &options, 1.0 * count, out.data(), nullptr, sums.data()};
  const ValueLoss<float> value{count, y.data(), u.data(), z.data(), mask, 0.2, 1.0 * count, out.data(), sums.data()};
  const Scan scan{false, columns, {bytes.data(), columns}, {y.data(), columns}, nullptr, 1.0, 0.95, out.data(),
                  more.data()};
  const Gae gae{scan, {z.data(), columns}};
  const ShapedGae shaped{scan, scores.data(), {z.data(), columns}, {u.data(), columns}, 0.1, 1, HUGE_VAL, again.data()};
  const MaskedNumbers numbers{false, count, z.data(), bytes.data()};

  const std::map<std::string, Job> jobs{
      {"read", {4, [&] { read(x.data(), count, found.data()); }}},
      {"write_back", {8, [&] { write_back(x.data(), count); }}},
      {"gather_logprobs", {4, [&] { kernels::gather_logprobs_forward(forward, 0, rows); }}},
      {"gather_logprobs_with_entropy", {4, [&] { kernels::gather_logprobs_forward(with_entropy, 0, rows); }}},
      {"gather_logprobs_backward", {8, [&] { kernels::gather_logprobs_backward(backward, 0, rows); }}},
      {"logits_ppo_loss", {8, [&] { kernels::logits_ppo_loss(ppo, 0, rows); }}},
      {"logits_cross_entropy", {8, [&] { kernels::logits_cross_entropy(cross_entropy, 0, rows); }}},
      {"ppo_loss", {17, [&] { kernels::ppo_loss(token_loss, 0, blocks); }}},
      {"value_loss", {17, [&] { kernels::value_loss(value, 0, blocks); }}},
      {"gae", {17, [&] { kernels::gae(gae, 0, rows); }}},
      {"shaped_gae", {25, [&] { kernels::shaped_gae(shaped, 0, rows); }}},
      {"masked_whiten", {14, [&] {
         kernels::block_moments(numbers, moments.data(), 0, (count + kWhitenBlock - 1) / kWhitenBlock);
         kernels::whiten(numbers, {0.0, 1.0, 0.0, out.data()}, 0, count);
       }}},
  };
  const auto job = jobs.find(argv[1]);
  if (job == jobs.end()) {
    for (const auto& [name, _] : jobs) std::fprintf(stderr, "%s\n", name.c_str());
    return 2;
  }
  double fastest = HUGE_VAL;
  for (int i = 0; i < calls; ++i) {
    const auto start = std::chrono::steady_clock::now();
    job->second.call();
    fastest = std::min(fastest, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::printf("%lld %.0f %.9f\n", static_cast<long long>(count), job->second.bytes * double(count), fastest);
}
