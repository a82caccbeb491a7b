#include "connection.h"

#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

namespace narrowcast {

namespace {

constexpr size_t kTurnBytes = 1 << 20;  // then the other direction, and the other connections, have their turn
constexpr uint64_t kLargestFrame = uint64_t(1) << 40;
constexpr uint64_t kEarlyLimit = uint64_t(1) << 30;
constexpr size_t kKernelHolds = 1 << 17;  // tcp_rmem's usual default: a sender gets this far with nobody reading

}  // namespace

Wakeup::Wakeup() : fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}

Wakeup::~Wakeup() { ::close(fd_); }

void Wakeup::wake() const { (void)!::eventfd_write(fd_, 1); }

void Wakeup::clear() const {
  eventfd_t count;
  (void)!::eventfd_read(fd_, &count);
}

void Operation::fail(Outcome outcome) {
  if (failed.load()) return;
  failure = std::move(outcome);
  failed.store(true, std::memory_order_release);
  if (sleeper != nullptr) sleeper->wake();
}

// Once `left` is 0 the operation may be gone.
void Operation::release(Transfer& transfer) {
  Operation& operation = *transfer.operation;
  const Wakeup* sleeper = operation.sleeper;
  transfer.finished = true;
  if (operation.left.fetch_sub(1, std::memory_order_acq_rel) == 1 && sleeper != nullptr) sleeper->wake();
}

Connection::Connection(int fd, int peer) : fd_(fd), peer_(peer) {}

Connection::~Connection() { break_off("was closed"); }

Outcome Connection::lost() const { return {Trouble::lost, peer_, reason_, 0, 0}; }

void Connection::fail(Transfer& transfer) {
  transfer.operation->fail(lost());
  Operation::release(transfer);
}

void Connection::break_off(const std::string& reason) {
  if (!is_open()) return;
  ::close(std::exchange(fd_, -1));
  reason_ = reason;
  held_ = false;
  for (Transfer* transfer : std::exchange(sends_, {})) fail(*transfer);
  for (Transfer* transfer : std::exchange(receives_, {})) fail(*transfer);
  if (in_frame_ && frame_.receive != nullptr) fail(*frame_.receive);
  in_frame_ = false;
}

bool Connection::needs_help() const {
  if (!is_open()) return false;
  if (!sends_.empty()) return true;
  if (in_frame_ && frame_.receive != nullptr && frame_.left() > kKernelHolds) return true;
  return std::any_of(receives_.begin(), receives_.end(), [](auto* each) { return each->nbytes > kKernelHolds; });
}

void Connection::send(Transfer& transfer) {
  if (!is_open()) return fail(transfer);
  sends_.push_back(&transfer);
  if (sends_.size() == 1) write();
}

size_t Connection::write() {
  size_t moved = 0;
  while (is_open() && !sends_.empty() && moved < kTurnBytes) {
    Transfer& transfer = *sends_.front();
    Header header{transfer.tag, transfer.nbytes};
    const size_t of_header = std::min(transfer.done, sizeof header), of_payload = transfer.done - of_header;
    const size_t payload_left = std::min(transfer.nbytes - of_payload, kTurnBytes);
    iovec parts[] = {{reinterpret_cast<char*>(&header) + of_header, sizeof header - of_header},
                     {transfer.data + of_payload, payload_left}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    const ssize_t sent = ::sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) break;
      const std::string reason = std::strerror(errno);
      read_rest();
      break_off(reason);
      break;
    }
    moved += sent;
    transfer.done += sent;
    if (transfer.done == sizeof header + transfer.nbytes) {
      sends_.pop_front();
      Operation::release(transfer);
    }
  }
  return moved;
}

// A peer that sent its last bytes and left breaks our sends, but not what it has sent.
void Connection::read_rest() {
  while (is_open() && !held_ && read() > 0) {
  }
}

size_t Connection::read() {
  size_t moved = 0;
  while (is_open() && !held_ && moved < kTurnBytes) {
    char waste[kInboxBytes];
    iovec parts[2];
    int num_parts = 0;
    if (in_frame_) {  // then the inbox is empty, and takes what follows the payload
      const bool wasted = frame_.target == nullptr;
      parts[num_parts++] = wasted ? iovec{waste, std::min(frame_.left(), sizeof waste)}
                                  : iovec{frame_.target + frame_.done, std::min(frame_.left(), kTurnBytes)};
    }
    const size_t payload = in_frame_ ? parts[0].iov_len : 0;
    if (!in_frame_ || payload == frame_.left()) parts[num_parts++] = {inbox_ + inbox_end_, kInboxBytes - inbox_end_};
    const ssize_t got = ::readv(fd_, parts, num_parts);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) break;
    if (got <= 0) {
      break_off(got == 0 ? "it closed the connection" : std::strerror(errno));
      break;
    }
    moved += got;
    const size_t into_frame = std::min<size_t>(got, payload);
    frame_.done += into_frame;
    inbox_end_ += got - into_frame;
    if (in_frame_ && frame_.left() == 0) end_frame();
    digest();
    const size_t asked = payload + (num_parts == 2 || payload == 0 ? parts[num_parts - 1].iov_len : 0);
    if (size_t(got) < asked) break;  // there was no more
  }
  return moved;
}

void Connection::digest() {
  while (is_open() && !held_) {
    const size_t available = inbox_end_ - inbox_begin_;
    if (in_frame_) {
      const size_t taken = std::min(available, frame_.left());
      if (frame_.target != nullptr) std::memcpy(frame_.target + frame_.done, inbox_ + inbox_begin_, taken);
      frame_.done += taken;
      inbox_begin_ += taken;
      if (frame_.left() > 0) break;
      end_frame();
    } else if (available >= sizeof(Header)) {
      Header header;
      std::memcpy(&header, inbox_ + inbox_begin_, sizeof header);
      inbox_begin_ += sizeof header;
      open_frame(header);
    } else {
      break;
    }
  }
  std::memmove(inbox_, inbox_ + inbox_begin_, inbox_end_ - inbox_begin_);
  inbox_end_ -= std::exchange(inbox_begin_, 0);
}

void Connection::open_frame(Header header) {
  if (header.nbytes == 0 || header.nbytes > kLargestFrame) return break_off("it sent what is no frame");
  const auto posted = std::find_if(receives_.begin(), receives_.end(), [&](auto* each) { return each->tag == header.tag; });
  frame_ = Frame{header};
  in_frame_ = true;
  if (posted != receives_.end()) {
    Transfer& transfer = **posted;
    receives_.erase(posted);
    return deliver_to(transfer);
  }
  if (early_nbytes_ + header.nbytes <= kEarlyLimit) frame_.early.reset(new (std::nothrow) char[header.nbytes]);
  if (frame_.early == nullptr) {
    in_frame_ = false;
    held_ = true;
    held_header_ = header;
    return;
  }
  early_nbytes_ += header.nbytes;
  frame_.target = frame_.early.get();
}

// The frame that is being read belongs to `transfer`.
void Connection::deliver_to(Transfer& transfer) {
  const bool fitting = fits(transfer, frame_.header.nbytes);
  if (fitting) {
    if (frame_.early != nullptr) std::memcpy(transfer.data, frame_.early.get(), frame_.done);
    frame_.receive = &transfer;
  }
  frame_.target = fitting ? transfer.data : nullptr;
  if (frame_.early != nullptr) {
    frame_.early.reset();
    early_nbytes_ -= frame_.header.nbytes;
  }
}

void Connection::end_frame() {
  in_frame_ = false;
  if (frame_.receive != nullptr) return Operation::release(*frame_.receive);
  if (frame_.early != nullptr) early_.emplace(frame_.header.tag, Early{std::move(frame_.early), frame_.header.nbytes});
}

bool Connection::fits(Transfer& transfer, uint64_t nbytes) {
  if (transfer.nbytes == nbytes) return true;
  transfer.operation->fail({Trouble::mismatch, peer_, "", nbytes, transfer.nbytes});
  Operation::release(transfer);
  return false;
}

void Connection::receive(Transfer& transfer) {
  const auto early = early_.lower_bound(transfer.tag);
  if (early != early_.end() && early->first == transfer.tag) {
    const Early frame = std::move(early->second);
    early_.erase(early);
    early_nbytes_ -= frame.nbytes;
    if (fits(transfer, frame.nbytes)) {
      std::memcpy(transfer.data, frame.bytes.get(), frame.nbytes);
      Operation::release(transfer);
    }
    resume();
  } else if (!is_open()) {
    fail(transfer);
  } else if (in_frame_ && frame_.early != nullptr && frame_.header.tag == transfer.tag) {
    deliver_to(transfer);
  } else {
    receives_.push_back(&transfer);
    resume();
  }
}

// There may be room now, or a receive, for the frame that there was none for.
void Connection::resume() {
  if (!held_) return;
  held_ = false;
  open_frame(held_header_);
  digest();
}

}  // namespace narrowcast
