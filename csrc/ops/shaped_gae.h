// shaped_gae for PyTorch. No autograd: a rollout is data, and rlhf_fast/ops/shaped_gae.py refuses what is not.
#pragma once

#include "../cpu/shaped_gae.h"
#include "scan.h"

namespace rlhf_fast {
namespace {

void check_shaped_gae(const Tensor& scores, const Tensor& logprobs, const OptionalTensor& ref_logprobs,
                      const Tensor& values, const Tensor& mask, double kl_coef, int64_t kl_estimator,
                      const OptionalTensor& last_values) {
  check_scan_mask("shaped_gae", mask);
  check_scan_input("shaped_gae", "scores", scores, mask, 1);
  check_scan_input("shaped_gae", "logprobs", logprobs, mask, 2);
  if (ref_logprobs) check_scan_input("shaped_gae", "ref_logprobs", *ref_logprobs, mask, 2);
  check_scan_input("shaped_gae", "values", values, mask, 2);
  if (last_values) check_scan_input("shaped_gae", "last_values", *last_values, mask, 1);
  TORCH_CHECK_VALUE(kl_coef == 0 || ref_logprobs, "shaped_gae: kl_coef ", kl_coef, " needs ref_logprobs");
  TORCH_CHECK_VALUE(kl_estimator >= 1 && kl_estimator <= 3, "shaped_gae: kl_estimator must be 1, 2 or 3; got ",
                    kl_estimator);
}

std::tuple<Tensor, Tensor, Tensor> shaped_gae(const Tensor& scores, const Tensor& logprobs,
                                              const OptionalTensor& ref_logprobs, const Tensor& values,
                                              const Tensor& mask, double kl_coef, int64_t kl_estimator, double gamma,
                                              double lam, std::optional<double> clip_score,
                                              const OptionalTensor& last_values) {
  check_shaped_gae(scores, logprobs, ref_logprobs, values, mask, kl_coef, kl_estimator, last_values);
  const auto type = scan_type({scores, logprobs, ref_logprobs, values, last_values});
  const Tensor s = scan_input(scores, type), p = scan_input(logprobs, type), v = scan_input(values, type);
  const Tensor ref = ref_logprobs ? scan_input(*ref_logprobs, type) : Tensor();
  const Tensor last = last_values ? scan_input(*last_values, type) : Tensor();
  const Tensor m = scan_input(mask, at::kBool);
  const Tensor advantages = at::empty(mask.sizes(), v.options()), returns = at::empty(mask.sizes(), v.options());
  const Tensor rewards = at::empty(mask.sizes(), v.options());
  ShapedGae args;
  fill_scan(args, m, v, last, gamma, lam, advantages, returns);
  args.scores = s.const_data_ptr();
  args.logprobs = rows_of(p);
  args.ref_logprobs = ref.defined() ? rows_of(ref) : RowsOf{nullptr, 0};
  args.kl_coef = kl_coef;
  args.kl_estimator = int(kl_estimator);
  args.clip_score = clip_score.value_or(HUGE_VAL);
  args.rewards = rewards.mutable_data_ptr();
  for_each_row(args, mask.size(0), RLHF_FAST_KERNEL(isa(), shaped_gae));
  return {advantages, returns, rewards};
}

std::tuple<Tensor, Tensor, Tensor> shaped_gae_meta(const Tensor& scores, const Tensor& logprobs,
                                                   const OptionalTensor& ref_logprobs, const Tensor& values,
                                                   const Tensor& mask, double kl_coef, int64_t kl_estimator, double,
                                                   double, std::optional<double>, const OptionalTensor& last_values) {
  check_shaped_gae(scores, logprobs, ref_logprobs, values, mask, kl_coef, kl_estimator, last_values);
  const auto options = values.options().dtype(scan_type({scores, logprobs, ref_logprobs, values, last_values}));
  return {at::empty_symint(mask.sym_sizes(), options), at::empty_symint(mask.sym_sizes(), options),
          at::empty_symint(mask.sym_sizes(), options)};
}

void define_shaped_gae(torch::Library& m) {
  m.def(
      "shaped_gae(Tensor scores, Tensor logprobs, Tensor? ref_logprobs, Tensor values, Tensor mask, float kl_coef, "
      "int kl_estimator, float gamma, float lam, float? clip_score, Tensor? last_values) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

void implement_shaped_gae_cpu(torch::Library& m) { m.impl("shaped_gae", &shaped_gae); }

void implement_shaped_gae_meta(torch::Library& m) { m.impl("shaped_gae", &shaped_gae_meta); }

}  // namespace
}  // namespace rlhf_fast
