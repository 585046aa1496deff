#include "forward.h"

#include <omp.h>

#include <algorithm>

#include "../cpu/choose_isa.h"
#include "adapter.h"

namespace rlhf_fast {
namespace {

// Numbers read or written that are worth the start of the threads.
constexpr int64_t kWorthThreads = 1 << 14;

// Tokens of a prompt whose attention is one piece of work.
constexpr int64_t kTokensAtOnce = 16;

// Outputs of a product that is done in pieces come in multiples of this: whole vectors, whole panels.
constexpr int64_t kOutputsAtOnce = 64;

// Calls use(token) for each token, on all threads if that is worth it.
template <typename Use>
void for_each(int64_t tokens, int64_t size, Use use) {
#pragma omp parallel for schedule(static) if (tokens > 1 && tokens * size > kWorthThreads)
  for (int64_t token = 0; token < tokens; ++token) use(token);
}

// The size of a row that holds the layers' outputs side by side.
int64_t linear_row(std::span<const Linear> layers) {
  int64_t size = 0;
  for (const Linear& layer : layers) size += layer.out;
  return size;
}

void grow(std::vector<float>& buffer, int64_t size) {
  if (int64_t(buffer.size()) < size) buffer.resize(size);
}

// Some tokens of a span for one key-value head.
struct Task {
  const Span* span;
  int64_t first_row;  // of the span, in the pass
  int64_t token;      // of the span
  int64_t count;
};

}  // namespace

void Forward::run(const std::vector<Span>& spans, const std::function<bool()>& interrupted) {
  interrupted_ = &interrupted;
  work_ = kBetweenLooks;  // a look comes first
  tokens_ = positions_ = 0;
  for (const Span& span : spans) {
    tokens_ += span.count;
    positions_ = std::max(positions_, span.position + span.count);
  }
  const int64_t size = model_.hidden;
  grow(hidden_, tokens_ * size);
  grow(normed_, tokens_ * size);
  grow(out_, tokens_ * size);
  if (model_.parallel) grow(attention_out_, tokens_ * size);
  embed(spans);
  for (size_t i = 0; i < model_.layers.size(); ++i) {
    const Layer& layer = model_.layers[i];
    norm(layer.attention_norm, hidden_, normed_);
    attention(layer, int64_t(i), spans);
    if (model_.parallel) {
      norm(layer.mlp_norm, hidden_, normed_);
      std::swap(out_, attention_out_);
      mlp(layer);
      add(layer.attention_out_norm, attention_out_, model_.branches_first ? out_ : hidden_);
      add(layer.mlp_out_norm, out_, hidden_);
      continue;
    }
    add(layer.attention_out_norm, out_, hidden_);
    norm(layer.mlp_norm, hidden_, normed_);
    mlp(layer);
    add(layer.mlp_out_norm, out_, hidden_);
  }
}

// Before each piece of work.
void Forward::look(int64_t work) {
  if (work_ + work > kBetweenLooks) {
    if ((*interrupted_)()) throw Interrupted();
    work_ = 0;
  }
  work_ += work;
}

void Forward::embed(const std::vector<Span>& spans) {
  const int64_t size = model_.hidden;
  const bool direct = model_.embedding_out.empty();
  const int64_t width = direct ? size : model_.embedding_out[0].in;
  grow(normed_, tokens_ * width);
  float* x = direct ? hidden_.data() : normed_.data();
  for (const Span& span : spans) {
    for (int64_t i = 0; i < span.count; ++i, x += width) {
      RLHF_FAST_KERNEL(isa(), embed)(model_.type, model_.embedding, span.tokens[i], x, width, false);
    }
  }
  if (!direct) {
    project(model_.embedding_out, normed_.data(), tokens_, hidden_.data());
    RLHF_FAST_KERNEL(isa(), round_to)(model_.type, hidden_.data(), tokens_ * size);
  }
  if (!model_.positions.weight) return;
  x = hidden_.data();
  for (const Span& span : spans) {
    for (int64_t i = 0; i < span.count; ++i, x += size) {
      const int64_t position = span.position + i + model_.position_offset;
      RLHF_FAST_KERNEL(isa(), embed)(model_.type, model_.positions, position, x, size, true);
    }
  }
}

const float* Forward::logits(const std::vector<int64_t>& tokens) {
  const int64_t size = model_.hidden, count = int64_t(tokens.size()), vocabulary = model_.vocabulary;
  grow(logits_, count * vocabulary);
  for (int64_t i = 0; i < count; ++i) {
    const float* const hidden = &hidden_[tokens[i] * size];
    RLHF_FAST_KERNEL(isa(), normalise)(model_.type, model_.final_norm, hidden, &normed_[i * size], size);
  }
  const float* x = normed_.data();
  for (const Linear& layer : model_.hidden_out) {
    grow(projected_, count * layer.out);
    project({&layer, 1}, x, count, projected_.data());
    RLHF_FAST_KERNEL(isa(), round_to)(model_.type, projected_.data(), count * layer.out);
    x = projected_.data();
  }
  product({&model_.head, 1}, x, count, logits_.data());
  for_each(count, vocabulary, [&](int64_t i) {
    RLHF_FAST_KERNEL(isa(), scale_and_cap)(&logits_[i * vocabulary], model_.logit_scale, model_.logit_cap, vocabulary);
  });
  return logits_.data();
}

// out_ = the attention's output of normed_
void Forward::attention(const Layer& layer, int64_t index, const std::vector<Span>& spans) {
  const Heads& heads = model_.heads;
  const int64_t row = linear_row(layer.attention_in), group = heads.query_heads / heads.key_value_heads;
  const int64_t attended = heads.query_heads * heads.size;
  grow(projected_, tokens_ * row);
  grow(attended_, tokens_ * attended);
  project(layer.attention_in, normed_.data(), tokens_, projected_.data());

  std::vector<Task> tasks;
  int64_t first = 0;
  for (const Span& span : spans) {
    for (int64_t token = 0; token < span.count; token += kTokensAtOnce) {
      tasks.push_back({&span, first, token, std::min(kTokensAtOnce, span.count - token)});
    }
    first += span.count;
  }

  // Keys and values of all tokens go to their pages before the first query looks.
  const auto append_heads = [&](const Task& task, int64_t head) {
    for (int64_t i = task.token; i < task.token + task.count; ++i) {
      const int64_t position = task.span->position + i;
      float* const part = &projected_[(task.first_row + i) * row];
      const auto prepare = [&](const Norm& norm, float* x) {
        RLHF_FAST_KERNEL(isa(), round_to)(model_.type, x, heads.size);
        if (norm.kind != Norm::Kind::none) RLHF_FAST_KERNEL(isa(), normalise)(model_.type, norm, x, x, heads.size);
        if (layer.rotary.cos) RLHF_FAST_KERNEL(isa(), rotate)(model_.type, layer.rotary, position, x);
      };
      for (int64_t q = head * group; q < (head + 1) * group; ++q) {
        float* const query = part + heads.queries + q * heads.query_stride;
        prepare(layer.query_norm, query);
        if (layer.query_scale != 1) {
          RLHF_FAST_KERNEL(isa(), scale_and_cap)(query, layer.query_scale, 0, heads.size);
          RLHF_FAST_KERNEL(isa(), round_to)(model_.type, query, heads.size);
        }
      }
      float* const key = part + heads.keys + head * heads.key_value_stride;
      prepare(layer.key_norm, key);
      RLHF_FAST_KERNEL(isa(), append)
      (layout_, task.span->pages[position / kPageTokens] + layout_.offset(index, head), position % kPageTokens, key,
       part + heads.values + head * heads.key_value_stride);
    }
  };
  const auto attend_head = [&](const Task& task, int64_t head, float* scratch) {
    const int64_t first_row = task.first_row + task.token;
    const Attention attention{
        .layout = layout_,
        .offset = layout_.offset(index, head),
        .pages = task.span->pages.data(),
        .position = task.span->position + task.token,
        .tokens = task.count,
        .window = layer.window,
        .scale = layer.attention_scale,
        .cap = model_.attention_cap,
        .eager = model_.eager,
        .group = group,
        .queries = &projected_[first_row * row + heads.queries + head * group * heads.query_stride],
        .query_stride = row,
        .query_head_stride = heads.query_stride,
        .outputs = &attended_[first_row * attended + head * group * heads.size],
        .output_stride = attended,
    };
    RLHF_FAST_KERNEL(isa(), attend)(attention, scratch);
    for (int64_t i = 0; i < task.count; ++i) {
      RLHF_FAST_KERNEL(isa(), round_to)(model_.type, attention.outputs + i * attended, group * heads.size);
    }
  };

  const int64_t scratch = attention_scratch(positions_, heads.size);
  grow(scratch_, omp_get_max_threads() * scratch);
  const int64_t pieces = int64_t(tasks.size()) * heads.key_value_heads;
  const bool worth = pieces > 1 && tokens_ * heads.query_heads * heads.size * positions_ > kWorthThreads;
  for (int64_t begin = 0, end = 0; begin < pieces; begin = end) {
    int64_t work = 0;
    for (; end < pieces; ++end) {
      const Task& task = tasks[end / heads.key_value_heads];
      const int64_t seen = task.span->position + task.token + task.count;
      const int64_t more = 2 * task.count * seen * group * heads.size;
      if (end > begin && work + more > kBetweenLooks) break;
      work += more;
    }
    look(work);
#pragma omp parallel if (worth)
    {
      if (begin == 0) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pieces; ++i) append_heads(tasks[i / heads.key_value_heads], i % heads.key_value_heads);
      }
      float* const own = &scratch_[omp_get_thread_num() * scratch];
#pragma omp for schedule(dynamic)
      for (int64_t i = begin; i < end; ++i) {
        attend_head(tasks[i / heads.key_value_heads], i % heads.key_value_heads, own);
      }
    }
  }
  project({&layer.attention_out, 1}, attended_.data(), tokens_, out_.data());
}

// out_ = the MLP's output of normed_.
void Forward::mlp(const Layer& layer) {
  const int64_t row = linear_row(layer.mlp_in), inner = layer.mlp_out.in;
  grow(projected_, tokens_ * row);
  grow(inner_, tokens_ * inner);
  project(layer.mlp_in, normed_.data(), tokens_, projected_.data());
  for_each(tokens_, row, [&](int64_t token) {
    const float* const x = &projected_[token * row];
    const float* const factor = model_.gated ? x + inner : nullptr;
    RLHF_FAST_KERNEL(isa(), activate)(model_.type, model_.activation, x, factor, &inner_[token * inner], inner);
  });
  project({&layer.mlp_out, 1}, inner_.data(), tokens_, out_.data());
}

// y [rows, outputs side by side] of x [rows, in], both without gaps.
void Forward::product(std::span<const Linear> layers, const float* x, int64_t rows, float* y) {
  const int64_t in = layers[0].in, y_stride = linear_row(layers);
  if (rows * in * y_stride <= kBetweenLooks) {
    look(rows * in * y_stride);
    linear(layers.data(), int64_t(layers.size()), x, rows, in, y, y_stride, pairs_);
    return;
  }
  const int64_t most = std::max<int64_t>(1, kBetweenLooks / (rows * in * kOutputsAtOnce)) * kOutputsAtOnce;
  for (const Linear& layer : layers) {
    for (int64_t begin = 0; begin < layer.out; begin += most) {
      const Linear some = layer.outputs(begin, std::min(begin + most, layer.out));
      look(rows * in * some.out);
      linear(some, x, rows, in, y + begin, y_stride, pairs_);
    }
    y += layer.out;
  }
}

// The same with the layers' adapters.
void Forward::project(std::span<const Linear> layers, const float* x, int64_t rows, float* y) {
  product(layers, x, rows, y);
  add_adapters(model_.type, layers.data(), int64_t(layers.size()), x, rows, layers[0].in, y, linear_row(layers),
               scratch_, pairs_);
}

void Forward::norm(const Norm& norm, std::vector<float>& x, std::vector<float>& y) {
  const int64_t size = model_.hidden;
  for_each(tokens_, size, [&](int64_t token) {
    RLHF_FAST_KERNEL(isa(), normalise)(model_.type, norm, &x[token * size], &y[token * size], size);
  });
}

// y += residual_scale * norm(x); x is used up.
void Forward::add(const Norm& norm, std::vector<float>& x, std::vector<float>& y) {
  const int64_t size = model_.hidden;
  for_each(tokens_, size, [&](int64_t token) {
    float* const out = &x[token * size];
    if (norm.kind != Norm::Kind::none) RLHF_FAST_KERNEL(isa(), normalise)(model_.type, norm, out, out, size);
    RLHF_FAST_KERNEL(isa(), add_scaled)(model_.type, out, model_.residual_scale, &y[token * size], size);
  });
}

}  // namespace rlhf_fast
