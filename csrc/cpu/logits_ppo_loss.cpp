#include "logits_ppo_loss.h"

#include "softmax_row.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

// What a loss makes of a row's log-prob and entropy: its derivatives by them, and the columns of `found`.
template <int kColumns>
struct TokenLoss {
  static constexpr int columns = kColumns;
  double dlogprob, dentropy;
  double found[kColumns];
};

struct PPO {
  static constexpr bool kEntropy = true;
  const LogitsPPOLoss& args;

  TokenLoss<6> operator()(int64_t row, double weight, double logprob, double entropy, bool /*is_largest*/) const {
    const bool has_ref = args.ref_logprobs != nullptr;
    const PPOToken<double> token = ppo_token(logprob, args.old_logprobs[row], args.advantages[row], weight, has_ref,
                                             has_ref ? args.ref_logprobs[row] : 0.0, entropy, args.options);
    return {token.dlogprob,
            token.dentropy,
            {logprob, token.loss, token.approx_kl, token.clipped, entropy, token.ratio}};
  }
};

struct CrossEntropy {
  static constexpr bool kEntropy = false;

  TokenLoss<3> operator()(int64_t, double weight, double logprob, double, bool is_largest) const {
    return {-weight, 0, {logprob, -weight * logprob, double(is_largest)}};
  }
};

template <typename T, typename Loss>
void rows(const LogitsLoss& args, const Loss& loss, int64_t begin, int64_t end) {
  using Token = decltype(loss(0, 0, 0, 0, false));
  for (int64_t row = begin; row < end; ++row) {
    T* const x = static_cast<T*>(args.logits) + args.layout.start(row);
    Token token{};
    if (args.mask[row]) {
      const Softmax softmax = read_row<Loss::kEntropy>(x, args.vocabulary, args.temperature);
      const int64_t id = args.ids[row];
      const double chosen = value(x[id]);
      // Rounded like gather_logprobs': against those of the same weights the ratio is exactly 1.
      const Real<T> logprob = logprob_of(chosen, softmax, args.temperature), entropy = softmax.entropy;
      token = loss(row, args.weights ? args.weights[row] : 1, logprob, entropy, chosen == softmax.largest);
      write_gradient(x, x, args.vocabulary, softmax, id, args.temperature, token.dlogprob / args.tokens,
                     token.dentropy / args.tokens);
    } else {
      memset(x, 0, args.vocabulary * sizeof(T));
    }
    for (int i = 0; i < Token::columns; ++i) args.found[i * args.columns + row] = token.found[i];
  }
}

template <typename Loss>
void rows_of_type(const LogitsLoss& args, const Loss& loss, int64_t begin, int64_t end) {
  switch (args.type) {
    case LogitsType::float32: return rows<float>(args, loss, begin, end);
    case LogitsType::float64: return rows<double>(args, loss, begin, end);
    case LogitsType::bfloat16: return rows<bfloat16>(args, loss, begin, end);
    case LogitsType::float16: return rows<float16>(args, loss, begin, end);
  }
}

}  // namespace

void logits_ppo_loss(const LogitsPPOLoss& args, int64_t begin, int64_t end) {
  rows_of_type(args, PPO{args}, begin, end);
}

void logits_cross_entropy(const LogitsCrossEntropy& args, int64_t begin, int64_t end) {
  rows_of_type(args, CrossEntropy{}, begin, end);
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
