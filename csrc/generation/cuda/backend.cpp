#include "backend.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "inputs.h"
#include "memory.h"
#include "pass.h"

namespace rlhf_fast {
namespace {

// Batches of up to this many tokens are made up to a power of two, so that a few CUDA graphs serve all.
constexpr int64_t kLargestGraph = 64;

int64_t graph_size(int64_t tokens) {
  int64_t size = 1;
  while (size < tokens) size *= 2;
  return size;
}

// Takes memory for several arrays at once. Each starts at a multiple of 256 bytes.
class Arrays {
 public:
  template <typename T>
  void add(T*& array, int64_t bytes) {
    places_.push_back({reinterpret_cast<void**>(&array), bytes_});
    bytes_ += (bytes + 255) / 256 * 256;
  }
  void allocate(const Torch& torch, bool on_host) {
    char* const memory = reinterpret_cast<char*>(torch.allocate(bytes_, on_host));
    for (const auto& [array, at] : places_) *array = memory + at;
  }

 private:
  std::vector<std::pair<void**, int64_t>> places_;
  int64_t bytes_ = 0;
};

// What draws take in and give, [max_rows] each, one after another so that one copy takes them all.
struct DrawArrays {
  uint64_t* seed;
  uint64_t** seen;  // of the sets on the device
  uint32_t *sample, *position;
  int32_t *place, *zero;  // of the token that the draw follows; 0
  // from here on given
  int32_t* token;
  float *logprob, *sampled_logprob;

  static int64_t bytes_in(int64_t rows) { return rows * 32; }
  static int64_t bytes_out(int64_t rows) { return rows * 12; }

  DrawArrays(void* memory, int64_t rows) {
    char* next = static_cast<char*>(memory);
    const auto place_next = [&](auto& array) {
      using Array = std::remove_reference_t<decltype(array)>;
      array = reinterpret_cast<Array>(next);
      next += rows * int64_t(sizeof *array);
    };
    place_next(seed), place_next(seen), place_next(sample), place_next(position), place_next(place), place_next(zero);
    place_next(token), place_next(logprob), place_next(sampled_logprob);
  }
};

class CudaBackend : public Backend {
 public:
  CudaBackend(const Model& model, const CudaSettings& settings)
      : Backend(model),
        settings_(settings),
        stream_(reinterpret_cast<cuda::Stream>(settings.stream)),
        words_((model.vocabulary + 63) / 64),
        pool_(reinterpret_cast<char*>(settings.pool)) {
    const Inputs::Limits limits{settings.max_rows, settings.max_tokens, pages_for(settings.max_positions)};
    const CudaPass::Sizes sizes = CudaPass::sizes(model, settings.max_rows, settings.max_positions);
    const int64_t tokens = settings.max_tokens, rows = settings.max_rows;
    const int64_t sets = settings.penalty ? rows * words_ * 8 : 0;
    CudaPass::Buffers buffers{};
    void *host_inputs, *inputs, *host_draws, *draws;
    Arrays device, host;
    device.add(buffers.hidden, tokens * sizes.hidden);
    device.add(buffers.normed, tokens * sizes.normed);
    device.add(buffers.projected, tokens * sizes.projected);
    device.add(buffers.attended, tokens * sizes.attended);
    device.add(buffers.inner, tokens * sizes.inner);
    device.add(buffers.out, tokens * sizes.hidden);
    device.add(buffers.attention_out, model.parallel ? tokens * sizes.hidden : 0);
    device.add(buffers.scratch, sizes.scratch);
    device.add(buffers.logits, sizes.logits);
    device.add(buffers.workspace, sizes.workspace);
    device.add(inputs, Inputs::bytes(limits));
    device.add(draws, DrawArrays::bytes_in(rows) + DrawArrays::bytes_out(rows));
    device.add(sets_, sets);
    device.add(stop_ids_, model.vocabulary * 4);
    host.add(host_inputs, Inputs::bytes(limits));
    host.add(host_draws, DrawArrays::bytes_in(rows) + DrawArrays::bytes_out(rows));
    host.add(host_sets_, sets);
    device.allocate(settings.torch, false);
    host.allocate(settings.torch, true);

    const CacheLayout layout = model.cache_layout();
    const cuda::PagedCache cache{cuda::Type(model.type), pool_, layout.layers, layout.heads, layout.head_size};
    pass_ = std::make_unique<CudaPass>(model, cache, buffers, settings_.torch);
    inputs_ = std::make_unique<Inputs>(limits, host_inputs, inputs, pool_, page_bytes());
    draws_ = std::make_unique<DrawArrays>(draws, rows);
    host_draws_ = std::make_unique<DrawArrays>(host_draws, rows);
    logits_ = buffers.logits;
    scratch_ = buffers.scratch;
  }

  // Kernels and copies may still be at work on memory that is about to be given back.
  ~CudaBackend() override {
    try {
      cuda::wait(stream_);
    } catch (const std::runtime_error&) {  // told where it was found
    }
  }

  int64_t page_bytes() const override {
    const CacheLayout layout = model().cache_layout();
    return 2 * layout.layers * layout.heads * kPageTokens * layout.head_size * layout.element();
  }
  int64_t page_limit() const override { return settings_.pages; }

  char* new_page() override {
    if (given_ == settings_.pages) throw std::bad_alloc();
    return pool_ + given_++ * page_bytes();
  }

  void copy_page(const char* from, char* to) override { cuda::copy(to, from, page_bytes(), stream_); }

  bool run(const std::vector<Span>& spans, const std::function<bool()>& interrupted) override {
    if (interrupted()) return false;
    cuda::wait(stream_);  // a pass may have been followed by no draw
    int64_t tokens = 0, longest = 0;
    for (const Span& span : spans) {
      tokens += span.count;
      longest = std::max(longest, span.count);
    }
    if (longest == 1 && tokens <= kLargestGraph && settings_.torch.replay) {
      const int64_t size = graph_size(tokens);
      if (size <= settings_.max_tokens) return run_graph(spans, size);
    }
    const PassInputs inputs = inputs_->send(spans, tokens, model().attention_cap == 0, stream_);
    const bool finished = pass_->run(inputs, inputs.positions, interrupted, stream_);
    check_launches();
    return finished;
  }

  void draw(const std::vector<Draw>& draws, const SamplingOptions& options, Sampled* drawn) override {
    const int64_t count = int64_t(draws.size());
    if (count == 0) return;
    send(draws);
    if (!stop_ids_sent_) {
      cuda::copy(stop_ids_, options.stop_ids, options.stop_count * 4, stream_);
      stop_ids_sent_ = true;
    }
    const cuda::SamplingOptions sampling{.temperature = options.temperature,
                                         .top_p = options.top_p,
                                         .min_p = options.min_p,
                                         .repetition_penalty = options.repetition_penalty,
                                         .top_k = options.top_k,
                                         .min_tokens = options.min_tokens,
                                         .stop_ids = stop_ids_,
                                         .stop_count = options.stop_count};
    const DrawArrays& on = *draws_;
    for (int64_t begin = 0; begin < count; begin += kLogitsRows) {
      const int64_t rows = std::min(count - begin, kLogitsRows);
      pass_->logits(on.place + begin, on.zero + begin, rows, stream_);
      cuda::sample(logits_, rows, model().vocabulary, model().logit_scale, model().logit_cap, sampling,
                   {on.seed + begin, on.sample + begin, on.position + begin,
                    settings_.penalty ? on.seen + begin : nullptr, on.token + begin, on.logprob + begin,
                    on.sampled_logprob + begin},
                   scratch_, stream_);
    }
    check_launches();
    cuda::copy(host_draws_->token, on.token, DrawArrays::bytes_out(settings_.max_rows), stream_);
    cuda::wait(stream_);
    for (int64_t i = 0; i < count; ++i) {
      drawn[i] = {host_draws_->token[i], host_draws_->logprob[i], host_draws_->sampled_logprob[i]};
    }
  }

 private:
  static int64_t pages_for(int64_t positions) { return (positions + kPageTokens - 1) / kPageTokens; }

  // A graph's launches hold the bound of all positions instead of this pass's, and go to the stream that it records.
  bool run_graph(const std::vector<Span>& spans, int64_t size) {
    const PassInputs inputs = inputs_->send(spans, size, false, stream_);
    const auto launch = [&](uintptr_t stream) {
      pass_->run(inputs, settings_.max_positions, [] { return false; }, reinterpret_cast<cuda::Stream>(stream));
    };
    if (!settings_.torch.replay(size, launch)) launch(settings_.stream);
    check_launches();
    return true;
  }

  void send(const std::vector<Draw>& draws) {
    const DrawArrays& host = *host_draws_;
    for (size_t i = 0; i < draws.size(); ++i) {
      const Draw& draw = draws[i];
      host.seed[i] = draw.place.seed;
      host.sample[i] = draw.place.sample;
      host.position[i] = draw.place.position;
      host.place[i] = inputs_->place(draw.after);
      host.zero[i] = 0;
      host.seen[i] = nullptr;
      if (!draw.seen) continue;
      host.seen[i] = sets_ + int64_t(i) * words_;
      std::copy_n(draw.seen, words_, host_sets_ + int64_t(i) * words_);
    }
    cuda::copy(draws_->seed, host.seed, DrawArrays::bytes_in(settings_.max_rows), stream_);
    if (settings_.penalty) cuda::copy(sets_, host_sets_, int64_t(draws.size()) * words_ * 8, stream_);
  }

  static void check_launches() {
    if (const char* const error = cuda::last_error()) throw std::runtime_error(std::string("CUDA: ") + error);
  }

  const CudaSettings settings_;
  const cuda::Stream stream_;
  const int64_t words_;  // of a set of tokens
  char* const pool_;
  int64_t given_ = 0;  // pages
  std::unique_ptr<CudaPass> pass_;
  std::unique_ptr<Inputs> inputs_;
  std::unique_ptr<DrawArrays> draws_, host_draws_;
  uint64_t *sets_ = nullptr, *host_sets_ = nullptr;
  int32_t* stop_ids_ = nullptr;
  bool stop_ids_sent_ = false;
  float* logits_ = nullptr;
  void* scratch_ = nullptr;
};

}  // namespace
}  // namespace rlhf_fast

rlhf_fast::Backend* rlhf_fast_cuda_backend(const rlhf_fast::Model& model, const rlhf_fast::CudaSettings& settings) {
  return new rlhf_fast::CudaBackend(model, settings);
}

const char* rlhf_fast_cuda_problem() { return rlhf_fast::cuda::problem(); }
