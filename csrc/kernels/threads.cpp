#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace narrowcast {
namespace {

constexpr size_t kBytesForAThread = 1 << 20;  // some 100 us of work: waking a thread takes 5 to 50

class ScratchOwner {
 public:
  Scratch of(size_t num_features, size_t num_ranks) {
    const size_t values = num_features * sizeof(float) + kScratchSlack;
    const size_t codes = (num_features + kScratchSlack + 63) & ~size_t{63};
    const size_t group_row = num_features / kSmallestGroup + kScratchSlack / sizeof(float);
    const size_t groups = kGroupRows * group_row * sizeof(float);
    bytes_.resize(std::max(bytes_.size(), 3 * values + groups + num_ranks * codes));
    auto* start = bytes_.data();
    auto floats = [&](size_t offset) { return reinterpret_cast<float*>(start + offset); };
    uint8_t* first_code = start + 3 * values + groups;
    return {floats(0), floats(values), floats(2 * values), first_code, codes, floats(3 * values), group_row};
  }

 private:
  std::vector<uint8_t> bytes_;
};

thread_local ScratchOwner scratch;

using Clock = std::chrono::steady_clock;

// Spinning that lets others have the core after some 20 to 80 us, if any wait for it: they would be kept off it for
// milliseconds.
class Spin {
 public:
  void turn() {
    if (++num_turns_ > kTurnsAlone) return std::this_thread::yield();
#if defined(__SSE2__)
    _mm_pause();
#endif
  }

  // Long enough for the next layer's product to come; where others want the core, one turn may take longer.
  bool is_over() const { return num_turns_ > kTurnsAlone && Clock::now() - start_ > std::chrono::milliseconds(1); }

 private:
  static constexpr size_t kTurnsAlone = 2000;

  size_t num_turns_ = 0;
  const Clock::time_point start_ = Clock::now();
};

// Workers that take one part of a job each, always the same one, or find that the caller, which is done with its own,
// has taken it: so nobody waits for a thread that gets no core. After a job of theirs they spin for a while, then sleep.
class Pool {
 public:
  // Has as many workers, or as many as the system allows. While no job runs.
  void grow(size_t num_workers) {
    while (workers_.size() < std::min(num_workers, kMostWorkers)) {
      Worker& worker = workers_.emplace_back(workers_.size(), job_.load());
      try {
        std::thread([this, &worker] { serve(worker); }).detach();
      } catch (const std::system_error&) {
        return workers_.pop_back();
      }
    }
  }

  // Calls `part(index)` for indices below `num_parts`, 0 on this thread, and throws what one of them has thrown.
  void run(size_t num_parts, const std::function<void(size_t)>& part) {
    const size_t num_workers = std::min(num_parts - 1, workers_.size());
    part_ = &part;
    unfinished_.store(num_workers);
    const uint64_t job = (job_.load() / kJob + 1) * kJob + num_workers;
    job_.store(job);
    for (size_t i = 0; i < num_workers; ++i) workers_[i].wake_up();
    attempt(0);
    for (size_t index = num_workers + 1; index < num_parts; ++index) attempt(index);
    for (size_t i = num_workers; i-- > 0;) {
      if (workers_[i].take(job)) finish(i);
    }
    for (Spin spin; unfinished_.load(std::memory_order_acquire);) spin.turn();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  static constexpr uint64_t kJob = 1024;
  static constexpr size_t kMostWorkers = kJob - 1;

  struct alignas(64) Worker {
    Worker(size_t index, uint64_t job) : index(index), taken(job) {}

    // True for one of the two, worker and caller, who try to take the worker's part of a job.
    bool take(uint64_t job) {
      uint64_t before = taken.load();
      return before < job && taken.compare_exchange_strong(before, job);
    }

    bool has_part(uint64_t job) const { return index < job % kJob && taken.load() < job; }

    // The next job of which it has a part that is not taken. Others may pass by unseen.
    uint64_t next(const std::atomic<uint64_t>& jobs) {
      for (Spin spin; !spin.is_over(); spin.turn()) {
        const uint64_t job = jobs.load(std::memory_order_acquire);
        if (has_part(job)) return job;
      }
      uint64_t job = 0;
      std::unique_lock<std::mutex> lock(mutex);
      wake.wait(lock, [&] {
        is_asleep.store(true);  // before looking once more: whoever gives out a job looks here after it
        return has_part(job = jobs.load());
      });
      is_asleep.store(false);
      return job;
    }

    void wake_up() {
      if (!is_asleep.load() || !is_asleep.exchange(false)) return;
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_one();
    }

    const size_t index;
    std::atomic<uint64_t> taken;  // the last job whose part was
    std::atomic<bool> is_asleep{false};
    std::mutex mutex;
    std::condition_variable wake;
  };

  void serve(Worker& worker) {
    for (;;) {
      // Once a part is taken, the caller waits until it is finished: no job ends in between.
      if (worker.take(worker.next(job_))) finish(worker.index);
    }
  }

  void finish(size_t worker) {
    attempt(worker + 1);
    unfinished_.fetch_sub(1, std::memory_order_release);
  }

  void attempt(size_t index) {
    try {
      (*part_)(index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex_);
      error_ = std::current_exception();
    }
  }

  std::deque<Worker> workers_;  // which stay where they are
  const std::function<void(size_t)>* part_ = nullptr;
  std::mutex error_mutex_;
  std::exception_ptr error_;
  alignas(64) std::atomic<uint64_t> job_{0};  // its number and, in the low bits, how many workers it is for
  alignas(64) std::atomic<size_t> unfinished_{0};
};

std::atomic<size_t> most_threads{1};

// Never destroyed: at the end of the process the workers still wait in it.
struct {
  std::atomic<pid_t> holder{0};  // the process one of whose threads is at work with it: after a fork another one's
  Pool* pool = nullptr;
  pid_t process = 0;  // whose pool it is: a fork has no threads
} shared;

// Calls `part(index)` for all indices, by the pool unless another thread has it: whoever comes second works alone.
void share_out(size_t num_parts, const std::function<void(size_t)>& part) {
  const pid_t process = num_parts > 1 ? getpid() : 0;
  pid_t holder = shared.holder.load();
  if (num_parts < 2 || holder == process || !shared.holder.compare_exchange_strong(holder, process)) {
    for (size_t index = 0; index < num_parts; ++index) part(index);
    return;
  }
  struct Release {
    ~Release() { shared.holder.store(0); }
  } release;
  if (shared.process != process) {
    shared.pool = new Pool;
    shared.process = process;
  }
  shared.pool->grow(num_parts - 1);
  shared.pool->run(num_parts, part);
}

}  // namespace

void limit_threads(size_t most) { most_threads = std::max<size_t>(most, 1); }

void for_rows(size_t num_rows, size_t nbytes, size_t num_features, size_t num_ranks,
              const std::function<void(size_t, size_t, const Scratch&)>& work) {
  const size_t num_parts = std::min({most_threads.load(), nbytes / kBytesForAThread, num_rows});
  if (num_parts < 2) return work(0, num_rows, scratch.of(num_features, num_ranks));
  share_out(num_parts, [&](size_t part) {
    work(part * num_rows / num_parts, (part + 1) * num_rows / num_parts, scratch.of(num_features, num_ranks));
  });
}

void for_parts(size_t num_parts, const std::function<void(size_t, size_t)>& work) {
  share_out(num_parts, [&](size_t part) { work(part, num_parts); });
}

}  // namespace narrowcast
