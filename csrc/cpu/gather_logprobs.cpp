#include "gather_logprobs.h"

#include "softmax_row.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

template <bool kEntropy, typename T>
void forward(const GatherLogprobsForward& args, int64_t begin, int64_t end) {
  using R = Real<T>;
  for (int64_t row = begin; row < end; ++row) {
    R* const stats = static_cast<R*>(args.stats) + 2 * row;
    double logprob = 0, entropy = 0;
    stats[0] = stats[1] = 0;
    const int64_t id = args.ids[row];
    if (id != args.ignore_index) {
      const T* const x = static_cast<const T*>(args.logits) + args.layout.start(row);
      const Softmax softmax = read_row<kEntropy>(x, args.vocabulary, args.temperature);
      logprob = logprob_of(value(x[id]), softmax, args.temperature);
      entropy = softmax.entropy;
      stats[0] = R(softmax.largest);
      stats[1] = R(softmax.log_sum);
    }
    static_cast<R*>(args.logprobs)[row] = R(logprob);
    if constexpr (kEntropy) static_cast<R*>(args.entropy)[row] = R(entropy);
  }
}

template <typename T>
void backward(const GatherLogprobsBackward& args, int64_t begin, int64_t end) {
  using R = Real<T>;
  const auto at = [](const void* values, int64_t row) { return values ? static_cast<const R*>(values)[row] : R(0); };
  for (int64_t row = begin; row < end; ++row) {
    T* const dx = static_cast<T*>(args.grad_logits) + args.grad_layout.start(row);
    const int64_t id = args.ids[row];
    if (id == args.ignore_index) {
      memset(dx, 0, args.vocabulary * sizeof(T));
      continue;
    }
    const R* const stats = static_cast<const R*>(args.stats) + 2 * row;
    write_gradient(static_cast<const T*>(args.logits) + args.layout.start(row), dx, args.vocabulary,
                   {.largest = stats[0], .log_sum = stats[1], .entropy = at(args.entropy, row)}, id, args.temperature,
                   at(args.grad_logprobs, row), at(args.grad_entropy, row));
  }
}

}  // namespace

void gather_logprobs_forward(const GatherLogprobsForward& args, int64_t begin, int64_t end) {
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    args.entropy ? forward<true, T>(args, begin, end) : forward<false, T>(args, begin, end);
  };
  switch (args.type) {
    case LogitsType::float32: return run(float());
    case LogitsType::float64: return run(double());
    case LogitsType::bfloat16: return run(bfloat16());
    case LogitsType::float16: return run(float16());
  }
}

void gather_logprobs_backward(const GatherLogprobsBackward& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case LogitsType::float32: return backward<float>(args, begin, end);
    case LogitsType::float64: return backward<double>(args, begin, end);
    case LogitsType::bfloat16: return backward<bfloat16>(args, begin, end);
    case LogitsType::float16: return backward<float16>(args, begin, end);
  }
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
