#include "inputs.h"

#include <algorithm>

#include "memory.h"

namespace rlhf_fast {

Inputs::Inputs(const Limits& limits, void* host, void* device, const char* pool, int64_t page_bytes)
    : limits_(limits),
      host_(static_cast<int32_t*>(host)),
      device_(static_cast<int32_t*>(device)),
      pool_(pool),
      page_bytes_(page_bytes) {}

// The pages of all sequences come first, [rows, pages], then ids, sequences and positions, [3, count]: all that a CUDA
// graph of `count` tokens reads stays at the same addresses.
PassInputs Inputs::send(const std::vector<Span>& spans, int64_t count, bool prefills, cuda::Stream stream) {
  const int64_t page_count = limits_.rows * limits_.pages;
  int32_t *const pages = host_, *const ids = host_ + page_count, *const sequences = ids + count,
                 *const positions = sequences + count;
  PassInputs inputs;
  const auto is_prefill = [&](const Span& span) { return prefills && span.count > kLongSpan; };

  std::vector<int64_t> first(spans.size());
  int64_t next = 0;
  for (const bool later : {false, true}) {
    for (size_t i = 0; i < spans.size(); ++i) {
      if (is_prefill(spans[i]) != later) continue;
      first[i] = next;
      next += spans[i].count;
      if (!later) inputs.attended = next;
    }
  }

  place_.clear();
  for (size_t i = 0; i < spans.size(); ++i) {
    const Span& span = spans[i];
    const int64_t row = int64_t(i) * limits_.pages;
    for (size_t j = 0; j < span.pages.size(); ++j) {
      pages[row + int64_t(j)] = int32_t((span.pages[j] - pool_) / page_bytes_);
    }
    for (int64_t j = 0; j < span.count; ++j) {
      const int64_t at = first[i] + j;
      place_.push_back(int32_t(at));
      ids[at] = span.tokens[j];
      sequences[at] = int32_t(i);
      positions[at] = int32_t(span.position + j);
    }
    if (is_prefill(span)) {
      inputs.prefills.push_back({first[i], span.count, span.position, device_ + row});
    } else {
      inputs.positions = std::max(inputs.positions, span.position + span.count);
    }
  }
  for (; next < count; ++next) {
    ids[next] = sequences[next] = 0;
    positions[next] = -1;
  }
  if (inputs.prefills.empty()) inputs.attended = count;

  const int64_t used = int64_t(spans.size()) * limits_.pages;
  cuda::copy(device_, host_, 4 * used, stream);
  cuda::copy(device_ + page_count, host_ + page_count, 4 * 3 * count, stream);
  const int32_t* const tokens = device_ + page_count;
  inputs.ids = tokens;
  inputs.tokens = {tokens + count, tokens + 2 * count, device_, limits_.pages, count};
  return inputs;
}

}  // namespace rlhf_fast
