#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "cache.h"

namespace rlhf_fast {
namespace {

int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

struct Row {
  int64_t index;                // of its request
  std::vector<int32_t> tokens;  // the prompt's and its own
  int64_t prompt_size;
  int64_t cached = 0;           // tokens whose keys and values are in its pages
  std::vector<Page*> pages;
  std::vector<uint64_t> seen;   // its tokens as a set; empty where no penalty asks for it

  int64_t size() const { return int64_t(tokens.size()); }
  int64_t generated() const { return size() - prompt_size; }
};

class Loop {
 public:
  Loop(Backend& backend, const std::vector<std::vector<int32_t>>& prompts, const std::vector<Request>& requests,
       const Options& options, const Callbacks& callbacks, const Output& output)
      : backend_(backend),
        requests_(requests),
        options_(options),
        callbacks_(callbacks),
        output_(output),
        interrupted_([this] {
          ++stats_.looks;
          return callbacks_.interrupted();
        }),
        cache_(backend, options.cache_bytes),
        sampling_(options.sampling) {
    sampling_.stop_ids = options.stop_ids.data();
    sampling_.stop_count = int64_t(options.stop_ids.size());
    for (int64_t i = 0; i < int64_t(requests.size()); ++i) {
      const auto& prompt = prompts[requests[i].prompt];
      const int64_t needed = pages_for(int64_t(prompt.size()) + requests[i].limit - 1);
      if (needed > cache_.capacity()) {
        throw std::invalid_argument(
            "cache_bytes: " + std::to_string(options.cache_bytes) + " bytes cannot hold one row of " +
            std::to_string(prompt.size()) + " prompt tokens and " + std::to_string(requests[i].limit) +
            " new ones; that takes " + std::to_string(needed * backend.page_bytes()));
      }
      auto row = std::make_unique<Row>(Row{i, prompt, int64_t(prompt.size())});
      if (sampling_.repetition_penalty != 1) {
        row->seen.resize((backend.model().vocabulary + 63) / 64);
        for (const int32_t token : prompt) insert(row->seen.data(), token);
      }
      waiting_.push_back(std::move(row));
    }
  }

  DecodeStats run() {
    try {
      while (!(running_.empty() && waiting_.empty()) && stats_.finite) {
        plan();
        if (!backend_.run(spans_, interrupted_)) break;
        ++stats_.steps;
        extend();
        retire();
      }
    } catch (const Interrupted&) {  // the pass's tokens are not drawn
    }
    for (const auto& row : running_) give_back(*row);
    if (cache_.used() != 0) throw std::logic_error("pages of the key-value cache were lost");
    stats_.peak_cache_bytes = cache_.peak_bytes();
    return stats_;
  }

 private:
  // ---- which tokens the next pass takes ---------------------------------------------------------------------------

  void plan() {
    spans_.clear();
    planned_.clear();
    int64_t room = options_.prefill_tokens;
    for (size_t i = 0; i < running_.size(); ++i) schedule(*running_[i], room);  // may evict from the end
    int64_t places = options_.max_rows - int64_t(running_.size());
    for (auto next = waiting_.begin(); next != waiting_.end() && places > 0 && room > 0; --places) {
      if (is_prefilling(requests_[(*next)->index].prompt) && (*next)->generated() == 0) {
        ++next;  // it will start as a copy of the one that is
        continue;
      }
      if (!admit(**next)) break;
      running_.push_back(std::move(*next));
      next = waiting_.erase(next);
      schedule(*running_.back(), room);
    }
  }

  bool is_prefilling(int64_t prompt) const {
    return std::any_of(running_.begin(), running_.end(), [&](const auto& row) {
      return requests_[row->index].prompt == prompt && row->generated() == 0;
    });
  }

  // Takes the pages that its first tokens share with others; false, and nothing taken, when too few are left for the
  // rest of the row and a page more for each that is running.
  bool admit(Row& row) {
    const Page* before = nullptr;
    // The last token always goes through the model: its logits are needed.
    while (row.cached + kPageTokens < row.size()) {
      Page* const page = cache_.find(before, &row.tokens[row.cached]);
      if (!page) break;
      before = page;
      row.pages.push_back(page);
      row.cached += kPageTokens;
    }
    const int64_t needed = pages_for(row.size()) - int64_t(row.pages.size()) + int64_t(running_.size());
    if (running_.empty() || needed <= cache_.available()) return true;
    give_back(row);
    return false;
  }

  // Plans the row's next tokens: its last one, or as much of its prompt as there is room for. Rows that came last give
  // up their pages when there are none left, itself in the end; they start over later with the tokens that they have,
  // which gives the same bits.
  void schedule(Row& row, int64_t& room) {
    const int64_t left = row.size() - row.cached, count = left == 1 ? 1 : std::min(left, room);
    if (count == 0) return;
    while (int64_t(row.pages.size()) < pages_for(row.cached + count)) {
      Page* const page = cache_.allocate();
      if (page) {
        row.pages.push_back(page);
        continue;
      }
      const bool itself = running_.back().get() == &row;
      evict_last();
      if (itself) return;
    }
    if (row.generated() == 0 || left > 1) {
      room -= count;
      stats_.prompt_tokens += count;
      publish(row, row.cached + count);
    }
    Span span{{}, &row.tokens[row.cached], row.cached, count};
    for (const Page* page : row.pages) span.pages.push_back(page->data);
    spans_.push_back(std::move(span));
    planned_.push_back(&row);
  }

  // The prompt's pages that are full once the tokens before `end` are in: from now on others may share them, because
  // no later pass and no later span of this one comes before they are filled.
  void publish(const Row& row, int64_t end) {
    for (int64_t page = row.cached / kPageTokens; (page + 1) * kPageTokens <= std::min(end, row.prompt_size); ++page) {
      cache_.publish(row.pages[page], page > 0 ? row.pages[page - 1] : nullptr, &row.tokens[page * kPageTokens]);
    }
  }

  void evict_last() {
    give_back(*running_.back());
    waiting_.push_front(std::move(running_.back()));
    running_.pop_back();
    ++stats_.evictions;
  }

  void give_back(Row& row) {
    for (Page* page : row.pages) cache_.release(page);
    row.pages.clear();
    row.cached = 0;
  }

  // ---- what comes of the pass ---------------------------------------------------------------------------------------

  void extend() {
    std::vector<Row*> rows;
    std::vector<Draw> draws;
    int64_t token = 0;
    for (size_t i = 0; i < spans_.size(); ++i) {
      Row* const row = planned_[i];
      token += spans_[i].count;
      row->cached += spans_[i].count;
      if (row->cached < row->size()) continue;
      rows.push_back(row);
      if (row->generated() == 0) fork(*row, rows);
      while (draws.size() < rows.size()) draws.push_back(draw_for(*rows[draws.size()], token - 1));
    }
    std::vector<Sampled> drawn(draws.size());
    backend_.draw(draws, sampling_, drawn.data());
    for (size_t i = 0; i < rows.size(); ++i) add(drawn[i], *rows[i]);
    ask_who_stops(rows);
  }

  // Rows that wait with the same prompt start from a copy: they share its full pages and its logits.
  void fork(const Row& row, std::vector<Row*>& rows) {
    const int64_t prompt = requests_[row.index].prompt, full = row.cached / kPageTokens;
    for (auto next = waiting_.begin();
         next != waiting_.end() && int64_t(running_.size()) < options_.max_rows;) {
      if (requests_[(*next)->index].prompt != prompt || (*next)->generated() > 0) {
        ++next;
        continue;
      }
      Row& copy = **next;
      if (row.cached % kPageTokens != 0) {
        Page* const partial = cache_.copy(row.pages[full]);
        if (!partial) return;
        copy.pages.push_back(partial);
      }
      copy.pages.insert(copy.pages.begin(), row.pages.begin(), row.pages.begin() + full);
      for (int64_t page = 0; page < full; ++page) cache_.share(row.pages[page]);
      copy.cached = row.cached;
      rows.push_back(&copy);
      running_.push_back(std::move(*next));
      next = waiting_.erase(next);
    }
  }

  Draw draw_for(const Row& row, int64_t after) const {
    const Request& request = requests_[row.index];
    const Place place{request.seed, request.sample, uint32_t(row.generated())};
    return {after, place, row.seen.empty() ? nullptr : row.seen.data()};
  }

  void add(const Sampled& drawn, Row& row) {
    const int64_t at = row.index * output_.width + row.generated();
    output_.tokens[at] = drawn.token;
    output_.mask[at] = true;
    output_.logprobs[at] = drawn.logprob;
    output_.sampled_logprobs[at] = drawn.sampled_logprob;
    row.tokens.push_back(drawn.token);
    if (!row.seen.empty()) insert(row.seen.data(), drawn.token);
    stats_.finite = stats_.finite && !std::isnan(drawn.logprob);
  }

  void ask_who_stops(const std::vector<Row*>& sampled) {
    std::vector<int64_t> rows;
    std::vector<int32_t> tokens;
    for (const Row* row : sampled) {
      const int32_t token = row->tokens.back();
      Finish& finish = output_.finish[row->index];
      if (std::binary_search(options_.stop_ids.begin(), options_.stop_ids.end(), token)) {
        finish = Finish::stop;
      } else if (row->generated() == requests_[row->index].limit) {
        finish = Finish::length;
      }
      if (finish == Finish::stop) continue;
      rows.push_back(row->index);
      tokens.push_back(token);
    }
    if (!callbacks_.stopped || rows.empty()) return;
    const std::vector<bool> stopped = callbacks_.stopped(rows, tokens);
    for (size_t i = 0; i < rows.size(); ++i) {
      if (stopped[i]) output_.finish[rows[i]] = Finish::stop;
    }
  }

  void retire() {
    const auto finished = [&](const auto& row) { return output_.finish[row->index] != Finish::abort; };
    for (const auto& row : running_) {
      if (finished(row)) give_back(*row);
    }
    running_.erase(std::remove_if(running_.begin(), running_.end(), finished), running_.end());
  }

  Backend& backend_;
  const std::vector<Request>& requests_;
  const Options& options_;
  const Callbacks& callbacks_;
  const Output& output_;
  const std::function<bool()> interrupted_;
  Cache cache_;
  SamplingOptions sampling_;
  DecodeStats stats_;
  std::deque<std::unique_ptr<Row>> waiting_;
  std::vector<std::unique_ptr<Row>> running_;  // those that came first are first
  std::vector<Span> spans_;                    // of the pass
  std::vector<Row*> planned_;                  // one a span
};

}  // namespace

DecodeStats decode(Backend& backend, const std::vector<std::vector<int32_t>>& prompts,
                   const std::vector<Request>& requests, const Options& options, const Callbacks& callbacks,
                   const Output& output) {
  return Loop(backend, prompts, requests, options, callbacks, output).run();
}

}  // namespace rlhf_fast
