// The mesh under sanitizers, without Python: tests/test_sanitized.py builds and runs it.
//   fuzz N       N broken peers, each of which sends frames cut anywhere, of any size, before or after the receives
//   threads N    N exchanges of each of four threads at both ends, in any order
//   sums N       N sums of one recording at both ends, then some whose peer goes away in the middle
// Ends with 0 if every exchange came to a right payload or a clear outcome; sanitizers abort.
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>

#include "../csrc/sums/sum.h"

using namespace narrowcast;

namespace {

std::mt19937_64 chance(1);

uint64_t pick(std::initializer_list<uint64_t> values) { return values.begin()[chance() % values.size()]; }

Clock::time_point in(std::chrono::microseconds time) { return Clock::now() + time; }

std::string frames(size_t expected) {
  std::string bytes;
  for (uint64_t count = chance() % 5; count > 0; --count) {
    // The most that is kept of a frame before its receive, seldom: sanitizers mark every byte of that room.
    const uint64_t most = uint64_t(1) << (chance() % 32 ? 20 : 30);
    uint64_t header[] = {pick({5, 5, 6, 0, ~uint64_t(0)}),
                         pick({0, 1, 63, 64, 65, expected, 16384, 30000, most, (1 << 30) + 1, uint64_t(1) << 40,
                               (uint64_t(1) << 40) + 1, ~uint64_t(0), chance()})};
    bytes.append(reinterpret_cast<char*>(header), sizeof header);
    bytes.append(pick({0, 1, std::min<uint64_t>(header[1], 40000)}), 'x');
  }
  if (!bytes.empty() && chance() % 3 == 0) bytes.resize(chance() % bytes.size());
  return bytes;
}

void feed(int socket, const std::string& bytes) {
  for (size_t done = 0; done < bytes.size();) {
    const size_t piece = std::min<size_t>(bytes.size() - done, chance() % 2 ? 7 + chance() % 100 : 50000);
    const ssize_t sent = ::send(socket, bytes.data() + done, piece, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent <= 0) break;
    done += sent;
  }
  if (chance() % 2) ::shutdown(socket, SHUT_WR);
}

void fuzz(int rounds) {
  int outcomes[5] = {};
  for (int round = 0; round < rounds; ++round) {
    int ends[2];
    ::socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
    std::vector<char> small(64 + chance() % 3 * 20000), large(30000), payload(1000);
    const std::string bytes = frames(small.size());
    const bool early = chance() % 2;
    Mesh mesh({-1, ends[1]}, chance() % 2);
    if (early) feed(ends[0], bytes);
    auto first = mesh.exchange({}, {{1, small.data(), small.size()}}, 5);
    auto second = mesh.exchange({{1, payload.data(), payload.size()}}, {{1, large.data(), large.size()}}, pick({5, 6}));
    if (!early) feed(ends[0], bytes);
    for (Operation* operation : {first.get(), second.get()})
      ++outcomes[int(Engine::get().wait(*operation, in(std::chrono::microseconds(300)), chance() % 2).trouble)];
    Engine::get().hang_up("the round is over");  // operations outlive their transfers
    ::close(ends[0]);
  }
  for (const Trouble each : {Trouble::none, Trouble::lost, Trouble::timeout, Trouble::mismatch})
    if (outcomes[int(each)] == 0) std::abort();  // then this tries too little
}

void exchange(Mesh& mesh, int peer, int thread, int rounds) {
  std::mt19937 sizes(thread);  // alike at both ends
  for (int round = 0; round < rounds; ++round) {
    const size_t nbytes = sizes() % 3 == 0 ? 300000 : 1 + sizes() % 20000;
    std::vector<char> payload(nbytes, char(round)), room(nbytes);
    auto operation = mesh.exchange({{peer, payload.data(), nbytes}}, {{peer, room.data(), nbytes}}, thread * 100000 + round);
    if (round % 7 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    Outcome outcome;
    do outcome = Engine::get().wait(*operation, in(std::chrono::seconds(20)), thread % 2);
    while (outcome.trouble == Trouble::interrupted);
    if (outcome.trouble != Trouble::none || room != payload) std::abort();
  }
}

void threads(int rounds) {
  int ends[2];
  ::socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
  Mesh left({-1, ends[0]}, true), right({ends[1], -1}, true);
  std::vector<std::thread> all;
  for (int thread = 0; thread < 4; ++thread) {
    all.emplace_back([&, thread] { exchange(left, 1, thread, rounds); });
    all.emplace_back([&, thread] { exchange(right, 0, thread, rounds); });
  }
  for (std::thread& thread : all) thread.join();
}

// Two ranks' bytes in place of a codec: what is encoded is copied, what is decoded is added up.
constexpr size_t kTokens = 4, kFeatures = 512, kNbytes = kTokens * kFeatures;

void copy(const Format&, const Rows& x, size_t, const Payload& out, Counts& counts, const Scratch&, size_t begin, size_t end) {
  for (size_t row = begin; row < end; ++row)
    std::memcpy(out.data + row * out.stride, static_cast<const char*>(x.data) + row * x.stride, kFeatures);
  counts.saturated += end - begin;
}

void add_up(const Format&, const Payloads& in, const Rows& out, const Scratch&, size_t begin, size_t end) {
  for (size_t row = begin; row < end; ++row)
    for (size_t i = 0; i < kFeatures; ++i) {
      const uint8_t* first = in.first.data + row * in.first.stride + i;
      static_cast<uint8_t*>(out.data)[row * out.stride + i] = uint8_t(first[0] + first[in.rank_stride]);
    }
}

const Kernels copying = {"copying", copy, nullptr, add_up, nullptr};

// A sum of one rank of two, as it is recorded.
struct Recorded {
  Recorded(Mesh& mesh, int rank) : payloads(2 * kNbytes), sum(mesh) {
    char* own = payloads.data() + rank * kNbytes;
    Step encode = coding(Action::encode, Base::x, own), decode = coding(Action::decode_sum, Base::y, payloads.data());
    decode.num_ranks = 2;
    decode.rank_stride = kNbytes;
    sum.add(std::move(encode));
    sum.add_exchange({{1 - rank, own, kNbytes}}, {{1 - rank, payloads.data() + (1 - rank) * kNbytes, kNbytes}});
    sum.add(std::move(decode));
  }

  static Step coding(Action action, Base values, char* payload) {
    static const Format format{};
    Step step{};
    step.action = action;
    step.format = &format;
    step.num_tokens = kTokens;
    step.num_features = kFeatures;
    step.values = {{values, 0}, Dtype{}, kFeatures};
    step.payload = {{Base::none, reinterpret_cast<uintptr_t>(payload)}, kFeatures};
    return step;
  }

  Outcome run(std::vector<char>& x, std::vector<char>& y, uint64_t tag, std::chrono::milliseconds patience) {
    const uintptr_t bases[] = {0, reinterpret_cast<uintptr_t>(x.data()), reinterpret_cast<uintptr_t>(y.data()), 0};
    sum.begin(bases, stats, tag);
    return sum.proceed(copying, patience);
  }

  std::vector<char> payloads;
  int64_t stats[3] = {};
  Sum sum;
};

void add_together(Mesh& mesh, int rank, int rounds) {
  Recorded recorded(mesh, rank);
  for (int round = 0; round < rounds; ++round) {
    std::vector<char> x(kNbytes, char(round + 7 * rank)), y(kNbytes);
    Outcome outcome;
    const uintptr_t bases[] = {0, reinterpret_cast<uintptr_t>(x.data()), reinterpret_cast<uintptr_t>(y.data()), 0};
    recorded.sum.begin(bases, recorded.stats, 2 * round);
    do outcome = recorded.sum.proceed(copying, std::chrono::seconds(20));
    while (outcome.trouble == Trouble::interrupted);
    if (outcome.trouble != Trouble::none || y != std::vector<char>(kNbytes, char(2 * round + 7))) std::abort();
  }
  if (recorded.stats[0] != int64_t(rounds * kTokens)) std::abort();
}

void sums(int rounds) {
  int ends[2];
  ::socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
  {
    Mesh left({-1, ends[0]}, true), right({ends[1], -1}, false);
    std::thread other([&] { add_together(right, 1, rounds); });
    add_together(left, 0, rounds);
    other.join();
  }
  for (int round = 0; round < 100; ++round) {  // what travels outlives the sum that gave it up
    ::socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
    Mesh mesh({-1, ends[1]}, round % 2);
    std::vector<char> x(kNbytes), y(kNbytes);
    Recorded recorded(mesh, 0);
    if (round % 3 == 0) ::close(ends[0]);
    const Outcome outcome = recorded.run(x, y, 5, std::chrono::milliseconds(2));
    if (outcome.trouble != (round % 3 == 0 ? Trouble::lost : Trouble::timeout)) std::abort();
    const auto left = recorded.sum.abandon();
    if (left.empty() != (round % 3 == 0)) std::abort();
    Engine::get().hang_up("the round is over");
    if (round % 3 != 0) ::close(ends[0]);
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::string what = arguments[1];
  (what == "fuzz" ? fuzz : what == "sums" ? sums : threads)(std::atoi(arguments[2]));
  std::puts("done");
}
