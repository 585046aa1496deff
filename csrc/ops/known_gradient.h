// Losses over tokens whose forward pass finds the gradient too: what ppo_loss and value_loss share.
#pragma once

#include <ATen/ops/mul.h>

#include "../cpu/token_blocks.h"
#include "common.h"

namespace rlhf_fast {
namespace {

// The gradient that the forward pass found, times the loss's own. On the CPU that is 1 as a rule, and then no pass.
Tensor chain(const Tensor& gradient, const Tensor& grad_loss) {
  if (!gradient.defined() || !grad_loss.defined()) return Tensor();
  const bool known = grad_loss.is_cpu() && !at::isTensorSubclassLike(grad_loss);
  return known && grad_loss.item<double>() == 1 ? gradient : at::mul(gradient, grad_loss);
}

// Tokens as the kernels take them: contiguous, float or double.
Tensor tokens_of(const Tensor& x, at::ScalarType type) { return x.to(type).contiguous(); }
Tensor tokens_of(const OptionalTensor& x, at::ScalarType type) { return x ? tokens_of(*x, type) : Tensor(); }

template <typename T>
const T* data_or_null(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

// A gradient to be filled when it is wanted, else a tensor of no elements, as operators always return tensors.
Tensor gradient_of(const Tensor& x, bool wanted, const at::TensorOptions& options) {
  return wanted ? at::empty_symint(x.sym_sizes(), options) : at::empty({0}, options);
}

template <typename T>
T* filled_or_null(const Tensor& gradient, bool wanted) {
  return wanted ? gradient.mutable_data_ptr<T>() : nullptr;
}

at::ScalarType real_type(std::initializer_list<const OptionalTensor> tensors) {
  for (const auto& tensor : tensors) {
    if (tensor && tensor->scalar_type() == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

// The divisor: the given one (a tensor is at least 1), else the masked tokens, at least 1.
double token_count(const Tensor& mask, const OptionalTensor& num_tokens, std::optional<double> number) {
  if (number) return *number;
  if (num_tokens) return std::max(num_tokens->item<double>(), 1.0);
  const bool* const inside = mask.const_data_ptr<bool>();
  int64_t count = 0, i = 0;
  for (; i + 8 <= mask.numel(); i += 8) {  // eight bytes of 0 or 1 are as many bits
    uint64_t eight;
    memcpy(&eight, inside + i, sizeof eight);
    count += __builtin_popcountll(eight);
  }
  for (; i < mask.numel(); ++i) count += inside[i];
  return double(std::max<int64_t>(count, 1));
}

// Runs kernel(args, first block, end) over all blocks; returns the blocks' sums added up in their order, the largest
// instead for the column `by_max`.
template <typename Args, typename Kernel>
std::vector<double> sum_blocks(Kernel kernel, Args args, int columns, int by_max = -1) {
  const int64_t blocks = (args.tokens + kTokenBlock - 1) / kTokenBlock;
  std::vector<double> sums(blocks * columns), total(columns);
  args.sums = sums.data();
  at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  for (int64_t i = 0; i < blocks; ++i) {
    for (int j = 0; j < columns; ++j) {
      const double sum = sums[i * columns + j];
      total[j] = j == by_max ? std::max(total[j], sum) : total[j] + sum;
    }
  }
  return total;
}

// The numbers as a tensor [n], or 0-d.
Tensor tensor_of(const std::vector<double>& numbers, at::IntArrayRef sizes, const at::TensorOptions& options) {
  const Tensor out = at::empty(sizes, options);
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (out.scalar_type() == at::kDouble) out.mutable_data_ptr<double>()[i] = numbers[i];
    else out.mutable_data_ptr<float>()[i] = float(numbers[i]);
  }
  return out;
}

void check_tokens(const char* op, std::initializer_list<const OptionalTensor> tensors, const Tensor& mask) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, op, ": mask must be bool; got ", mask.scalar_type());
  for (const auto& x : tensors) {
    TORCH_CHECK_VALUE(!x || x->sym_sizes() == mask.sym_sizes(), op, ": every per-token argument must have mask's shape ",
                      mask.sym_sizes(), "; got ", x->sym_sizes());
  }
}

}  // namespace
}  // namespace rlhf_fast
