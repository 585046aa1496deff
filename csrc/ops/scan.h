// What gae and shaped_gae share on tensors: checks, types, rows.
#pragma once

#include "../cpu/scan.h"
#include "common.h"

namespace rlhf_fast {
namespace {

void check_scan_mask(const char* op, const Tensor& mask) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, op, ": mask must be bool; got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.dim() == 2, op, ": mask must have shape [B, T]; got ", mask.sym_sizes());
}

void check_scan_input(const char* op, const char* name, const Tensor& x, const Tensor& mask, int64_t dims) {
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), op, ": ", name, " must hold floating-point numbers; got ",
                   x.scalar_type());
  const auto wanted = mask.sym_sizes().slice(0, dims);
  TORCH_CHECK_VALUE(x.sym_sizes() == wanted, op, ": ", name, " must have shape ", wanted, "; got ", x.sym_sizes());
  TORCH_CHECK_VALUE(x.device() == mask.device(), op, ": ", name, " must be on ", mask.device(), "; got ", x.device());
}

// float64 if any of them is, else float32.
at::ScalarType scan_type(std::initializer_list<OptionalTensor> inputs) {
  for (const auto& x : inputs) {
    if (x && x->scalar_type() == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

// In that type and with rows that are contiguous in themselves: copied only if it has to be.
Tensor scan_input(const Tensor& x, at::ScalarType type) {
  const Tensor y = x.to(type);
  return y.dim() == 2 && y.stride(1) == 1 ? y : y.contiguous();
}

RowsOf rows_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0)}; }

// The tensors must outlive it; last_values may be undefined.
void fill_scan(Scan& args, const Tensor& mask, const Tensor& values, const Tensor& last_values, double gamma, double lam,
               const Tensor& advantages, const Tensor& returns) {
  args.float64 = values.scalar_type() == at::kDouble;
  args.columns = mask.size(1);
  args.mask = rows_of(mask);
  args.values = rows_of(values);
  args.last_values = last_values.defined() ? last_values.const_data_ptr() : nullptr;
  args.gamma = gamma;
  args.lam = lam;
  args.advantages = advantages.mutable_data_ptr();
  args.returns = returns.mutable_data_ptr();
}

// Threads share the rows by whole vectors of the widest instruction set.
template <typename Args>
void for_each_row(const Args& args, int64_t rows, void (*kernel)(const Args&, int64_t, int64_t)) {
  constexpr int64_t kGroup = 16;
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  at::parallel_for(0, groups, grain(kGroup * std::max<int64_t>(args.columns, 1)), [&](int64_t begin, int64_t end) {
    kernel(args, begin * kGroup, std::min(end * kGroup, rows));
  });
}

}  // namespace
}  // namespace rlhf_fast
