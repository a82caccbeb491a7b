#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <memory>

#include "emulator.h"

namespace narrowcast {
namespace {

constexpr size_t kLargest = kHeader + 65535;
constexpr int kBatch = 8;             // packets read from one link before all are looked at again
constexpr int64_t kSecond = 1000000000;
constexpr int64_t kShortWait = 3000;  // ns: less than going to sleep and waking up takes

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * kSecond + time.tv_nsec;
}

struct Packet {
  int64_t due;  // when it arrives
  size_t offset, size;
};

// What one rank sends: packets in the order in which they were sent, their bytes in a ring.
class Link {
 public:
  Link(int fd, double ns_per_byte, int64_t delay_ns, size_t queue_bytes)
      : fd_(fd),
        ns_per_byte_(ns_per_byte),
        delay_ns_(delay_ns),
        queue_ns_(std::llround(queue_bytes * ns_per_byte)),
        size_(queue_bytes + static_cast<size_t>(delay_ns / ns_per_byte) + 16 * kLargest),
        ring_(new uint8_t[size_]) {}

  int fd() const { return fd_; }
  bool due(int64_t now) const { return !packets_.empty() && packets_.front().due <= now; }
  int64_t next(int64_t otherwise) const { return packets_.empty() ? otherwise : packets_.front().due; }

  // Takes a packet that the rank has sent; false if there is none. One that finds the queue full is lost.
  bool take() {
    if (!make_room()) return false;
    ssize_t taken = read(fd_, ring_.get() + head_, kLargest);
    if (taken <= static_cast<ssize_t>(kHeader)) return false;
    int64_t now = now_ns(), start = std::max(now, free_at_);
    if (start - now > queue_ns_) return true;
    free_at_ = start + std::llround((taken - kHeader) * ns_per_byte_);
    packets_.push_back({free_at_ + delay_ns_, head_, static_cast<size_t>(taken)});
    head_ += taken;
    return true;
  }

  // Hands the first packet to the rank that it is for: 10.78.0.1 is rank 0. What is not IPv4 ends here.
  void deliver(const std::vector<Link>& links) {
    const Packet packet = packets_.front();
    const uint8_t* bytes = ring_.get() + packet.offset;
    packets_.pop_front();
    const uint8_t* datagram = bytes + kHeader;
    if (packet.size < kHeader + 20 || datagram[0] >> 4 != 4) return;
    size_t rank = static_cast<size_t>(datagram[19]) - 1;
    if (rank < links.size() && write(links[rank].fd_, bytes, packet.size) < 0) return;  // lost, as on any wire
  }

 private:
  // Packets lie in one piece: at the end of the ring too little may be left for the largest.
  bool make_room() {
    if (packets_.empty()) {
      head_ = 0;
      return true;
    }
    size_t tail = packets_.front().offset;
    if (head_ <= tail) return tail - head_ > kLargest;
    if (size_ - head_ >= kLargest) return true;
    if (tail <= kLargest) return false;
    head_ = 0;
    return true;
  }

  int fd_;
  double ns_per_byte_;
  int64_t delay_ns_, queue_ns_;
  int64_t free_at_ = 0;
  size_t size_, head_ = 0;
  std::unique_ptr<uint8_t[]> ring_;
  std::deque<Packet> packets_;
};

void sleep_until(int64_t due, std::vector<pollfd>& polled) {
  int64_t left = due - now_ns();
  if (left <= kShortWait) return;
  timespec time{static_cast<time_t>(left / kSecond), static_cast<long>(left % kSecond)};
  if (ppoll(polled.data(), polled.size(), &time, nullptr) < 0 && errno != EINTR) fail("waiting for packets");
}

}  // namespace

void carry(const std::vector<int>& devices, double rate_bps, double delay_s, size_t queue_bytes) {
  prctl(PR_SET_TIMERSLACK, 1);
  sched_param first{1};  // a wire does not wait until the ranks have computed; where that is refused, it does
  sched_setscheduler(0, SCHED_FIFO, &first);
  std::vector<Link> links;
  std::vector<pollfd> polled;
  for (int fd : devices) {
    links.emplace_back(fd, 8e9 / rate_bps, std::llround(delay_s * 1e9), queue_bytes);
    polled.push_back({fd, POLLIN, 0});
  }
  for (;;) {
    bool busy = false;
    int64_t next = now_ns() + kSecond;
    for (Link& link : links) {
      for (int taken = 0; taken < kBatch && link.take(); ++taken) busy = true;
      for (; link.due(now_ns()); busy = true) link.deliver(links);
      next = std::min(next, link.next(next));
    }
    if (!busy) sleep_until(next, polled);
  }
}

}  // namespace narrowcast
