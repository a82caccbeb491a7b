// One TCP connection to one peer: frames out of and into the callers' buffers. Knows no threads and no Python; whoever
// calls holds the engine's mutex (mesh.h).
//
// A frame is a header of 16 bytes (tag, nbytes) in the byte order of x86 and ARM, and nbytes of payload. A frame whose
// receive has not been posted yet is kept; one whose size contradicts its receive fails that, and is read over.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace narrowcast {

enum class Trouble { none, lost, timeout, mismatch, interrupted };

struct Outcome {
  Trouble trouble = Trouble::none;
  int peer = -1;
  std::string reason;
  uint64_t found = 0, expected = 0;  // bytes, of a mismatch
};

// Wakes a thread that sleeps in ppoll.
class Wakeup {
 public:
  Wakeup();
  ~Wakeup();
  Wakeup(const Wakeup&) = delete;
  void wake() const;
  void clear() const;
  int fd() const { return fd_; }

 private:
  int fd_;
};

class Connection;
struct Operation;

struct Transfer {
  Operation* operation;
  Connection* connection;
  bool sending;
  uint64_t tag;
  char* data;
  size_t nbytes;
  size_t done = 0;        // of a send: with its header
  bool finished = false;  // the engine is through with it, well or not
};

// Transfers that are waited for together. Lives as long as any of them is not `finished`.
struct Operation {
  std::vector<Transfer> transfers;  // receives, then sends, each in the order of ranks
  std::atomic<int> left{0};         // transfers that the engine may still touch
  std::atomic<bool> failed{false};
  Outcome failure;
  const Wakeup* sleeper = nullptr;  // who sleeps until it is settled

  bool settled() const { return failed.load(std::memory_order_acquire) || left.load(std::memory_order_acquire) == 0; }
  void fail(Outcome outcome);
  static void release(Transfer& transfer);
};

class Connection {
 public:
  Connection(int fd, int peer);
  ~Connection();
  Connection(const Connection&) = delete;

  void send(Transfer& transfer);
  void receive(Transfer& transfer);
  // Hand to the kernel, and take from it, what it takes and has; bytes moved.
  size_t write();
  size_t read();
  // Fail whatever is under way, and all that is started later. Frames that came whole can still be received.
  void break_off(const std::string& reason);

  bool is_open() const { return fd_ >= 0; }
  int fd() const { return fd_; }
  int peer() const { return peer_; }
  bool wants_to_write() const { return !sends_.empty(); }
  bool wants_to_read() const { return !held_; }
  // Bytes under way that the kernel's buffers may not hold: somebody should go on moving them.
  bool needs_help() const;

 private:
  struct Header {
    uint64_t tag, nbytes;
  };
  struct Early {
    std::unique_ptr<char[]> bytes;
    size_t nbytes;
  };
  struct Frame {
    Header header;
    size_t done = 0;
    char* target = nullptr;  // null: read over
    Transfer* receive = nullptr;
    std::unique_ptr<char[]> early;
    size_t left() const { return header.nbytes - done; }
  };

  static constexpr size_t kInboxBytes = 16384;

  void digest();
  void open_frame(Header header);
  void end_frame();
  void deliver_to(Transfer& transfer);
  void resume();
  void read_rest();
  bool fits(Transfer& transfer, uint64_t nbytes);
  Outcome lost() const;
  void fail(Transfer& transfer);

  int fd_;
  const int peer_;
  std::string reason_;
  std::deque<Transfer*> sends_, receives_;
  std::multimap<uint64_t, Early> early_;
  size_t early_nbytes_ = 0;
  bool in_frame_ = false;
  Frame frame_;
  bool held_ = false;  // a frame has begun that there is no room for
  Header held_header_{};
  size_t inbox_begin_ = 0, inbox_end_ = 0;
  char inbox_[kInboxBytes];
};

}  // namespace narrowcast
