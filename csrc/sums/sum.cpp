#include "sum.h"

#include <algorithm>
#include <utility>

#include "kernels/threads.h"

namespace narrowcast {

void Sum::add_exchange(const std::vector<Buffer>& sends, const std::vector<Buffer>& recvs) {
  Step step{};
  step.action = Action::exchange;
  step.operation = mesh_.prepare(sends, recvs);
  steps_.push_back(std::move(step));
}

void Sum::begin(const uintptr_t bases[4], int64_t* stats, uint64_t tag) {
  std::copy(bases, bases + 4, bases_);
  stats_ = stats;
  tag_ = tag;
  next_ = 0;
  under_way_ = false;
}

Outcome Sum::proceed(const Kernels& kernels, Clock::duration patience) {
  for (; next_ < steps_.size(); ++next_) {
    Step& step = steps_[next_];
    if (step.action != Action::exchange) {
      run(kernels, step);
      continue;
    }
    if (!std::exchange(under_way_, true)) {
      mesh_.start(*step.operation, tag_);
      tag_ += 2;
      deadline_ = Clock::now() + patience;
    }
    Outcome outcome = Engine::get().wait(*step.operation, deadline_, mesh_.spins());
    if (outcome.trouble != Trouble::none) return outcome;
    under_way_ = false;
  }
  return {};
}

std::vector<std::unique_ptr<Operation>> Sum::abandon() {
  std::vector<std::unique_ptr<Operation>> found;
  for (Step& step : steps_)
    if (step.operation != nullptr && step.operation->left.load() > 0) found.push_back(std::move(step.operation));
  return found;
}

void Sum::run(const Kernels& kernels, const Step& step) const {
  const size_t num_ranks = std::max<size_t>(step.num_ranks, 1);
  for_rows(step.num_tokens, 0, step.num_features, num_ranks, [&](size_t begin, size_t end, const Scratch& scratch) {
    Counts counts;
    switch (step.action) {
      case Action::encode:
        kernels.encode(*step.format, rows(step.values, step), step.source, payload(step.payload), counts, scratch,
                       begin, end);
        break;
      case Action::encode_with_residue:
        kernels.encode_with_residue(*step.format, rows(step.values, step), rows(step.residue, step), step.source,
                                    payload(step.payload), counts, scratch, begin, end);
        break;
      case Action::recode:
        kernels.recode(*step.format, {payload(step.payloads), step.rank_stride, step.num_ranks, 0}, *step.reduced,
                       step.num_features, payload(step.payload), counts, scratch, begin, end);
        break;
      case Action::decode_sum:
        kernels.decode_sum(*step.format, {payload(step.payload), step.rank_stride, step.num_ranks, step.source},
                           rows(step.values, step), scratch, begin, end);
        break;
      case Action::exchange:
        break;
    }
    if (stats_ != nullptr) {
      stats_[0] += counts.saturated;
      stats_[1] += counts.non_finite;
      stats_[2] += counts.guarded;
    }
  });
}

}  // namespace narrowcast
