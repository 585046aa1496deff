#include "cache.h"

#include <algorithm>

namespace rlhf_fast {
namespace {

PageTokens copied(const int32_t* tokens) {
  PageTokens copy;
  std::copy_n(tokens, kPageTokens, copy.begin());
  return copy;
}

}  // namespace

Cache::Cache(Backend& backend, int64_t budget)
    : backend_(backend),
      capacity_(budget > 0 ? std::min(budget / backend.page_bytes(), backend.page_limit()) : backend.page_limit()) {}

Page* Cache::allocate() {
  if (available() == 0) return nullptr;
  if (free_.empty()) {
    auto page = std::make_unique<Page>();
    free_.reserve(pages_.size() + 1);
    pages_.reserve(pages_.size() + 1);
    page->data = backend_.new_page();
    free_.push_back(page.get());
    pages_.push_back(std::move(page));
  }
  Page* const page = free_.back();
  free_.pop_back();
  page->references = 1;
  peak_ = std::max(peak_, ++used_);
  return page;
}

Page* Cache::copy(const Page* page) {
  Page* const fresh = allocate();
  if (fresh) backend_.copy_page(page->data, fresh->data);
  return fresh;
}

void Cache::release(Page* page) {
  if (--page->references > 0) return;
  if (page->published) published_.erase({page->before, page->tokens});
  page->published = false;
  --used_;
  free_.push_back(page);
}

Page* Cache::find(const Page* before, const int32_t* tokens) {
  const auto found = published_.find({before, copied(tokens)});
  if (found == published_.end()) return nullptr;
  share(found->second);
  return found->second;
}

void Cache::publish(Page* page, const Page* before, const int32_t* tokens) {
  page->before = before;
  page->tokens = copied(tokens);
  page->published = published_.try_emplace({before, page->tokens}, page).second;
}

}  // namespace rlhf_fast
