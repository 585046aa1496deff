#include "cache.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

namespace rlhf_fast {
namespace {

constexpr std::align_val_t kAlignment{64};

PageTokens copied(const int32_t* tokens) {
  PageTokens copy;
  std::copy_n(tokens, kPageTokens, copy.begin());
  return copy;
}

}  // namespace

Cache::Cache(const CacheLayout& layout, int64_t budget)
    : page_bytes_(layout.page_bytes()),
      capacity_(budget > 0 ? budget / page_bytes_ : std::numeric_limits<int64_t>::max()) {}

Cache::~Cache() {
  for (const auto& page : pages_) ::operator delete(page->data, kAlignment);
}

Page* Cache::allocate() {
  if (available() == 0) return nullptr;
  if (free_.empty()) {
    auto page = std::make_unique<Page>();
    free_.reserve(pages_.size() + 1);
    pages_.reserve(pages_.size() + 1);
    page->data = static_cast<char*>(::operator new(page_bytes_, kAlignment));
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
  if (fresh) std::memcpy(fresh->data, page->data, page_bytes_);
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
