// The face of the C++ ops towards PyTorch: schemas, argument checks, autograd. The work is in csrc/cpu/.
//
// An op is made of a forward and a backward operator (names with an underscore), each with a Meta version that knows
// only shapes. That is all that torch.compile needs to trace it.
//
// PyTorch's headers are what makes this file slow to compile: include few of them, and never torch/extension.h.
#define AT_PER_OPERATOR_HEADERS
#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/gather_logprobs.h"
#include "cpu/isa.h"

namespace rlhf_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- the machine ----------------------------------------------------------------------------------------------------

// The best set that PyTorch uses (the environment variable ATEN_CPU_CAPABILITY lowers it) and that this CPU has whole.
Isa choose_isa() {
#if defined(__x86_64__)
  const std::string aten = at::get_cpu_capability();
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  __builtin_cpu_init();
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && aten == "AVX512") return Isa::avx512;
  if (avx2 && (aten == "AVX512" || aten == "AVX2")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

std::string instruction_set() {
  return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "baseline";
}

// How many threads of the operating system share a parallel_for. One on a machine of many cores: OpenMP is off.
int64_t num_threads() {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  at::parallel_for(0, 64 * at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  return int64_t(threads.size());
}

// Fresh memory is cleared by the operating system page by page at the first touch, which for a gradient of the logits'
// size costs more than computing it. Large pages make that several times cheaper.
Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor out = at::empty(sizes, options);
#if defined(__linux__)
  if (out.nbytes() >= size_t(4) << 20) {
    const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
    const auto start = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
    const auto begin = (start + page - 1) / page * page, end = (start + out.nbytes()) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: where it fails all goes on
  }
#endif
  return out;
}

// ---- gather_logprobs ------------------------------------------------------------------------------------------------

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

// Where the rows are; none when they are not contiguous in themselves or lie in more than two levels of strides.
std::optional<RowLayout> row_layout(const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  if (logits.size(last) > 1 && logits.stride(last) != 1) return std::nullopt;
  int levels = 0;
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};  // from the inside out
  for (int64_t d = last - 1; d >= 0; --d) {
    if (logits.size(d) == 1) continue;
    if (levels > 0 && logits.stride(d) == strides[levels - 1] * sizes[levels - 1]) {
      sizes[levels - 1] *= logits.size(d);
    } else if (levels < 2) {
      sizes[levels] = logits.size(d);
      strides[levels++] = logits.stride(d);
    } else {
      return std::nullopt;
    }
  }
  return RowLayout{std::max<int64_t>(sizes[0], 1), strides[1], strides[0]};
}

// Whether each row can be overwritten: rows of an expanded tensor share their memory.
bool rows_are_disjoint(const Tensor& logits) {
  const auto layout = row_layout(logits);
  if (!layout || logits.numel() == 0) return false;
  const int64_t vocabulary = logits.size(-1), inner = layout->inner, outer = logits.numel() / vocabulary / inner;
  const int64_t a = inner > 1 ? layout->inner_stride : vocabulary, b = outer > 1 ? layout->outer_stride : inner * a;
  return (a >= vocabulary && b >= (inner - 1) * a + vocabulary) ||
         (b >= vocabulary && a >= (outer - 1) * b + vocabulary);
}

// What both passes are given. The tensors must outlive it.
GatherLogprobs arguments(const Tensor& logits, const Tensor& ids, double temperature, int64_t ignore_index) {
  const auto type = logits.scalar_type();
  return {
      .type = type == at::kFloat    ? LogitsType::float32
              : type == at::kDouble ? LogitsType::float64
              : type == at::kHalf   ? LogitsType::float16
                                    : LogitsType::bfloat16,
      .logits = logits.const_data_ptr(),
      .layout = *row_layout(logits),
      .vocabulary = logits.size(-1),
      .ids = ids.const_data_ptr<int64_t>(),
      .ignore_index = ignore_index,
      .temperature = temperature,
  };
}

at::TensorOptions real_options(const Tensor& logits) {
  return logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// Rows that are worth a thread of their own.
int64_t grain(int64_t vocabulary) { return std::max<int64_t>(1, 16384 / vocabulary); }

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

// Calls the operator of that name through PyTorch's dispatcher, so that whatever traces or wraps tensors sees it.
template <typename F, typename... Args>
auto call(const char* name, F* /*signature*/, Args&&... args) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>().call(std::forward<Args>(args)...);
}

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

}  // namespace

TORCH_LIBRARY(rlhf_fast, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("instruction_set() -> str", &instruction_set);
  m.def("num_threads() -> int", &num_threads);

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
}

TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("_gather_logprobs_forward", &gather_logprobs_forward);
  m.impl("_gather_logprobs_backward", &gather_logprobs_backward);
}

TORCH_LIBRARY_IMPL(rlhf_fast, Meta, m) {
  m.impl("_gather_logprobs_forward", &gather_logprobs_forward_meta);
  m.impl("_gather_logprobs_backward", &gather_logprobs_backward_meta);
}

}  // namespace rlhf_fast
