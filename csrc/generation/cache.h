// The paged key-value cache: pages with reference counts under a byte budget, and prompts' pages found by their tokens.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "attention.h"
#include "backend.h"

namespace rlhf_fast {

using PageTokens = std::array<int32_t, kPageTokens>;

struct Page {
  char* data = nullptr;
  int32_t references = 0;
  bool published = false;  // others may find it: `before` and `tokens` are set
  const Page* before = nullptr;
  PageTokens tokens{};
};

class Cache {
 public:
  // `budget`: bytes for all pages together; 0: as many as the backend has.
  Cache(Backend& backend, int64_t budget);
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  int64_t capacity() const { return capacity_; }  // pages
  int64_t available() const { return capacity_ - used_; }
  int64_t used() const { return used_; }
  int64_t peak_bytes() const { return peak_ * backend_.page_bytes(); }

  Page* allocate();  // with one reference; null when the budget is used up
  Page* copy(const Page* page);  // a new page with the same contents, or null
  void share(Page* page) { ++page->references; }
  void release(Page* page);

  // A full page is found by its tokens and the page before it (null for a sequence's first), which stand for all the
  // tokens before. Whoever holds a page holds the ones before it too.
  Page* find(const Page* before, const int32_t* tokens);  // with a reference added; null when there is none
  void publish(Page* page, const Page* before, const int32_t* tokens);

 private:
  Backend& backend_;
  const int64_t capacity_;
  int64_t used_ = 0, peak_ = 0;
  std::vector<std::unique_ptr<Page>> pages_;
  std::vector<Page*> free_;
  std::map<std::pair<const Page*, PageTokens>, Page*> published_;
};

}  // namespace rlhf_fast
