#include "pass.h"

#include <algorithm>
#include <vector>

#include "convert.h"

namespace rlhf_fast {
namespace {

// Tokens whose attention is one launch.
constexpr int64_t kAttendedTokens = 64;

int64_t bytes_of(WeightType type) { return type == WeightType::float32 ? 4 : 2; }

void* offset(void* x, int64_t elements, WeightType type) { return static_cast<char*>(x) + elements * bytes_of(type); }
const void* offset(const void* x, int64_t elements, WeightType type) {
  return static_cast<const char*>(x) + elements * bytes_of(type);
}

// The size of a row that holds the layers' outputs side by side.
int64_t row_of(std::span<const Linear> layers) {
  int64_t size = 0;
  for (const Linear& layer : layers) size += layer.out;
  return size;
}

// Whether the kernels take their product.
bool is_small(std::span<const Linear> layers, int64_t rows) {
  return rows <= cuda::kMaxRows &&
         std::none_of(layers.begin(), layers.end(), [](const Linear& layer) { return bool(layer.adapter); });
}

// The part of a layer that gives `count` of its outputs from `first` on.
Linear outputs_of(const Linear& layer, int64_t first, int64_t count) {
  Linear part = layer;
  part.weight = offset(layer.weight, first * (layer.transposed ? 1 : layer.row_stride), layer.type);
  if (layer.bias) part.bias = offset(layer.bias, first, layer.type);
  part.out = count;
  return part;
}

}  // namespace

CudaPass::Sizes CudaPass::sizes(const Model& model, int64_t max_rows, int64_t max_positions) {
  const Heads& heads = model.heads;
  const int64_t bytes = bytes_of(model.type);
  int64_t widest = model.hidden, projected = 0, inner = 0, workspace = 0;
  const auto product = [&](std::span<const Linear> layers) {
    int64_t together = 0;
    for (const Linear& layer : layers) together += cuda::linear_workspace(as_cuda(layer));
    workspace = std::max(workspace, together);
  };
  product({&model.head, 1});
  for (const Linear& layer : model.embedding_out) {
    product({&layer, 1});
    widest = std::max(widest, layer.in);
  }
  for (const Linear& layer : model.hidden_out) {
    product({&layer, 1});
    projected = std::max(projected, layer.out);
  }
  for (const Layer& layer : model.layers) {
    for (const auto& some : {layer.attention_in, layer.mlp_in}) {
      product(some);
      projected = std::max(projected, row_of(some));
    }
    product({&layer.attention_out, 1});
    product({&layer.mlp_out, 1});
    inner = std::max(inner, layer.mlp_out.in);
  }
  const int64_t logits_rows = std::min(max_rows, kLogitsRows);
  return {
      .hidden = bytes * model.hidden,
      .normed = bytes * widest,
      .projected = bytes * projected,
      .attended = bytes * heads.query_heads * heads.size,
      .inner = bytes * inner,
      .workspace = workspace,
      .scratch = std::max(cuda::attention_workspace(as_cuda(heads), kAttendedTokens, max_positions),
                          cuda::sample_workspace(logits_rows, model.vocabulary)),
      .logits = 4 * logits_rows * model.vocabulary,
  };
}

CudaPass::CudaPass(const Model& model, const cuda::PagedCache& cache, const Buffers& buffers, const Torch& torch)
    : model_(model), cache_(cache), buffers_(buffers), torch_(torch), type_(as_cuda(model.type)) {}

bool CudaPass::run(const PassInputs& inputs, int64_t positions, const std::function<bool()>& interrupted,
                   cuda::Stream stream) {
  stream_ = stream;
  const int64_t rows = inputs.tokens.count, size = model_.hidden;
  const Embedding &table = model_.embedding, &learned = model_.positions;
  const bool direct = model_.embedding_out.empty();
  void* const hidden = buffers_.hidden;
  cuda::embed(type_, table.weight, table.row_stride, table.scale, inputs.ids, inputs.tokens,
              direct ? learned.weight : nullptr, learned.row_stride, model_.position_offset,
              direct ? hidden : buffers_.normed, direct ? size : model_.embedding_out[0].in, stream_);
  if (!direct) {
    project(model_.embedding_out, buffers_.normed, rows, hidden, model_.type);
    if (learned.weight) {  // rows of a table as any: the position is the id
      const void* const first = offset(learned.weight, model_.position_offset * learned.row_stride, learned.type);
      cuda::embed(type_, first, learned.row_stride, learned.scale, inputs.tokens.position, inputs.tokens, nullptr, 0, 0,
                  buffers_.out, size, stream_);
      cuda::add_norm(type_, {}, buffers_.out, 1, hidden, {}, nullptr, rows, size, stream_);
    }
  }
  add({}, nullptr, hidden, &model_.layers[0].attention_norm, rows);
  for (size_t i = 0; i < model_.layers.size(); ++i) {
    if (interrupted()) return false;
    const Layer& layer = model_.layers[i];
    const Norm* const next = i + 1 < model_.layers.size() ? &model_.layers[i + 1].attention_norm : nullptr;
    if (model_.parallel) {
      attention(layer, int64_t(i), inputs, positions, buffers_.attention_out);
      add({}, nullptr, hidden, &layer.mlp_norm, rows);
      mlp(layer, rows);
      add(layer.attention_out_norm, buffers_.attention_out, model_.branches_first ? buffers_.out : hidden, nullptr,
          rows);
      add(layer.mlp_out_norm, buffers_.out, hidden, next, rows);
      continue;
    }
    attention(layer, int64_t(i), inputs, positions, buffers_.out);
    add(layer.attention_out_norm, buffers_.out, hidden, &layer.mlp_norm, rows);
    mlp(layer, rows);
    add(layer.mlp_out_norm, buffers_.out, hidden, next, rows);
  }
  return true;
}

void CudaPass::logits(const int32_t* places, const int32_t* zeros, int64_t rows, cuda::Stream stream) {
  stream_ = stream;
  const int64_t size = model_.hidden;
  // The rows that are wanted, taken from the pass's as from a table.
  const cuda::Tokens tokens{nullptr, zeros, nullptr, 0, rows};
  cuda::embed(type_, buffers_.hidden, size, 1, places, tokens, nullptr, 0, 0, buffers_.out, size, stream_);
  add({}, nullptr, buffers_.out, &model_.final_norm, rows);
  const void* x = buffers_.normed;
  for (const Linear& layer : model_.hidden_out) {
    project({&layer, 1}, x, rows, buffers_.projected, model_.type);
    x = buffers_.projected;
  }
  project({&model_.head, 1}, x, rows, buffers_.logits, WeightType::float32);
}

// out = the attention's output of normed.
void CudaPass::attention(const Layer& layer, int64_t index, const PassInputs& inputs, int64_t positions, void* out) {
  const cuda::Tokens& tokens = inputs.tokens;
  const cuda::Heads heads = as_cuda(model_.heads);
  const int64_t row = row_of(layer.attention_in), attended = heads.query_heads * heads.size;
  const auto projected_at = [&](int64_t token) { return offset(buffers_.projected, token * row, model_.type); };
  const auto attended_at = [&](int64_t token) { return offset(buffers_.attended, token * attended, model_.type); };
  project(layer.attention_in, buffers_.normed, tokens.count, buffers_.projected, model_.type);
  cuda::rope_append(cache_, index, heads, as_cuda(layer.query_norm), as_cuda(layer.key_norm), as_cuda(layer.rotary),
                    layer.query_scale, tokens, buffers_.projected, row, stream_);
  for (int64_t first = 0; first < inputs.attended; first += kAttendedTokens) {
    const int64_t count = std::min(inputs.attended - first, kAttendedTokens);
    const cuda::Tokens some{tokens.sequence + first, tokens.position + first, tokens.pages, tokens.max_pages, count};
    cuda::attention(cache_, index, heads, layer.attention_scale, model_.attention_cap, layer.window, some,
                    projected_at(first), row, attended_at(first), buffers_.scratch, positions, stream_);
  }
  for (const Prefill& prefill : inputs.prefills) {
    torch_.attend(index, prefill.position, prefill.count, uintptr_t(prefill.pages),
                  uintptr_t(projected_at(prefill.first)), row, uintptr_t(attended_at(prefill.first)));
  }
  project({&layer.attention_out, 1}, buffers_.attended, tokens.count, out, model_.type);
}

// out = the MLP's output of normed.
void CudaPass::mlp(const Layer& layer, int64_t rows) {
  const int64_t row = row_of(layer.mlp_in), inner = layer.mlp_out.in;
  if (model_.gated && is_small(layer.mlp_in, rows)) {
    const bool one = layer.mlp_in.size() == 1;  // with the gate's outputs before the value's
    const Linear gate = one ? outputs_of(layer.mlp_in[0], 0, inner) : layer.mlp_in[0];
    const Linear value = one ? outputs_of(layer.mlp_in[0], inner, inner) : layer.mlp_in[1];
    cuda::gated_mlp_in(as_cuda(gate), as_cuda(value), as_cuda(model_.activation), buffers_.normed, rows, gate.in,
                       buffers_.inner, inner, stream_);
  } else {
    project(layer.mlp_in, buffers_.normed, rows, buffers_.projected, model_.type);
    cuda::activate(type_, as_cuda(model_.activation), model_.gated, buffers_.projected, row, buffers_.inner, rows,
                   inner, stream_);
  }
  project({&layer.mlp_out, 1}, buffers_.inner, rows, buffers_.out, model_.type);
}

// residual += residual_scale * out_norm(x) unless x is null, then normed = norm(residual) unless norm is.
void CudaPass::add(const Norm& out_norm, const void* x, void* residual, const Norm* norm, int64_t rows) {
  cuda::add_norm(type_, as_cuda(out_norm), x, model_.residual_scale, residual, norm ? as_cuda(*norm) : cuda::Norm{},
                 norm ? buffers_.normed : nullptr, rows, model_.hidden, stream_);
}

// y [rows, outputs side by side] of x [rows, in], both without gaps.
void CudaPass::project(std::span<const Linear> layers, const void* x, int64_t rows, void* y, WeightType out_type) {
  const int64_t in = layers[0].in, row = row_of(layers);
  if (is_small(layers, rows)) {
    std::vector<cuda::Linear> all;
    for (const Linear& layer : layers) all.push_back(as_cuda(layer));
    cuda::linear_many(all.data(), int(all.size()), x, rows, in, as_cuda(out_type), y, row,
                      buffers_.workspace, stream_);
    return;
  }
  int64_t first = 0;
  for (const Linear& layer : layers) {
    torch_.product(uintptr_t(layer.weight), uintptr_t(x), rows, in, uintptr_t(offset(y, first, out_type)), row,
                   out_type == WeightType::float32);
    first += layer.out;
  }
}

}  // namespace rlhf_fast
