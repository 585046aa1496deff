#include "cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

namespace rlhf_fast {
namespace {

constexpr std::align_val_t kAlignment{64};

// Rows whose logits are in memory at once.
constexpr int64_t kLogitsRows = 64;

}  // namespace

CpuBackend::~CpuBackend() {
  for (char* const page : pages_) ::operator delete(page, kAlignment);
}

int64_t CpuBackend::page_limit() const { return std::numeric_limits<int64_t>::max(); }

char* CpuBackend::new_page() {
  pages_.push_back(nullptr);
  pages_.back() = static_cast<char*>(::operator new(page_bytes(), kAlignment));
  return pages_.back();
}

void CpuBackend::copy_page(const char* from, char* to) { std::memcpy(to, from, page_bytes()); }

bool CpuBackend::run(const std::vector<Span>& spans, const std::function<bool()>& interrupted) {
  return forward_.run(spans, interrupted);
}

void CpuBackend::draw(const std::vector<Draw>& draws, const SamplingOptions& options, Sampled* drawn) {
  const int64_t vocabulary = model().vocabulary;
  for (int64_t begin = 0; begin < int64_t(draws.size()); begin += kLogitsRows) {
    const int64_t count = std::min(int64_t(draws.size()) - begin, kLogitsRows);
    std::vector<int64_t> tokens, row;  // draws after the same token have the same logits
    for (int64_t i = 0; i < count; ++i) {
      const int64_t after = draws[begin + i].after;
      if (tokens.empty() || tokens.back() != after) tokens.push_back(after);
      row.push_back(int64_t(tokens.size()) - 1);
    }
    const float* const logits = forward_.logits(tokens);
#pragma omp parallel for schedule(dynamic) if (count > 1)
    for (int64_t i = 0; i < count; ++i) {
      const Draw& draw = draws[begin + i];
      drawn[begin + i] = sample(logits + row[i] * vocabulary, vocabulary, options, draw.place, draw.seen);
    }
  }
}

}  // namespace rlhf_fast
