// What the checker remembers of memory: for every word, or every byte where smaller pieces are used, the last write and
// the last reads.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>

#include "memory.h"

namespace cuda_on_cpu {

// When and by whom. `epoch` counts the barriers of all blocks, so it tells the block too; `clock` counts what orders a
// thread within its warp.
struct Record {
  enum Who : uint8_t { nobody, one, some_of_a_warp, some_of_a_block };

  uint32_t epoch = 0;
  uint32_t clock = 0;
  uint32_t lanes = 0;   // of the warp, for some_of_a_warp
  uint16_t thread = 0;  // or the first of several
  Who who = nobody;
  bool atomic = false;
  const void* caller = nullptr;
};

struct Cell {
  Record write, read;
  uint32_t copied_in_block = 0;  // the first epoch of the block in which an asynchronous copy to it is under way, or 0
};

constexpr uintptr_t kShadowPage = 4096;
constexpr int kWordBytes = 4;

struct ShadowPage {
  Cell words[kShadowPage / kWordBytes];
  std::unique_ptr<Cell[]> bytes;                   // once a piece smaller than a word has been used
  bool split[kShadowPage / kWordBytes] = {};  // words whose bytes have cells of their own
  Buffer* buffer = nullptr;                        // in it, as of that generation
  uint64_t generation = 0;
};

class Shadow {
 public:
  ShadowPage& page(uintptr_t address);
  // Calls visit(Cell&, offset) for each cell that the access covers; the offset is its first byte's, from the address.
  template <typename Visit>
  void visit(uintptr_t address, int bytes, Visit visit);
  // Forgets all when there is much of it.
  void trim();

 private:
  struct Recent {
    uintptr_t number = 0;
    ShadowPage* page = nullptr;
  };
  static constexpr size_t kRecent = 256, kMostPages = 4096;

  std::unordered_map<uintptr_t, std::unique_ptr<ShadowPage>> pages_;
  Recent recent_[kRecent];
};

inline ShadowPage& Shadow::page(uintptr_t address) {
  const uintptr_t number = address / kShadowPage;
  Recent& recent = recent_[number % kRecent];
  if (recent.page && recent.number == number) return *recent.page;
  std::unique_ptr<ShadowPage>& page = pages_[number];
  if (!page) page = std::make_unique<ShadowPage>();
  recent = {number, page.get()};
  return *page;
}

template <typename Visit>
void Shadow::visit(uintptr_t address, int bytes, Visit visit) {
  int offset = 0;
  while (offset < bytes) {
    const uintptr_t at = address + uintptr_t(offset), in_page = at % kShadowPage, word = in_page / kWordBytes;
    ShadowPage& page = this->page(at);
    const bool whole = at % kWordBytes == 0 && bytes - offset >= kWordBytes;
    if (whole && !page.split[word]) {
      visit(page.words[word], offset);
      offset += kWordBytes;
      continue;
    }
    if (!page.bytes) page.bytes.reset(new Cell[kShadowPage]);
    if (!page.split[word]) {
      for (int i = 0; i < kWordBytes; ++i) page.bytes[word * kWordBytes + unsigned(i)] = page.words[word];
      page.split[word] = true;
    }
    visit(page.bytes[in_page], offset);
    ++offset;
  }
}

inline void Shadow::trim() {
  if (pages_.size() < kMostPages) return;
  pages_.clear();
  for (Recent& recent : recent_) recent = {};
}

}  // namespace cuda_on_cpu
