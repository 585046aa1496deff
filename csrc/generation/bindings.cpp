// The decoder's face towards Python. Tensors come as the integers of data_ptr(): whoever calls keeps them alive and has
// checked types and shapes.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings.h"
#include "linear.h"
#include "sampler.h"

namespace py = pybind11;

namespace rlhf_fast {
namespace {

std::string instruction_set() {
  return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "baseline";
}

void linear_at(uintptr_t weight, WeightType type, int64_t out, int64_t in, int64_t row_stride, bool transposed,
               uintptr_t bias, uintptr_t x, int64_t rows, int64_t x_stride, uintptr_t y, int64_t y_stride) {
  const Linear layer{pointer<const void>(weight), type, out, in, row_stride, transposed, pointer<const void>(bias)};
  std::vector<uint32_t> scratch;
  linear(layer, pointer<const float>(x), rows, x_stride, pointer<float>(y), y_stride, scratch);
}

py::tuple sample_at(uintptr_t logits, int64_t vocabulary, double temperature, double top_p, double min_p,
                    double repetition_penalty, int64_t top_k, int64_t min_tokens, uintptr_t stop_ids,
                    int64_t stop_count, uint64_t seed, uint32_t sample_number, uint32_t position, uintptr_t seen) {
  const SamplingOptions options{.temperature = temperature,
                                .top_p = top_p,
                                .min_p = min_p,
                                .repetition_penalty = repetition_penalty,
                                .top_k = top_k,
                                .min_tokens = min_tokens,
                                .stop_ids = pointer<const int32_t>(stop_ids),
                                .stop_count = stop_count};
  const Sampled drawn = sample(pointer<const float>(logits), vocabulary, options, {seed, sample_number, position},
                               pointer<const uint64_t>(seen));
  return py::make_tuple(drawn.token, drawn.logprob, drawn.sampled_logprob);
}

}  // namespace

PYBIND11_MODULE(_generation, m) {
  using namespace py::literals;
  m.doc() = "The decoder of rlhf_fast, in C++.";
  m.def("instruction_set", &instruction_set, "The instruction set that the kernels run on: baseline, avx2 or avx512.");

  py::enum_<WeightType>(m, "WeightType")
      .value("float32", WeightType::float32)
      .value("bfloat16", WeightType::bfloat16)
      .value("float16", WeightType::float16);

  m.def("linear", &linear_at, "weight"_a, "type"_a, "out"_a, "in"_a, "row_stride"_a, "transposed"_a, "bias"_a, "x"_a,
        "rows"_a, "x_stride"_a, "y"_a, "y_stride"_a, py::call_guard<py::gil_scoped_release>(),
        "y = x . W^T + bias (or x . W when transposed); addresses, 0 for no bias, strides in elements.");

  m.def("sample", &sample_at, "logits"_a, "vocabulary"_a, "temperature"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a,
        "top_k"_a, "min_tokens"_a, "stop_ids"_a, "stop_count"_a, "seed"_a, "sample"_a, "position"_a, "seen"_a,
        "(token, log-prob, log-prob in what it was drawn from) of one row, as sampler.h says; addresses of float32 "
        "logits, int32 stop_ids and a bit a token in 64-bit words for seen.");

  bind_decoder(m);
}

}  // namespace rlhf_fast
