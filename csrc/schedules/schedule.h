// What a layer did once, for a few tokens, done again for others in one call: operators and sums in their order, at the
// addresses that they were recorded with. Those of the tensors that are others in each call move along with these.
//
// Nothing here knows a layer: src/narrowcast/runtime/schedules.py records whatever runs.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "decode/decode.h"
#include "sums/sum.h"
#include "weights/weights.h"

namespace narrowcast {

// Operators: kernels with their arguments.

struct PackedProduct {
  PackedMatrix matrix;
  MatrixPart part;
  Rows x;
  const void* bias;
  Rows y;
  size_t num_threads;
};

struct DenseProduct {
  DenseMatrix matrix;
  Rows x;
  const void* bias;
  Rows y;
  size_t num_threads;
};

void run(const RmsNorm&);
void run(const Attention&);
void run(const Combination&);
void run(const Function&);
void run(const PackedProduct&);
void run(const DenseProduct&);

// What a layer attends to in a call: its cache, with the places of the new tokens, and the mask, where it was recorded
// with one.
struct Attended {
  Heads k, v;
  size_t context;
  Mask mask;  // without kind and dtype, which are as recorded
};

// Tensors that are others in each call: where they were when the schedule was recorded, where they are now.
class Moving {
 public:
  explicit Moving(std::vector<std::pair<uintptr_t, size_t>> ranges) : ranges_(std::move(ranges)) {}

  size_t size() const { return ranges_.size(); }
  void begin(std::vector<uintptr_t> now, const Attended& attended) {
    now_ = std::move(now);
    attended_ = attended;
  }
  uintptr_t at(uintptr_t recorded) const {
    for (size_t i = 0; i < now_.size(); ++i) {
      if (recorded - ranges_[i].first < ranges_[i].second) return now_[i] + (recorded - ranges_[i].first);
    }
    return recorded;
  }
  const Attended& attended() const { return attended_; }

 private:
  std::vector<std::pair<uintptr_t, size_t>> ranges_;  // addresses, bytes
  std::vector<uintptr_t> now_;
  Attended attended_ = {};
};

class Schedule {
 public:
  explicit Schedule(std::vector<std::pair<uintptr_t, size_t>> moving) : moving_(std::move(moving)) {}

  template <class Operator>
  void add(const Operator& recorded) {
    steps_.push_back({[recorded](const Moving& moving) {
                        Operator now = recorded;
                        move(now, moving);
                        run(now);
                      },
                      nullptr, {}, 0});
  }
  // `bases`, `stats` as of `Sum::begin`.
  void add_sum(Sum& sum, const uintptr_t bases[4], uintptr_t stats);

  size_t num_moving() const { return moving_.size(); }
  // Begin anew; `tags` of the sums, one each.
  void begin(std::vector<uintptr_t> now, const Attended& attended, std::vector<uint64_t> tags);
  // Go on until all is done, an exchange fails, or Python should look for signals.
  Outcome proceed(const Kernels& kernels, Clock::duration patience);

 private:
  struct Step {
    std::function<void(const Moving&)> run;
    Sum* sum;  // in place of `run`
    uintptr_t bases[4];
    uintptr_t stats;
  };

  static void move(RmsNorm&, const Moving&);
  static void move(Attention&, const Moving&);
  static void move(Combination&, const Moving&);
  static void move(Function&, const Moving&);
  static void move(PackedProduct&, const Moving&);
  static void move(DenseProduct&, const Moving&);

  Moving moving_;
  std::vector<Step> steps_;
  std::vector<uint64_t> tags_;
  size_t next_ = 0, next_sum_ = 0;
  bool under_way_ = false;  // the sum at next_
};

}  // namespace narrowcast
