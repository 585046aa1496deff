// gae for PyTorch. No autograd: rewards and values of a rollout are data, and rlhf_fast/ops/gae.py refuses others.
#pragma once

#include "../cpu/gae.h"
#include "scan.h"

namespace rlhf_fast {
namespace {

void check_gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, const OptionalTensor& last_values) {
  check_scan_mask("gae", mask);
  check_scan_input("gae", "rewards", rewards, mask, 2);
  check_scan_input("gae", "values", values, mask, 2);
  if (last_values) check_scan_input("gae", "last_values", *last_values, mask, 1);
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, double gamma,
                               double lam, const OptionalTensor& last_values) {
  check_gae(rewards, values, mask, last_values);
  const auto type = scan_type({rewards, values, last_values});
  const Tensor r = scan_input(rewards, type), v = scan_input(values, type), m = scan_input(mask, at::kBool);
  const Tensor last = last_values ? scan_input(*last_values, type) : Tensor();
  const Tensor advantages = at::empty(mask.sizes(), v.options()), returns = at::empty(mask.sizes(), v.options());
  Gae args;
  fill_scan(args, m, v, last, gamma, lam, advantages, returns);
  args.rewards = rows_of(r);
  for_each_row(args, mask.size(0), RLHF_FAST_KERNEL(isa(), gae));
  return {advantages, returns};
}

std::tuple<Tensor, Tensor> gae_meta(const Tensor& rewards, const Tensor& values, const Tensor& mask, double, double,
                                    const OptionalTensor& last_values) {
  check_gae(rewards, values, mask, last_values);
  const auto options = values.options().dtype(scan_type({rewards, values, last_values}));
  return {at::empty_symint(mask.sym_sizes(), options), at::empty_symint(mask.sym_sizes(), options)};
}

void define_gae(torch::Library& m) {
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, Tensor? last_values) -> "
      "(Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

void implement_gae_cpu(torch::Library& m) { m.impl("gae", &gae); }

void implement_gae_meta(torch::Library& m) { m.impl("gae", &gae_meta); }

}  // namespace
}  // namespace rlhf_fast
