// The CPU as the step loop's device.
#pragma once

#include <vector>

#include "backend.h"
#include "forward.h"

namespace rlhf_fast {

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const Model& model) : Backend(model), forward_(model) {}
  ~CpuBackend() override;

  int64_t page_bytes() const override { return model().cache_layout().page_bytes(); }
  int64_t page_limit() const override;
  char* new_page() override;
  void copy_page(const char* from, char* to) override;
  bool run(const std::vector<Span>& spans, const std::function<bool()>& interrupted) override;
  void draw(const std::vector<Draw>& draws, const SamplingOptions& options, Sampled* drawn) override;

 private:
  // Pages lie in slabs that come from the system and go back to it: what malloc frees stays with the process.
  struct Slab {
    char* data;
    int64_t bytes;
  };

  Forward forward_;
  std::vector<Slab> slabs_;
  int64_t taken_ = 0;  // bytes of the last slab
};

}  // namespace rlhf_fast
