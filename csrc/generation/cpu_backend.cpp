#include "cpu_backend.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

namespace rlhf_fast {
namespace {

constexpr int64_t kSlabBytes = 32 << 20;

// Rows whose logits are in memory at once.
constexpr int64_t kLogitsRows = 64;

}  // namespace

CpuBackend::~CpuBackend() {
  for (const Slab& slab : slabs_) munmap(slab.data, slab.bytes);
}

int64_t CpuBackend::page_limit() const { return std::numeric_limits<int64_t>::max(); }

char* CpuBackend::new_page() {
  const int64_t size = page_bytes();
  if (slabs_.empty() || taken_ + size > slabs_.back().bytes) {
    const int64_t bytes = std::max<int64_t>(1, kSlabBytes / size) * size;
    slabs_.reserve(slabs_.size() + 1);
    void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    madvise(data, bytes, MADV_HUGEPAGE);
    slabs_.push_back({static_cast<char*>(data), bytes});
    taken_ = 0;
  }
  taken_ += size;
  return slabs_.back().data + taken_ - size;
}

void CpuBackend::copy_page(const char* from, char* to) { std::memcpy(to, from, page_bytes()); }

bool CpuBackend::run(const std::vector<Span>& spans, const std::function<bool()>& interrupted) {
  try {
    forward_.run(spans, interrupted);
  } catch (const Interrupted&) {
    return false;
  }
  return true;
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
