// value_loss for PyTorch: the pass over tokens, autograd. The blocks are csrc/cpu's work.
#pragma once

#include "../cpu/value_loss.h"
#include "known_gradient.h"

namespace rlhf_fast {
namespace {

// (value loss 0-d, value_clip_fraction 0-d, the loss's gradient by values, of no elements where not wanted)
std::tuple<Tensor, Tensor, Tensor> value_loss_forward(const Tensor& values, const Tensor& old_values,
                                                      const Tensor& returns, const Tensor& mask,
                                                      const OptionalTensor& num_tokens, std::optional<double> number,
                                                      double cliprange_value, bool want_values) {
  check_tokens("value_loss", {values, old_values, returns}, mask);
  const auto type = real_type({values, old_values, returns});
  const auto options = values.options().dtype(type);
  const Tensor inside = mask.contiguous(), v = tokens_of(values, type), old = tokens_of(old_values, type),
               target = tokens_of(returns, type);
  const double count = token_count(inside, num_tokens, number);
  const Tensor gradient = gradient_of(values, want_values, options);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const ValueLoss<T> all{
        .tokens = v.numel(),
        .values = data_or_null<T>(v),
        .old_values = data_or_null<T>(old),
        .returns = data_or_null<T>(target),
        .mask = inside.const_data_ptr<bool>(),
        .cliprange_value = cliprange_value,
        .num_tokens = count,
        .grad_values = filled_or_null<T>(gradient, want_values),
        .sums = nullptr,
    };
    const auto kernel = [](const ValueLoss<T>& args, int64_t begin, int64_t end) {
      RLHF_FAST_CALL(isa(), value_loss, args, begin, end);
    };
    return sum_blocks(kernel, all, kValueLossSums);
  };
  const auto sums = type == at::kDouble ? run(double()) : run(float());
  return {tensor_of({sums[kValueLoss] / count}, {}, options), tensor_of({sums[kValueClipped] / count}, {}, options),
          gradient};
}

std::tuple<Tensor, Tensor, Tensor> value_loss_forward_meta(const Tensor& values, const Tensor& old_values,
                                                           const Tensor& returns, const Tensor& mask,
                                                           const OptionalTensor&, std::optional<double>, double,
                                                           bool want_values) {
  check_tokens("value_loss", {values, old_values, returns}, mask);
  const auto options = values.options().dtype(real_type({values, old_values, returns}));
  return {at::empty({}, options), at::empty({}, options), gradient_of(values, want_values, options)};
}

struct ValueLossFunction : torch::autograd::Function<ValueLossFunction> {
  // `run` finds (loss, share of clipped tokens, gradient).
  template <typename Forward>
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& /*values*/,
                                                const Forward& run) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, clip_fraction, gradient] = run();
    ctx->save_for_backward({gradient});
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({clip_fraction});
    return {loss, clip_fraction};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "value_loss has no second derivative (create_graph=True)");
    return {chain(ctx->get_saved_variables()[0], grads[0]), Tensor()};
  }
};

std::tuple<Tensor, Tensor> value_loss(const Tensor& values, const Tensor& old_values, const Tensor& returns,
                                      const Tensor& mask, const OptionalTensor& num_tokens,
                                      std::optional<double> number, double cliprange_value) {
  const bool want_values = at::GradMode::is_enabled() && values.requires_grad();
  const auto out = ValueLossFunction::apply(values, [&] {
    return call("rlhf_fast::_value_loss_forward", value_loss_forward, values, old_values, returns, mask, num_tokens,
                number, cliprange_value, want_values);
  });
  return {out[0], out[1]};
}

void define_value_loss(torch::Library& m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const std::string arguments =
      "Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor? num_tokens, float? number, "
      "float cliprange_value";
  m.def(("value_loss(" + arguments + ") -> (Tensor, Tensor)").c_str(), &value_loss, tags);
  m.def(("_value_loss_forward(" + arguments + ", bool want_values) -> (Tensor, Tensor, Tensor)").c_str(), tags);
}

void implement_value_loss_cpu(torch::Library& m) { m.impl("_value_loss_forward", &value_loss_forward); }
void implement_value_loss_meta(torch::Library& m) { m.impl("_value_loss_forward", &value_loss_forward_meta); }

}  // namespace
}  // namespace rlhf_fast
