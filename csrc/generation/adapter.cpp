#include "adapter.h"

#include <algorithm>

#include "../cpu/choose_isa.h"
#include "layers.h"

namespace rlhf_fast {
namespace {

// Numbers read or written that are worth the start of the threads.
constexpr int64_t kWorthThreads = 1 << 14;

}  // namespace

void add_adapters(WeightType type, const Linear* layers, int64_t count, const float* x, int64_t rows,
                  int64_t x_stride, float* y, int64_t y_stride, std::vector<float>& scratch,
                  std::vector<uint32_t>& pairs) {
  std::vector<Linear> downs;
  int64_t ranks = 0, widest = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!layers[i].adapter) continue;
    downs.push_back(layers[i].adapter->down);
    ranks += downs.back().out;
    widest = std::max(widest, layers[i].out);
  }
  if (downs.empty()) return;
  if (int64_t(scratch.size()) < rows * (ranks + widest)) scratch.resize(rows * (ranks + widest));
  float* low = scratch.data();
  float* const added = low + rows * ranks;
  linear(downs.data(), int64_t(downs.size()), x, rows, x_stride, low, ranks, pairs);

  for (const Linear* layer = layers; layer < layers + count; y += layer->out, ++layer) {
    const Adapter* const adapter = layer->adapter.get();
    if (!adapter) continue;
    const int64_t rank = adapter->down.out, out = layer->out;
    for (int64_t row = 0; row < rows; ++row) {
      RLHF_FAST_KERNEL(isa(), round_to)(adapter->down.type, low + row * ranks, rank);
    }
    linear(adapter->up, low, rows, ranks, added, out, pairs);
#pragma omp parallel for schedule(static) if (rows > 1 && rows * out > kWorthThreads)
    for (int64_t row = 0; row < rows; ++row) {
      RLHF_FAST_KERNEL(isa(), round_to)(type, y + row * y_stride, out);
      RLHF_FAST_KERNEL(isa(), add_scaled)
      (adapter->up.type, added + row * out, adapter->scale, y + row * y_stride, out);
    }
    low += rank;
  }
}

}  // namespace rlhf_fast
