// The operators that turn rows of logits into the gradient of their loss, in place. Autograd is Python's,
// rlhf_fast/ops/logits_ppo_loss.py; the rows are csrc/cpu's work.
#pragma once

#include "../cpu/logits_ppo_loss.h"
#include "common.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kPPOColumns = 6, kCrossEntropyColumns = 3;

// One number for each row of logits, as doubles: next to a row of logits that is nothing.
Tensor per_row(const char* name, const Tensor& tensor, const Tensor& logits) {
  TORCH_CHECK_VALUE(tensor.sizes() == logits.sizes().slice(0, logits.dim() - 1), name, " must have shape ",
                    logits.sizes().slice(0, logits.dim() - 1), ", logits' without V; got ", tensor.sizes());
  return tensor.to(at::kDouble).contiguous();
}

Tensor per_row(const char* name, const OptionalTensor& tensor, const Tensor& logits) {
  return tensor ? per_row(name, *tensor, logits) : Tensor();
}

const double* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<double>() : nullptr; }

// What both losses are given, in the form that the kernels want it, and room for what they find.
struct LossArguments {
  Tensor ids, mask, weights, found;

  LossArguments(const Tensor& logits, const Tensor& ids_, const Tensor& mask_, const OptionalTensor& weights_,
                int64_t columns) {
    const auto type = logits.scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                     "logits must be float32, float64, bfloat16 or float16; got ", type);
    TORCH_CHECK_VALUE(logits.dim() > 0 && logits.size(-1) > 0, "logits must have shape [..., V] with V > 0; got ",
                      logits.sizes());
    TORCH_CHECK_VALUE(logits.numel() == 0 || rows_are_disjoint(logits),
                      "logits' rows must be contiguous and apart in memory; got strides ", logits.strides());
    const auto rows = logits.sizes().slice(0, logits.dim() - 1);
    TORCH_CHECK_TYPE(mask_.scalar_type() == at::kBool, "mask must be bool; got ", mask_.scalar_type());
    TORCH_CHECK_TYPE(ids_.scalar_type() == at::kLong || ids_.scalar_type() == at::kInt,
                     "ids must be int64 or int32; got ", ids_.scalar_type());
    TORCH_CHECK_VALUE(ids_.sizes() == rows, "ids must have shape ", rows, ", logits' without V; got ", ids_.sizes());
    TORCH_CHECK_VALUE(mask_.sizes() == rows, "mask must have shape ", rows, ", logits' without V; got ", mask_.sizes());
    ids = ids_.to(at::kLong).contiguous();
    mask = mask_.contiguous();
    weights = per_row("weights", weights_, logits);
    found = at::empty({columns, ids.numel()}, logits.options().dtype(at::kDouble));

    const int64_t vocabulary = logits.size(-1), *const id = ids.const_data_ptr<int64_t>();
    const bool* const used = mask.const_data_ptr<bool>();
    for (int64_t i = 0; i < ids.numel(); ++i) {
      TORCH_CHECK_VALUE(!used[i] || (id[i] >= 0 && id[i] < vocabulary), "ids must be from 0 to ", vocabulary - 1,
                        ", unless masked out; got ", id[i], " in row ", i);
    }
  }

  LogitsLoss plain(const Tensor& logits, const Tensor& num_tokens, double temperature) const {
    return {
        .type = logits_type(logits),
        .logits = logits.mutable_data_ptr(),
        .layout = *row_layout(logits),
        .vocabulary = logits.size(-1),
        .ids = ids.const_data_ptr<int64_t>(),
        .mask = mask.const_data_ptr<bool>(),
        .weights = data(weights),
        .temperature = temperature,
        .tokens = num_tokens.item<double>(),
        .found = found.mutable_data_ptr<double>(),
        .columns = ids.numel(),
    };
  }
};

template <typename Args>
void run_rows(void (*kernel)(const Args&, int64_t, int64_t), const Args& args) {
  at::parallel_for(0, args.columns, grain(args.vocabulary), [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
  });
}

Tensor logits_ppo_loss(const Tensor& logits, const Tensor& ids, const Tensor& old_logprobs, const Tensor& advantages,
                       const Tensor& mask, const OptionalTensor& weights, const OptionalTensor& ref_logprobs,
                       const Tensor& num_tokens, double temperature, double clip_low, double clip_high,
                       double dual_clip, double kl_coef, int64_t kl_estimator, double entropy_coef) {
  const LossArguments given(logits, ids, mask, weights, kPPOColumns);
  const Tensor old = per_row("old_logprobs", old_logprobs, logits);
  const Tensor advantage = per_row("advantages", advantages, logits);
  const Tensor ref = per_row("ref_logprobs", ref_logprobs, logits);
  if (logits.numel() > 0) {
    run_rows(RLHF_FAST_KERNEL(isa(), logits_ppo_loss),
             LogitsPPOLoss{given.plain(logits, num_tokens, temperature), data(old), data(advantage), data(ref),
                           {clip_low, clip_high, dual_clip, kl_coef, int(kl_estimator), entropy_coef}});
  }
  return given.found;
}

Tensor logits_cross_entropy(const Tensor& logits, const Tensor& ids, const Tensor& mask, const OptionalTensor& weights,
                            const Tensor& num_tokens, double temperature) {
  const LossArguments given(logits, ids, mask, weights, kCrossEntropyColumns);
  if (logits.numel() > 0) {
    run_rows(RLHF_FAST_KERNEL(isa(), logits_cross_entropy),
             LogitsCrossEntropy{given.plain(logits, num_tokens, temperature)});
  }
  return given.found;
}

Tensor found_meta(const Tensor& ids, int64_t columns) {
  return at::empty_symint({columns, ids.sym_numel()}, ids.options().dtype(at::kDouble));
}

void define_logits_ppo_loss(torch::Library& m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "_logits_ppo_loss_(Tensor(a!) logits, Tensor ids, Tensor old_logprobs, Tensor advantages, Tensor mask, "
      "Tensor? weights, Tensor? ref_logprobs, Tensor num_tokens, float temperature, float clip_low, float clip_high, "
      "float dual_clip, float kl_coef, int kl_estimator, float entropy_coef) -> Tensor",
      tags);
  m.def(
      "_logits_cross_entropy_(Tensor(a!) logits, Tensor ids, Tensor mask, Tensor? weights, Tensor num_tokens, "
      "float temperature) -> Tensor",
      tags);
}

void implement_logits_ppo_loss_cpu(torch::Library& m) {
  m.impl("_logits_ppo_loss_", &logits_ppo_loss);
  m.impl("_logits_cross_entropy_", &logits_cross_entropy);
}

void implement_logits_ppo_loss_meta(torch::Library& m) {
  m.impl("_logits_ppo_loss_",
         [](const Tensor&, const Tensor& ids, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
            const OptionalTensor&, const Tensor&, double, double, double, double, double, int64_t,
            double) { return found_meta(ids, kPPOColumns); });
  m.impl("_logits_cross_entropy_", [](const Tensor&, const Tensor& ids, const Tensor&, const OptionalTensor&,
                                      const Tensor&, double) { return found_meta(ids, kCrossEntropyColumns); });
}

}  // namespace
}  // namespace rlhf_fast
