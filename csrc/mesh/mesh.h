// Meshes: the connections of a rank to the other ranks of its groups, and the engine that serves all of them.
//
// The engine has one mutex, and moves bytes when somebody waits: a waiter first tries its own connections for some
// microseconds, then sleeps until any connection of the process is ready, and serves that. So a wait in one mesh also
// moves what another one has under way. A helper thread does so while bytes are left that the kernel's buffers may not
// hold and nobody waits; it steps back as soon as somebody does.
#pragma once

#include <poll.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "connection.h"

namespace narrowcast {

using Clock = std::chrono::steady_clock;

// A buffer that travels to or from a peer.
struct Buffer {
  int peer;
  char* data;
  size_t nbytes;
};

class Engine {
 public:
  static Engine& get();

  void add(const std::shared_ptr<Connection>& connection);
  void remove(const std::vector<std::shared_ptr<Connection>>& connections);
  void start(Operation& operation);
  // Returns when the operation is settled, at the deadline, or, for Python to look for signals, now and then.
  Outcome wait(Operation& operation, Clock::time_point deadline, bool spin);
  // Break off every connection of the process.
  void hang_up(const std::string& reason);

 private:
  // What a sleeper sleeps on: its own wake-up, and all connections.
  struct Watch {
    std::vector<pollfd> fds;
    std::vector<std::shared_ptr<Connection>> connections;
  };

  Engine();
  static void in_forked_child();
  bool spin(std::unique_lock<std::mutex>& lock, Operation& operation, bool allowed);
  bool sleep(std::unique_lock<std::mutex>& lock, const Wakeup& wakeup, Clock::time_point deadline);
  Watch watch(const Wakeup& wakeup) const;
  static size_t serve(const Watch& watch);
  bool needs_help() const;
  void call_helper();
  void help();

  std::mutex mutex_;
  std::vector<std::shared_ptr<Connection>> connections_;
  std::vector<const Wakeup*> sleepers_;
  int waiting_ = 0;
  int64_t spin_ns_;
  uint64_t num_spins_ = 0;
  bool helper_exists_ = false, helper_serves_ = false;
  Wakeup* helper_wakeup_;
};

class Mesh {
 public:
  // `fds` by peer, -1 at the rank itself: connected sockets, which the mesh takes over.
  Mesh(const std::vector<int>& fds, bool spin);
  ~Mesh();
  Mesh(const Mesh&) = delete;

  std::unique_ptr<Operation> exchange(const std::vector<Buffer>& sends, const std::vector<Buffer>& recvs, uint64_t tag);
  // The same in two: what is prepared may be started again and again, once it is over.
  std::unique_ptr<Operation> prepare(const std::vector<Buffer>& sends, const std::vector<Buffer>& recvs) const;
  static void start(Operation& operation, uint64_t tag);
  bool spins() const { return spin_; }

 private:
  Connection* connection(int peer) const;

  std::vector<std::shared_ptr<Connection>> connections_;
  const bool spin_;
};

}  // namespace narrowcast
