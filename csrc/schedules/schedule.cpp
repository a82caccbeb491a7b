#include "schedule.h"

#include <algorithm>

#include "decode/run.h"
#include "kernels/paths.h"
#include "weights/product.h"

namespace narrowcast {
namespace {

template <class T>
void move_address(T*& address, const Moving& moving) {
  address = reinterpret_cast<T*>(moving.at(reinterpret_cast<uintptr_t>(address)));
}

}  // namespace

void run(const RmsNorm& n) { norm(n); }
void run(const Attention& a) { attend(a); }
void run(const Combination& c) { combine(c); }
void run(const Function& f) { look_up(f); }
void run(const PackedProduct& p) {
  multiply(*selected_kernels()->weights, p.matrix, p.part, p.x, p.bias, p.y, p.num_threads);
}
void run(const DenseProduct& p) {
  multiply_dense(*selected_kernels()->weights, p.matrix, p.x, p.bias, p.y, p.num_threads);
}

void Schedule::move(RmsNorm& n, const Moving& moving) {
  move_address(n.x, moving);
  move_address(n.weight, moving);
  move_address(n.out, moving);
}

void Schedule::move(Attention& a, const Moving& moving) {
  for (Heads* heads : {&a.q, &a.out, &a.added.k, &a.added.v}) move_address(heads->data, moving);
  move_address(a.added.cos, moving);
  move_address(a.added.sin, moving);
  const Attended& now = moving.attended();
  const Mask recorded = a.mask;
  a.k = now.k;
  a.v = now.v;
  a.context = now.context;
  a.mask = now.mask;
  a.mask.kind = recorded.kind;
  a.mask.dtype = recorded.dtype;
}

void Schedule::move(Combination& c, const Moving& moving) {
  for (Rows* rows : {&c.a, &c.b, &c.out}) move_address(rows->data, moving);
}

void Schedule::move(Function& f, const Moving& moving) {
  move_address(f.x.data, moving);
  move_address(f.out.data, moving);
}

void Schedule::move(PackedProduct& p, const Moving& moving) {
  move_address(p.x.data, moving);
  move_address(p.y.data, moving);
}

void Schedule::move(DenseProduct& p, const Moving& moving) {
  move_address(p.x.data, moving);
  move_address(p.y.data, moving);
}

void Schedule::add_sum(Sum& sum, const uintptr_t bases[4], uintptr_t stats) {
  Step step{};
  step.sum = &sum;
  std::copy(bases, bases + 4, step.bases);
  step.stats = stats;
  steps_.push_back(std::move(step));
}

void Schedule::begin(std::vector<uintptr_t> now, const Attended& attended, std::vector<uint64_t> tags) {
  moving_.begin(std::move(now), attended);
  tags_ = std::move(tags);
  next_ = next_sum_ = 0;
  under_way_ = false;
}

Outcome Schedule::proceed(const Kernels& kernels, Clock::duration patience) {
  for (; next_ < steps_.size(); ++next_) {
    const Step& step = steps_[next_];
    if (step.sum == nullptr) {
      step.run(moving_);
      continue;
    }
    if (!under_way_) {
      uintptr_t bases[4];
      std::transform(step.bases, step.bases + 4, bases, [&](uintptr_t address) { return moving_.at(address); });
      step.sum->begin(bases, reinterpret_cast<int64_t*>(moving_.at(step.stats)), tags_.at(next_sum_++));
      under_way_ = true;
    }
    Outcome outcome = step.sum->proceed(kernels, patience);
    if (outcome.trouble != Trouble::none) return outcome;
    under_way_ = false;
  }
  return {};
}

}  // namespace narrowcast
