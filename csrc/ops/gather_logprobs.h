// gather_logprobs for PyTorch: checks, forward and backward on tensors, autograd. The rows are csrc/cpu's work.
#pragma once

#include "../cpu/gather_logprobs.h"
#include "common.h"

namespace rlhf_fast {
namespace {

void check_gather_logprobs(const Tensor& logits, const Tensor& ids, double temperature) {
  const auto type = logits.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                   "gather_logprobs: logits must be float32, float64, bfloat16 or float16; got ", type);
  TORCH_CHECK_VALUE(logits.dim() > 0 && logits.sym_size(-1) > 0,
                    "gather_logprobs: logits must have shape [..., V] with V > 0; got ", logits.sym_sizes());
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt,
                   "gather_logprobs: ids must be int64 or int32; got ", ids.scalar_type());
  const auto rows = logits.sym_sizes().slice(0, logits.dim() - 1);
  TORCH_CHECK_VALUE(ids.sym_sizes() == rows, "gather_logprobs: ids must have shape ", rows, ", logits' without V; got ",
                    ids.sym_sizes());
  TORCH_CHECK_VALUE(ids.device() == logits.device(), "gather_logprobs: ids must be on ", logits.device(),
                    " like logits; got ", ids.device());
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature),
                    "gather_logprobs: temperature must be above 0 and finite; got ", temperature);
}

void check_ids(const Tensor& ids, int64_t vocabulary, int64_t ignore_index) {
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    TORCH_CHECK_VALUE(id[i] == ignore_index || (id[i] >= 0 && id[i] < vocabulary),
                      "gather_logprobs: ids must be from 0 to ", vocabulary - 1, ", unless equal to ignore_index (",
                      ignore_index, "); got ", id[i], " in row ", i);
  }
}

// What both passes are given. The tensors must outlive it.
GatherLogprobs arguments(const Tensor& logits, const Tensor& ids, double temperature, int64_t ignore_index) {
  return {
      .type = logits_type(logits),
      .logits = logits.const_data_ptr(),
      .layout = *row_layout(logits),
      .vocabulary = logits.size(-1),
      .ids = ids.const_data_ptr<int64_t>(),
      .ignore_index = ignore_index,
      .temperature = temperature,
  };
}

// (logprobs, entropy (empty unless asked for), what the backward pass needs: [rows, 2])
std::tuple<Tensor, Tensor, Tensor> gather_logprobs_forward(const Tensor& logits, const Tensor& ids, double temperature,
                                                           bool return_entropy, int64_t ignore_index) {
  check_gather_logprobs(logits, ids, temperature);
  const Tensor x = row_layout(logits) ? logits : logits.contiguous();
  const Tensor id = ids.to(at::kLong).contiguous();
  check_ids(id, x.size(-1), ignore_index);
  const Tensor logprobs = at::empty(id.sizes(), real_options(x));
  const Tensor entropy = at::empty(return_entropy ? id.sizes() : at::IntArrayRef(0), real_options(x));
  const Tensor stats = at::empty({id.numel(), 2}, real_options(x));

  const GatherLogprobsForward args{
      arguments(x, id, temperature, ignore_index),
      logprobs.mutable_data_ptr(),
      return_entropy ? entropy.mutable_data_ptr() : nullptr,
      stats.mutable_data_ptr(),
  };
  const auto kernel = RLHF_FAST_KERNEL(isa(), gather_logprobs_forward);
  at::parallel_for(0, id.numel(), grain(args.vocabulary), [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
  });
  return {logprobs, entropy, stats};
}

std::tuple<Tensor, Tensor, Tensor> gather_logprobs_forward_meta(const Tensor& logits, const Tensor& ids,
                                                                double temperature, bool return_entropy,
                                                                int64_t /*ignore_index*/) {
  check_gather_logprobs(logits, ids, temperature);
  const auto options = real_options(logits);
  return {at::empty_symint(ids.sym_sizes(), options),
          return_entropy ? at::empty_symint(ids.sym_sizes(), options) : at::empty({0}, options),
          at::empty_symint({ids.sym_numel(), 2}, options)};
}

// Writes the gradient to `grad`, which may be the logits.
void gather_logprobs_backward_into(const Tensor& grad, const OptionalTensor& grad_logprobs,
                                   const OptionalTensor& grad_entropy, const Tensor& logits, const Tensor& ids,
                                   const Tensor& stats, const Tensor& entropy, double temperature,
                                   int64_t ignore_index) {
  const Tensor x = row_layout(logits) ? logits : logits.contiguous();
  const Tensor id = ids.to(at::kLong).contiguous();
  const Tensor g = grad_logprobs ? grad_logprobs->contiguous() : Tensor();
  const Tensor h = grad_entropy ? grad_entropy->contiguous() : Tensor();
  const GatherLogprobsBackward args{
      arguments(x, id, temperature, ignore_index),
      stats.const_data_ptr(),
      h.defined() ? entropy.const_data_ptr() : nullptr,
      g.defined() ? g.const_data_ptr() : nullptr,
      h.defined() ? h.const_data_ptr() : nullptr,
      grad.mutable_data_ptr(),
      *row_layout(grad),
  };
  const auto kernel = RLHF_FAST_KERNEL(isa(), gather_logprobs_backward);
  at::parallel_for(0, id.numel(), grain(args.vocabulary), [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
  });
}

Tensor gather_logprobs_backward(const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                                const Tensor& logits, const Tensor& ids, const Tensor& stats, const Tensor& entropy,
                                double temperature, int64_t ignore_index) {
  const Tensor grad = empty_large(logits.sizes(), logits.options());
  gather_logprobs_backward_into(grad, grad_logprobs, grad_entropy, logits, ids, stats, entropy, temperature,
                                ignore_index);
  return grad;
}

Tensor gather_logprobs_backward_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& logits, const Tensor&,
                                     const Tensor&, const Tensor&, double, int64_t) {
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

// The gradient over the logits themselves, for ops that made these and need them no more.
void gather_logprobs_backward_(const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy, Tensor& logits,
                               const Tensor& ids, const Tensor& stats, const Tensor& entropy, double temperature,
                               int64_t ignore_index) {
  TORCH_CHECK(logits.numel() == 0 || rows_are_disjoint(logits),
              "gather_logprobs: logits whose rows share memory cannot be overwritten");
  gather_logprobs_backward_into(logits, grad_logprobs, grad_entropy, logits, ids, stats, entropy, temperature,
                                ignore_index);
}

void gather_logprobs_backward_meta_(const OptionalTensor&, const OptionalTensor&, Tensor&, const Tensor&, const Tensor&,
                                    const Tensor&, double, int64_t) {}

struct GatherLogprobsFunction : torch::autograd::Function<GatherLogprobsFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& logits,
                                                const Tensor& ids, double temperature, bool return_entropy,
                                                int64_t ignore_index, bool inplace_backward) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [logprobs, entropy, stats] = call("rlhf_fast::_gather_logprobs_forward", gather_logprobs_forward, logits, ids,
                                           temperature, return_entropy, ignore_index);
    ctx->save_for_backward({logits, ids, stats, entropy});
    ctx->saved_data["temperature"] = temperature;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["inplace_backward"] = inplace_backward;
    ctx->set_materialize_grads(false);
    if (!return_entropy) ctx->mark_non_differentiable({entropy});
    return {logprobs, entropy};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "gather_logprobs has no second derivative (create_graph=True)");
    const auto saved = ctx->get_saved_variables();
    const Tensor& logits = saved[0];
    const double temperature = ctx->saved_data["temperature"].toDouble();
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const auto optional = [](const Tensor& grad) { return grad.defined() ? OptionalTensor(grad) : std::nullopt; };
    const OptionalTensor g = optional(grads[0]), h = optional(grads[1]);

    Tensor grad;
    // While a graph is traced nothing may be overwritten behind the tracer's back: permission to do so is not used.
    if (ctx->saved_data["inplace_backward"].toBool() && !at::isTensorSubclassLike(logits) && logits.is_cpu() &&
        rows_are_disjoint(logits)) {
      grad = logits.detach();
      gather_logprobs_backward_into(grad, g, h, logits, saved[1], saved[2], saved[3], temperature, ignore_index);
      torch::autograd::impl::bump_version(logits);  // whoever else saved them gets an error, not a wrong gradient
    } else {
      grad = call("rlhf_fast::_gather_logprobs_backward", gather_logprobs_backward, g, h, logits, saved[1], saved[2],
                  saved[3], temperature, ignore_index);
    }
    return {grad, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> gather_logprobs(const Tensor& logits, const Tensor& ids, double temperature,
                                           bool return_entropy, int64_t ignore_index, bool inplace_backward) {
  const auto out =
      GatherLogprobsFunction::apply(logits, ids, temperature, return_entropy, ignore_index, inplace_backward);
  return {out[0], out[1]};
}

void define_gather_logprobs(torch::Library& m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "gather_logprobs(Tensor logits, Tensor ids, float temperature, bool return_entropy, int ignore_index, "
      "bool inplace_backward) -> (Tensor, Tensor)",
      &gather_logprobs, tags);
  m.def(
      "_gather_logprobs_forward(Tensor logits, Tensor ids, float temperature, bool return_entropy, int ignore_index) "
      "-> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "_gather_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor ids, Tensor stats, "
      "Tensor entropy, float temperature, int ignore_index) -> Tensor",
      tags);
  m.def(
      "_gather_logprobs_backward_(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor(a!) logits, Tensor ids, "
      "Tensor stats, Tensor entropy, float temperature, int ignore_index) -> ()",
      tags);
}

void implement_gather_logprobs_cpu(torch::Library& m) {
  m.impl("_gather_logprobs_forward", &gather_logprobs_forward);
  m.impl("_gather_logprobs_backward", &gather_logprobs_backward);
  m.impl("_gather_logprobs_backward_", &gather_logprobs_backward_);
}

void implement_gather_logprobs_meta(torch::Library& m) {
  m.impl("_gather_logprobs_forward", &gather_logprobs_forward_meta);
  m.impl("_gather_logprobs_backward", &gather_logprobs_backward_meta);
  m.impl("_gather_logprobs_backward_", &gather_logprobs_backward_meta_);
}

}  // namespace
}  // namespace rlhf_fast
