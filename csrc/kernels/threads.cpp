#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>

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

// Workers that wait for a job and take one part of it each. Made when first needed, and again after a fork.
class Pool {
 public:
  explicit Pool(size_t num_workers) {
    for (size_t worker = 0; worker < num_workers; ++worker) {
      std::thread([this, worker] { serve(worker); }).detach();
    }
  }

  // Calls `part(index)` for indices below `num_parts`, 0 on this thread.
  void run(size_t num_parts, const std::function<void(size_t)>& part) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      part_ = &part;
      num_parts_ = num_parts;
      unfinished_ = num_parts - 1;
      ++job_;
    }
    wake_.notify_all();
    part(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return unfinished_ == 0; });
  }

 private:
  void serve(size_t worker) {
    size_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (worker + 1 >= num_parts_) continue;
      const std::function<void(size_t)>* part = part_;
      lock.unlock();
      (*part)(worker + 1);
      lock.lock();
      if (--unfinished_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(size_t)>* part_ = nullptr;
  size_t num_parts_ = 0, unfinished_ = 0, job_ = 0;
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

}  // namespace narrowcast
