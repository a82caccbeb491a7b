#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
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

// Let others have the core, if any wait for it: a spinning thread would keep them off for milliseconds.
void give_way(size_t turn) {
  constexpr size_t kTurnsAlone = 2000;  // some 20 to 80 us
#if defined(__SSE2__)
  if (turn < kTurnsAlone) return _mm_pause();
#else
  if (turn < kTurnsAlone) return;
#endif
  std::this_thread::yield();
}

// Workers that take one part of a job each. They spin for a while after one, as the next layer's comes soon, then sleep.
// Made when first needed, and again after a fork.
class Pool {
 public:
  explicit Pool(size_t num_workers) {
    for (size_t worker = 0; worker < num_workers; ++worker) {
      std::thread([this, worker] { serve(worker); }).detach();
    }
  }

  // Calls `part(index)` for indices below `num_parts`, 0 on this thread.
  void run(size_t num_parts, const std::function<void(size_t)>& part) {
    part_ = &part;
    unfinished_.store(num_parts - 1);
    job_.store((job_.load() / kMostParts + 1) * kMostParts + num_parts);
    if (num_asleep_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    part(0);
    for (size_t turn = 0; unfinished_.load(std::memory_order_acquire); ++turn) give_way(turn);
  }

 private:
  static constexpr uint64_t kMostParts = 1 << 16;
  static constexpr size_t kTurns = 4000;  // of spinning before sleeping: some 1 ms where nobody else wants the core

  void serve(size_t worker) {
    for (uint64_t seen = 0;;) {
      seen = next_job(seen);
      // Whoever has no part looks at nothing else: the caller does not wait for it, and may be at the next job.
      if (worker + 1 >= seen % kMostParts) continue;
      (*part_)(worker + 1);
      unfinished_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint64_t next_job(uint64_t seen) {
    for (size_t turn = 0; turn < kTurns; ++turn) {
      const uint64_t job = job_.load(std::memory_order_acquire);
      if (job != seen) return job;
      give_way(turn);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++num_asleep_;  // before looking once more: whoever gives out a job looks here after it
    wake_.wait(lock, [&] { return job_.load() != seen; });
    --num_asleep_;
    return job_.load();
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void(size_t)>* part_ = nullptr;
  std::atomic<uint64_t> job_{0};  // its number and, in the low bits, how many parts it has
  std::atomic<size_t> unfinished_{0}, num_asleep_{0};
};

std::atomic<size_t> most_threads{1};

// Never destroyed: at the end of the process the workers still wait in it.
struct {
  std::mutex mutex;
  Pool* pool = nullptr;
  size_t num_workers = 0;
  pid_t process = 0;
} shared;

// The pool, of one caller at a time; null where another thread has it: whoever comes second works alone.
Pool* take_pool(size_t num_workers) {
  if (!shared.mutex.try_lock()) return nullptr;
  if (shared.process != getpid() || shared.num_workers < num_workers) {
    shared.pool = new Pool(num_workers);  // threads of the one before wait for ever, or are not there after a fork
    shared.num_workers = num_workers;
    shared.process = getpid();
  }
  return shared.pool;
}

}  // namespace

void limit_threads(size_t most) { most_threads = std::max<size_t>(most, 1); }

void for_rows(size_t num_rows, size_t nbytes, size_t num_features, size_t num_ranks,
              const std::function<void(size_t, size_t, const Scratch&)>& work) {
  const size_t num_parts = std::min({most_threads.load(), nbytes / kBytesForAThread, num_rows});
  Pool* pool = num_parts > 1 ? take_pool(num_parts - 1) : nullptr;
  if (!pool) {
    work(0, num_rows, scratch.of(num_features, num_ranks));
    return;
  }
  pool->run(num_parts, [&](size_t part) {
    work(part * num_rows / num_parts, (part + 1) * num_rows / num_parts, scratch.of(num_features, num_ranks));
  });
  shared.mutex.unlock();
}

void for_parts(size_t num_parts, const std::function<void(size_t, size_t)>& work) {
  Pool* pool = num_parts > 1 ? take_pool(num_parts - 1) : nullptr;
  if (!pool) {
    for (size_t part = 0; part < num_parts; ++part) work(part, num_parts);
    return;
  }
  pool->run(num_parts, [&](size_t part) { work(part, num_parts); });
  shared.mutex.unlock();
}

}  // namespace narrowcast
