// masked_whiten for PyTorch: moments, and the normalisation by moments, which may be those of several ranks together.
#pragma once

#include <vector>

#include "../cpu/masked_whiten.h"
#include "common.h"

namespace rlhf_fast {
namespace {

void check_masked_whiten(const Tensor& x, const Tensor& mask) {
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), "masked_whiten: x must hold floating-point numbers; got ",
                   x.scalar_type());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "masked_whiten: mask must be bool; got ", mask.scalar_type());
  TORCH_CHECK_VALUE(x.sym_sizes() == mask.sym_sizes(), "masked_whiten: x must have shape ", mask.sym_sizes(),
                    ", like mask; got ", x.sym_sizes());
  TORCH_CHECK_VALUE(x.device() == mask.device(), "masked_whiten: x must be on ", mask.device(), "; got ", x.device());
}

Tensor whiten_input(const Tensor& x) { return x.to(real_options(x).dtype()).contiguous(); }

MaskedNumbers masked_numbers(const Tensor& x, const Tensor& mask) {
  return {x.scalar_type() == at::kDouble, x.numel(), x.const_data_ptr(),
          static_cast<const uint8_t*>(mask.const_data_ptr())};
}

// [3] float64: count, mean, sum of squared deviations
Tensor masked_moments(const Tensor& x, const Tensor& mask) {
  check_masked_whiten(x, mask);
  const Tensor numbers = whiten_input(x), m = mask.contiguous();
  const MaskedNumbers args = masked_numbers(numbers, m);
  std::vector<Moments> blocks((args.size + kWhitenBlock - 1) / kWhitenBlock);
  const auto kernel = RLHF_FAST_KERNEL(isa(), block_moments);
  at::parallel_for(0, int64_t(blocks.size()), grain(kWhitenBlock), [&](int64_t begin, int64_t end) {
    kernel(args, blocks.data(), begin, end);
  });
  const Moments all = RLHF_FAST_KERNEL(isa(), merge)(blocks.data(), int64_t(blocks.size()));
  const Tensor out = at::empty({3}, x.options().dtype(at::kDouble));
  double* const p = out.mutable_data_ptr<double>();
  p[0] = all.count;
  p[1] = all.mean;
  p[2] = all.squares;
  return out;
}

Tensor masked_moments_meta(const Tensor& x, const Tensor& mask) {
  check_masked_whiten(x, mask);
  return at::empty({3}, x.options().dtype(at::kDouble));
}

void check_moments(const Tensor& x, const Tensor& mask, const Tensor& moments) {
  check_masked_whiten(x, mask);
  TORCH_CHECK_TYPE(moments.scalar_type() == at::kDouble, "masked_whiten: moments must be float64; got ",
                   moments.scalar_type());
  TORCH_CHECK_VALUE(moments.dim() == 1 && moments.sym_size(0) == 3, "masked_whiten: moments must have shape [3]; got ",
                    moments.sym_sizes());
}

Tensor masked_normalise(const Tensor& x, const Tensor& mask, const Tensor& moments, bool shift_mean, double eps) {
  check_moments(x, mask, moments);
  const Tensor numbers = whiten_input(x), m = mask.contiguous(), all = moments.contiguous();
  const Tensor out = at::empty(numbers.sizes(), numbers.options());
  const double* const p = all.const_data_ptr<double>();
  const double mean = p[1], scale = 1 / std::sqrt(p[2] / std::max(p[0], 1.0) + eps);
  const MaskedNumbers args = masked_numbers(numbers, m);
  const Whitening whitening{mean, scale, shift_mean ? 0 : mean, out.mutable_data_ptr()};
  const auto kernel = RLHF_FAST_KERNEL(isa(), whiten);
  at::parallel_for(0, args.size, grain(1), [&](int64_t begin, int64_t end) { kernel(args, whitening, begin, end); });
  return out;
}

Tensor masked_normalise_meta(const Tensor& x, const Tensor& mask, const Tensor& moments, bool, double) {
  check_moments(x, mask, moments);
  return at::empty_symint(x.sym_sizes(), real_options(x));
}

void define_masked_whiten(torch::Library& m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("_masked_moments(Tensor x, Tensor mask) -> Tensor", tags);
  m.def("_masked_normalise(Tensor x, Tensor mask, Tensor moments, bool shift_mean, float eps) -> Tensor", tags);
}

void implement_masked_whiten_cpu(torch::Library& m) {
  m.impl("_masked_moments", &masked_moments);
  m.impl("_masked_normalise", &masked_normalise);
}

void implement_masked_whiten_meta(torch::Library& m) {
  m.impl("_masked_moments", &masked_moments_meta);
  m.impl("_masked_normalise", &masked_normalise_meta);
}

}  // namespace
}  // namespace rlhf_fast
