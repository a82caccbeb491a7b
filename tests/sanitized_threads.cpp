// Threads that share rows and parts out, from many callers at once, for sanitizers: `threads calls|forks ROUNDS`.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/threads.h"

using namespace narrowcast;

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::_Exit(1);
}

// Parts write what is not atomic, and the caller reads it.
void share_parts_out(size_t num_parts) {
  std::vector<int> times(num_parts, 0);
  for_parts(num_parts, [&](size_t index, size_t of) {
    check(of == num_parts, "all know how many parts there are");
    times[index] += 1;
  });
  for (int each : times) check(each == 1, "each part is worked on once");
}

void share_rows_out(size_t num_rows) {
  std::vector<int> times(num_rows, 0);
  for_rows(num_rows, 8 << 20, 100, 2, [&](size_t begin, size_t end, const Scratch& scratch) {
    scratch.values[0] = float(begin);
    for (size_t row = begin; row < end; ++row) times[row] += 1;
  });
  for (int each : times) check(each == 1, "each row is worked on once");
}

// Parts that are still at work would write to what is no more.
void fail_in_parts(size_t num_parts, size_t failing) {
  try {
    std::vector<int> times(num_parts, 0);
    for_parts(num_parts, [&](size_t index, size_t) {
      if (index == failing) throw std::runtime_error("a part");
      times[index] += 1;
    });
    check(false, "what a part throws is thrown");
  } catch (const std::runtime_error&) {
  }
}

void call(unsigned seed, int num_rounds) {
  std::mt19937 dice(seed);
  for (int round = 0; round < num_rounds; ++round) {
    const size_t num_parts = 1 + dice() % 6;
    share_parts_out(num_parts);
    if (dice() % 8 == 0) share_rows_out(1 + dice() % 9);
    if (dice() % 8 == 0) fail_in_parts(num_parts, dice() % num_parts);
    if (dice() % 16 == 0) limit_threads(1 + dice() % 5);
    if (dice() % 64 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));  // workers fall asleep
  }
}

// While another thread is at work with the pool.
void fork_and_call(int num_rounds) {
  std::atomic<bool> is_over{false};
  std::thread other([&] {
    while (!is_over) share_parts_out(3);
  });
  for (int round = 0; round < num_rounds; ++round) {
    const pid_t child = fork();
    if (!child) {
      call(unsigned(round), 20);
      std::_Exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    check(status == 0, "a forked process has threads of its own");
  }
  is_over = true;
  other.join();
}

}  // namespace

int main(int argc, char** argv) {
  check(argc == 3, "a kind and a number of rounds are given");
  const int num_rounds = std::atoi(argv[2]);
  if (std::string(argv[1]) == "forks") {
    fork_and_call(num_rounds);
  } else {
    std::vector<std::thread> callers;
    for (unsigned seed = 0; seed < 3; ++seed) callers.emplace_back(call, seed, num_rounds);
    for (std::thread& caller : callers) caller.join();
    call(3, num_rounds);
  }
  std::puts("done");
}
