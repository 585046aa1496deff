// What the step loop asks of the device that a model lies on: memory for the cache's pages, passes, tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "model.h"
#include "sampler.h"

namespace rlhf_fast {

// Consecutive tokens of one sequence, with pages for all positions up to the last one.
struct Span {
  std::vector<char*> pages;  // by position / kPageTokens, as new_page gave them
  const int32_t* tokens;
  int64_t position;  // of the first
  int64_t count;
};

// A token to draw.
struct Draw {
  int64_t after;  // which of the pass's tokens it follows, counted over all spans
  Place place;
  const uint64_t* seen;  // the sequence's tokens as a set, for the penalty; null without one
};

struct Interrupted {};  // thrown by draws that are not to go on

class Backend {
 public:
  // The model must outlive it.
  explicit Backend(const Model& model) : model_(model) {}
  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  const Model& model() const { return model_; }

  // The cache's pages: addresses on the device, of page_bytes() each, that live as long as the backend.
  virtual int64_t page_bytes() const = 0;
  virtual int64_t page_limit() const = 0;  // how many it can give
  virtual char* new_page() = 0;
  virtual void copy_page(const char* from, char* to) = 0;

  // Runs all blocks, writes keys and values to the pages. A span may see pages that another span fills in the same
  // pass. Between pieces of work, some hundredths of a second at most, it asks `interrupted` and returns false when
  // that says so, with nothing to be used.
  virtual bool run(const std::vector<Span>& spans, const std::function<bool()>& interrupted) = 0;

  // drawn[i] = the token of draws[i], after the last pass. Draws after the same token come one after another. May ask
  // the pass's `interrupted` as well, and throws Interrupted when that says so.
  virtual void draw(const std::vector<Draw>& draws, const SamplingOptions& options, Sampled* drawn) = 0;

 private:
  const Model& model_;
};

}  // namespace rlhf_fast
