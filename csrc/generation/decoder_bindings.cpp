// The model's description and the step loop, for Python. Addresses are those of data_ptr(), 0 for none: whoever calls
// keeps the tensors alive and has checked types and shapes.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <omp.h>

#include <chrono>
#include <memory>
#include <optional>
#include <utility>

#include "adapter.h"
#include "bindings.h"
#include "cpu_backend.h"
#include "cuda/backend.h"
#include "decoder.h"

namespace py = pybind11;

namespace rlhf_fast {
namespace {

using namespace py::literals;

// How often the loop lets Python run its signal handlers.
constexpr std::chrono::milliseconds kBetweenSignals{20};

// True when the flag is set; throws what a signal handler raises, KeyboardInterrupt for one.
class Interrupted {
 public:
  explicit Interrupted(uintptr_t abort) : abort_(pointer<int32_t>(abort)) {}

  bool operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ >= kBetweenSignals) {
      last_ = now;
      py::gil_scoped_acquire gil;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    return __atomic_load_n(abort_, __ATOMIC_RELAXED) != 0;
  }

 private:
  const int32_t* abort_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

using Stopped = std::function<std::vector<bool>(const std::vector<int64_t>&, const std::vector<int32_t>&)>;

DecodeStats decode_at(Backend& backend, const std::vector<std::vector<int32_t>>& prompts,
                      const std::vector<Request>& requests, const Options& options, int threads,
                      uintptr_t abort, std::optional<Stopped> stopped, int64_t width, uintptr_t tokens, uintptr_t mask,
                      uintptr_t logprobs, uintptr_t sampled_logprobs, uintptr_t finish) {
  const Output output{width,
                      pointer<int64_t>(tokens),
                      pointer<bool>(mask),
                      pointer<float>(logprobs),
                      pointer<float>(sampled_logprobs),
                      pointer<Finish>(finish)};
  Callbacks callbacks{Interrupted(abort), {}};
  if (stopped) callbacks.stopped = *std::move(stopped);  // takes the GIL itself
  omp_set_num_threads(threads);
  py::gil_scoped_release released;
  return decode(backend, prompts, requests, options, callbacks, output);
}

std::unique_ptr<Backend> cuda_backend(uintptr_t make, const Model& model, const CudaSettings& settings) {
  return std::unique_ptr<Backend>(pointer<decltype(rlhf_fast_cuda_backend)>(make)(model, settings));
}

void bind_backends(py::module_& m) {
  py::class_<Backend>(m, "Backend");
  py::class_<CpuBackend, Backend>(m, "CpuBackend").def(py::init<const Model&>(), "model"_a, py::keep_alive<1, 2>());
  py::class_<CudaSettings>(m, "CudaSettings")
      .def(py::init<>())
      .def_readwrite("max_rows", &CudaSettings::max_rows)
      .def_readwrite("max_tokens", &CudaSettings::max_tokens)
      .def_readwrite("max_positions", &CudaSettings::max_positions)
      .def_readwrite("pool", &CudaSettings::pool)
      .def_readwrite("pages", &CudaSettings::pages)
      .def_readwrite("penalty", &CudaSettings::penalty)
      .def_readwrite("stream", &CudaSettings::stream)
      .def_property("allocate", nullptr, [](CudaSettings& s, decltype(Torch::allocate) f) { s.torch.allocate = f; })
      .def_property("product", nullptr, [](CudaSettings& s, decltype(Torch::product) f) { s.torch.product = f; })
      .def_property("attend", nullptr, [](CudaSettings& s, decltype(Torch::attend) f) { s.torch.attend = f; })
      .def_property("replay", nullptr, [](CudaSettings& s, decltype(Torch::replay) f) { s.torch.replay = f; });
  m.def("cuda_backend", &cuda_backend, "make"_a, "model"_a, "settings"_a, py::keep_alive<0, 2>(),
        "The backend that rlhf_fast_cuda_backend gives, the function of the CUDA library at that address.");
}

void bind_model(py::module_& m) {
  py::enum_<Norm::Kind>(m, "NormKind")
      .value("none", Norm::Kind::none)
      .value("rms", Norm::Kind::rms)
      .value("layer", Norm::Kind::layer);
  py::enum_<Activation>(m, "Activation")
      .value("relu", Activation::relu)
      .value("silu", Activation::silu)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("gelu_new", Activation::gelu_new);

  py::class_<Norm>(m, "Norm")
      .def(py::init([](Norm::Kind kind, uintptr_t weight, uintptr_t bias, float epsilon, bool round_before_weight) {
             return Norm{kind, pointer<const float>(weight), pointer<const float>(bias), epsilon, round_before_weight};
           }),
           "kind"_a, "weight"_a, "bias"_a, "epsilon"_a, "round_before_weight"_a);
  py::class_<Rotary>(m, "Rotary")
      .def(py::init([](uintptr_t cos, uintptr_t sin, int64_t size, bool interleaved) {
             return Rotary{pointer<const float>(cos), pointer<const float>(sin), size, interleaved};
           }),
           "cos"_a = 0, "sin"_a = 0, "size"_a = 0, "interleaved"_a = false);
  py::class_<Embedding>(m, "Embedding")
      .def(py::init([](uintptr_t weight, WeightType type, int64_t row_stride, float scale) {
             return Embedding{pointer<const void>(weight), type, row_stride, scale};
           }),
           "weight"_a = 0, "type"_a = WeightType::float32, "row_stride"_a = 0, "scale"_a = 1);
  py::class_<Adapter, std::shared_ptr<Adapter>> adapter(m, "Adapter");
  py::class_<Linear>(m, "Linear")
      .def(py::init([](uintptr_t weight, WeightType type, int64_t out, int64_t in, int64_t row_stride, bool transposed,
                       uintptr_t bias, std::shared_ptr<Adapter> adapter) {
             return Linear{pointer<const void>(weight), type, out, in, row_stride, transposed,
                           pointer<const void>(bias), std::move(adapter)};
           }),
           "weight"_a, "type"_a, "out"_a, "in"_a, "row_stride"_a, "transposed"_a, "bias"_a, "adapter"_a = py::none());
  adapter.def(py::init<Linear, Linear, float>(), "down"_a, "up"_a, "scale"_a);
  py::class_<Heads>(m, "Heads")
      .def(py::init<>())
      .def_readwrite("query_heads", &Heads::query_heads)
      .def_readwrite("key_value_heads", &Heads::key_value_heads)
      .def_readwrite("size", &Heads::size)
      .def_readwrite("queries", &Heads::queries)
      .def_readwrite("keys", &Heads::keys)
      .def_readwrite("values", &Heads::values)
      .def_readwrite("query_stride", &Heads::query_stride)
      .def_readwrite("key_value_stride", &Heads::key_value_stride);
  py::class_<Layer>(m, "Layer")
      .def(py::init<>())
      .def_readwrite("attention_norm", &Layer::attention_norm)
      .def_readwrite("attention_out_norm", &Layer::attention_out_norm)
      .def_readwrite("mlp_norm", &Layer::mlp_norm)
      .def_readwrite("mlp_out_norm", &Layer::mlp_out_norm)
      .def_readwrite("query_norm", &Layer::query_norm)
      .def_readwrite("key_norm", &Layer::key_norm)
      .def_readwrite("attention_in", &Layer::attention_in)
      .def_readwrite("attention_out", &Layer::attention_out)
      .def_readwrite("mlp_in", &Layer::mlp_in)
      .def_readwrite("mlp_out", &Layer::mlp_out)
      .def_readwrite("rotary", &Layer::rotary)
      .def_readwrite("query_scale", &Layer::query_scale)
      .def_readwrite("attention_scale", &Layer::attention_scale)
      .def_readwrite("window", &Layer::window);
  py::class_<Model>(m, "Model")
      .def(py::init<>())
      .def_readwrite("hidden", &Model::hidden)
      .def_readwrite("vocabulary", &Model::vocabulary)
      .def_readwrite("embedding", &Model::embedding)
      .def_readwrite("embedding_out", &Model::embedding_out)
      .def_readwrite("positions", &Model::positions)
      .def_readwrite("position_offset", &Model::position_offset)
      .def_readwrite("heads", &Model::heads)
      .def_readwrite("layers", &Model::layers)
      .def_readwrite("activation", &Model::activation)
      .def_readwrite("gated", &Model::gated)
      .def_readwrite("parallel", &Model::parallel)
      .def_readwrite("branches_first", &Model::branches_first)
      .def_readwrite("residual_scale", &Model::residual_scale)
      .def_readwrite("attention_cap", &Model::attention_cap)
      .def_readwrite("eager", &Model::eager)
      .def_readwrite("final_norm", &Model::final_norm)
      .def_readwrite("hidden_out", &Model::hidden_out)
      .def_readwrite("head", &Model::head)
      .def_readwrite("logit_scale", &Model::logit_scale)
      .def_readwrite("logit_cap", &Model::logit_cap)
      .def_readwrite("type", &Model::type);
}

}  // namespace

void bind_decoder(py::module_& m) {
  bind_model(m);
  py::class_<Request>(m, "Request")
      .def(py::init<int64_t, int64_t, uint64_t, uint32_t>(), "prompt"_a, "limit"_a, "seed"_a, "sample"_a);
  py::class_<SamplingOptions>(m, "SamplingOptions")
      .def(py::init<>())
      .def_readwrite("temperature", &SamplingOptions::temperature)
      .def_readwrite("top_p", &SamplingOptions::top_p)
      .def_readwrite("min_p", &SamplingOptions::min_p)
      .def_readwrite("repetition_penalty", &SamplingOptions::repetition_penalty)
      .def_readwrite("top_k", &SamplingOptions::top_k)
      .def_readwrite("min_tokens", &SamplingOptions::min_tokens);
  py::class_<Options>(m, "Options")
      .def(py::init<>())
      .def_readwrite("sampling", &Options::sampling)
      .def_readwrite("stop_ids", &Options::stop_ids)
      .def_readwrite("max_rows", &Options::max_rows)
      .def_readwrite("prefill_tokens", &Options::prefill_tokens)
      .def_readwrite("cache_bytes", &Options::cache_bytes);
  py::class_<DecodeStats>(m, "DecodeStats")
      .def_readonly("steps", &DecodeStats::steps)
      .def_readonly("prompt_tokens", &DecodeStats::prompt_tokens)
      .def_readonly("evictions", &DecodeStats::evictions)
      .def_readonly("peak_cache_bytes", &DecodeStats::peak_cache_bytes)
      .def_readonly("looks", &DecodeStats::looks)
      .def_readonly("finite", &DecodeStats::finite);
  bind_backends(m);
  m.def("decode", &decode_at, "backend"_a, "prompts"_a, "requests"_a, "options"_a, "threads"_a, "abort"_a, "stopped"_a,
        "width"_a, "tokens"_a, "mask"_a, "logprobs"_a, "sampled_logprobs"_a, "finish"_a,
        "Completes the requests; results go to row i of the tensors. abort: an int32 that ends the call when not 0.");
}

}  // namespace rlhf_fast
