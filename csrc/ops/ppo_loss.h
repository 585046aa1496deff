// ppo_loss for PyTorch: the pass over tokens, autograd. The blocks are csrc/cpu's work. Numbers are checked in
// rlhf_fast/ops/ppo_loss.py, shapes here too, where a wrong one would be a wild read.
#pragma once

#include "../cpu/ppo_loss.h"
#include "../cpu/ppo_token.h"
#include "known_gradient.h"

namespace rlhf_fast {
namespace {

// (policy loss 0-d; approx_kl, clip_fraction, entropy, ratio_max [4]; the loss's gradients by logprobs and by entropy,
// of no elements where not wanted)
std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss_forward(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& mask,
    const OptionalTensor& weights, const OptionalTensor& ref_logprobs, const OptionalTensor& entropy,
    const OptionalTensor& num_tokens, std::optional<double> number, double clip_low, double clip_high, double dual_clip,
    double kl_coef, int64_t kl_estimator, double entropy_coef, bool want_logprobs, bool want_entropy) {
  check_tokens("ppo_loss", {logprobs, old_logprobs, advantages, weights, ref_logprobs, entropy}, mask);
  const auto type = real_type({logprobs, old_logprobs, advantages, weights, ref_logprobs, entropy});
  const auto options = logprobs.options().dtype(type);
  const PPOTokenOptions chosen{clip_low, clip_high, dual_clip, kl_coef, int(kl_estimator), entropy_coef};
  const Tensor inside = mask.contiguous(), lp = tokens_of(logprobs, type), old = tokens_of(old_logprobs, type),
               advantage = tokens_of(advantages, type), weight = tokens_of(weights, type),
               ref = tokens_of(ref_logprobs, type), h = tokens_of(entropy, type);
  const double count = token_count(inside, num_tokens, number);
  const Tensor grad_logprobs = gradient_of(logprobs, want_logprobs, options);
  const Tensor grad_entropy = gradient_of(logprobs, want_entropy, options);

  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const PPOLoss<T> all{
        .tokens = lp.numel(),
        .logprobs = data_or_null<T>(lp),
        .old_logprobs = data_or_null<T>(old),
        .advantages = data_or_null<T>(advantage),
        .mask = inside.const_data_ptr<bool>(),
        .weights = data_or_null<T>(weight),
        .ref_logprobs = data_or_null<T>(ref),
        .entropy = data_or_null<T>(h),
        .options = &chosen,
        .num_tokens = count,
        .grad_logprobs = filled_or_null<T>(grad_logprobs, want_logprobs),
        .grad_entropy = filled_or_null<T>(grad_entropy, want_entropy),
        .sums = nullptr,
    };
    const auto kernel = [](const PPOLoss<T>& args, int64_t begin, int64_t end) {
      RLHF_FAST_CALL(isa(), ppo_loss, args, begin, end);
    };
    return sum_blocks(kernel, all, kPPOLossSums, kRatioMax);
  };
  const auto sums = type == at::kDouble ? run(double()) : run(float());
  // A comparison passes over NaN: the sum of squared log-ratios tells whether there was one.
  const double ratio_max = std::isnan(sums[kApproxKL]) ? sums[kApproxKL] : sums[kRatioMax];
  const Tensor stats = tensor_of({sums[kApproxKL] / count, sums[kClipped] / count, sums[kEntropy] / count, ratio_max},
                                 {4}, options);
  return {tensor_of({sums[kPolicyLoss] / count}, {}, options), stats, grad_logprobs, grad_entropy};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss_forward_meta(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& mask,
    const OptionalTensor& weights, const OptionalTensor& ref_logprobs, const OptionalTensor& entropy,
    const OptionalTensor&, std::optional<double>, double, double, double, double, int64_t, double, bool want_logprobs,
    bool want_entropy) {
  check_tokens("ppo_loss", {logprobs, old_logprobs, advantages, weights, ref_logprobs, entropy}, mask);
  const auto options =
      logprobs.options().dtype(real_type({logprobs, old_logprobs, advantages, weights, ref_logprobs, entropy}));
  return {at::empty({}, options), at::empty({4}, options), gradient_of(logprobs, want_logprobs, options),
          gradient_of(logprobs, want_entropy, options)};
}

struct PPOLossFunction : torch::autograd::Function<PPOLossFunction> {
  // `run` finds (loss, stats, gradient by logprobs, gradient by entropy).
  template <typename Forward>
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& /*logprobs*/,
                                                const OptionalTensor& /*entropy*/, bool want_logprobs,
                                                bool want_entropy, const Forward& run) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, stats, grad_logprobs, grad_entropy] = run();
    ctx->save_for_backward({want_logprobs ? grad_logprobs : Tensor(), want_entropy ? grad_entropy : Tensor()});
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({stats});
    return {loss, stats};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "ppo_loss has no second derivative (create_graph=True)");
    const auto saved = ctx->get_saved_variables();
    return {chain(saved[0], grads[0]), chain(saved[1], grads[0]), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> ppo_loss(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
                                    const Tensor& mask, const OptionalTensor& weights,
                                    const OptionalTensor& ref_logprobs, const OptionalTensor& entropy,
                                    const OptionalTensor& num_tokens, std::optional<double> number, double clip_low,
                                    double clip_high, double dual_clip, double kl_coef, int64_t kl_estimator,
                                    double entropy_coef) {
  const bool want_logprobs = at::GradMode::is_enabled() && logprobs.requires_grad();
  const bool want_entropy = at::GradMode::is_enabled() && entropy && entropy->requires_grad();
  const auto out = PPOLossFunction::apply(logprobs, entropy, want_logprobs, want_entropy, [&] {
    return call("rlhf_fast::_ppo_loss_forward", ppo_loss_forward, logprobs, old_logprobs, advantages, mask, weights,
                ref_logprobs, entropy, num_tokens, number, clip_low, clip_high, dual_clip, kl_coef, kl_estimator,
                entropy_coef, want_logprobs, want_entropy);
  });
  return {out[0], out[1]};
}

void define_ppo_loss(torch::Library& m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const std::string arguments =
      "Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? weights, Tensor? ref_logprobs, "
      "Tensor? entropy, Tensor? num_tokens, float? number, float clip_low, float clip_high, float dual_clip, "
      "float kl_coef, int kl_estimator, float entropy_coef";
  m.def(("ppo_loss(" + arguments + ") -> (Tensor, Tensor)").c_str(), &ppo_loss, tags);
  m.def(("_ppo_loss_forward(" + arguments + ", bool want_logprobs, bool want_entropy) -> "
         "(Tensor, Tensor, Tensor, Tensor)").c_str(), tags);
}

void implement_ppo_loss_cpu(torch::Library& m) { m.impl("_ppo_loss_forward", &ppo_loss_forward); }
void implement_ppo_loss_meta(torch::Library& m) { m.impl("_ppo_loss_forward", &ppo_loss_forward_meta); }

}  // namespace
}  // namespace rlhf_fast
