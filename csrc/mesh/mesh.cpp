#include "mesh.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>

#include <algorithm>
#include <stdexcept>
#include <thread>
#include <utility>

namespace narrowcast {

namespace {

constexpr int64_t kLongestSpin = 300'000, kShortestSpin = 2'000;  // ns; ranks that decode come 100 us apart
constexpr uint64_t kProbeEvery = 128;
constexpr std::chrono::seconds kLongestSleep(1);

timespec until(Clock::time_point deadline) {
  const auto left = std::max(deadline - Clock::now(), Clock::duration::zero());
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(left);
  return {time_t(seconds.count()), long(std::chrono::nanoseconds(left - seconds).count())};
}

Outcome timed_out(const Operation& operation) {
  for (const Transfer& transfer : operation.transfers)
    if (!transfer.finished) return {Trouble::timeout, transfer.connection->peer(), "it did nothing in time", 0, 0};
  return {};
}

}  // namespace

// Never destroyed: threads may be in it while the process exits.
Engine& Engine::get() {
  static Engine* engine = new Engine;
  return *engine;
}

Engine::Engine() : spin_ns_(kLongestSpin), helper_wakeup_(new Wakeup) {
  ::pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, in_forked_child);
}

// A child must not keep alive the connections of a parent that dies.
void Engine::in_forked_child() {
  Engine& engine = get();
  for (const auto& connection : engine.connections_) connection->break_off("this process is a fork");
  engine.connections_.clear();
  engine.sleepers_.clear();
  engine.waiting_ = 0;
  engine.helper_exists_ = engine.helper_serves_ = false;
  engine.helper_wakeup_ = new Wakeup;
  engine.mutex_.unlock();
}

void Engine::add(const std::shared_ptr<Connection>& connection) {
  std::lock_guard lock(mutex_);
  connections_.push_back(connection);
}

void Engine::remove(const std::vector<std::shared_ptr<Connection>>& connections) {
  std::lock_guard lock(mutex_);
  for (const auto& connection : connections) {
    if (connection == nullptr) continue;
    connection->break_off("this rank closed the connection");
    connections_.erase(std::remove(connections_.begin(), connections_.end(), connection), connections_.end());
  }
}

void Engine::hang_up(const std::string& reason) {
  std::lock_guard lock(mutex_);
  for (const auto& connection : connections_) connection->break_off(reason);
}

void Engine::start(Operation& operation) {
  std::lock_guard lock(mutex_);
  for (Transfer& transfer : operation.transfers)
    if (transfer.sending) transfer.connection->send(transfer);
  for (Transfer& transfer : operation.transfers)
    if (!transfer.sending) transfer.connection->receive(transfer);
  for (Transfer& transfer : operation.transfers)
    if (!transfer.sending && !transfer.finished) transfer.connection->read();
  if (operation.settled()) return;
  if (waiting_ > 0) {
    for (const Wakeup* sleeper : sleepers_) sleeper->wake();  // they do not watch for this yet
  } else if (needs_help()) {
    call_helper();
  }
}

Outcome Engine::wait(Operation& operation, Clock::time_point deadline, bool may_spin) {
  thread_local const Wakeup wakeup;
  std::unique_lock lock(mutex_);
  ++waiting_;
  if (helper_serves_) helper_wakeup_->wake();
  bool idle = false;
  while (!spin(lock, operation, may_spin) && !idle && Clock::now() < deadline) {
    operation.sleeper = &wakeup;
    idle = !sleep(lock, wakeup, deadline);
    operation.sleeper = nullptr;
  }
  --waiting_;
  if (waiting_ == 0 && needs_help()) call_helper();
  if (operation.failed) return operation.failure;
  if (operation.settled()) return {};
  return Clock::now() < deadline ? Outcome{Trouble::interrupted, -1, "", 0, 0} : timed_out(operation);
}

// Whether the operation was settled while trying its connections, again and again as long as that may help.
bool Engine::spin(std::unique_lock<std::mutex>& lock, Operation& operation, bool allowed) {
  const bool probing = ++num_spins_ % kProbeEvery == 0;  // what did not help lately may help again
  const std::chrono::nanoseconds patience(!allowed ? 0 : probing ? kLongestSpin : spin_ns_);
  auto idle_since = Clock::now();
  while (!operation.settled()) {
    size_t moved = 0;
    for (Transfer& transfer : operation.transfers) {
      if (transfer.finished) continue;
      moved += transfer.sending ? transfer.connection->write() : transfer.connection->read();
    }
    if (operation.settled()) break;
    const auto now = Clock::now();
    if (moved > 0) idle_since = now;
    if (now - idle_since >= patience) {
      if (allowed) spin_ns_ = std::max(spin_ns_ / 2, kShortestSpin);
      return false;
    }
    lock.unlock();
    lock.lock();
  }
  spin_ns_ = probing ? kLongestSpin : std::min(spin_ns_ * 2, kLongestSpin);
  return true;
}

// False if nothing happened but, maybe, a signal. Signals may reach other threads, so nobody sleeps for long.
bool Engine::sleep(std::unique_lock<std::mutex>& lock, const Wakeup& wakeup, Clock::time_point deadline) {
  Watch ready = watch(wakeup);
  sleepers_.push_back(&wakeup);
  lock.unlock();
  const timespec timeout = until(std::min(deadline, Clock::now() + kLongestSleep));
  const int num_ready = ::ppoll(ready.fds.data(), ready.fds.size(), &timeout, nullptr);
  lock.lock();
  sleepers_.erase(std::find(sleepers_.begin(), sleepers_.end(), &wakeup));
  if (num_ready > 0) {
    wakeup.clear();
    serve(ready);
  }
  return num_ready > 0;
}

Engine::Watch Engine::watch(const Wakeup& wakeup) const {
  Watch watch;
  watch.fds.push_back({wakeup.fd(), POLLIN, 0});
  for (const auto& connection : connections_) {
    if (!connection->is_open()) continue;
    const short reading = connection->wants_to_read() ? POLLIN : 0, writing = connection->wants_to_write() ? POLLOUT : 0;
    if (reading == 0 && writing == 0) continue;
    watch.fds.push_back({connection->fd(), short(reading | writing), 0});
    watch.connections.push_back(connection);
  }
  return watch;
}

size_t Engine::serve(const Watch& watch) {
  size_t moved = 0;
  for (size_t index = 0; index < watch.connections.size(); ++index) {
    if (watch.fds[index + 1].revents == 0) continue;
    moved += watch.connections[index]->write();
    moved += watch.connections[index]->read();
  }
  return moved;
}

bool Engine::needs_help() const {
  return std::any_of(connections_.begin(), connections_.end(), [](const auto& each) { return each->needs_help(); });
}

void Engine::call_helper() {
  if (!std::exchange(helper_exists_, true)) {
    sigset_t all, before;  // signals are for Python's main thread
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    std::thread([this] { help(); }).detach();
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  } else {
    helper_wakeup_->wake();
  }
}

void Engine::help() {
  std::unique_lock lock(mutex_);
  while (true) {
    helper_serves_ = waiting_ == 0 && needs_help();
    Watch ready = helper_serves_ ? watch(*helper_wakeup_) : Watch{{{helper_wakeup_->fd(), POLLIN, 0}}, {}};
    lock.unlock();
    ::ppoll(ready.fds.data(), ready.fds.size(), nullptr, nullptr);
    lock.lock();
    helper_wakeup_->clear();
    if (waiting_ == 0) serve(ready);
  }
}

Mesh::Mesh(const std::vector<int>& fds, bool spin) : spin_(spin) {
  for (size_t peer = 0; peer < fds.size(); ++peer) {
    connections_.push_back(fds[peer] < 0 ? nullptr : std::make_shared<Connection>(fds[peer], int(peer)));
    if (fds[peer] < 0) continue;
    ::fcntl(fds[peer], F_SETFL, ::fcntl(fds[peer], F_GETFL) | O_NONBLOCK);
    const int yes = 1;
    ::setsockopt(fds[peer], IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    Engine::get().add(connections_.back());
  }
}

Mesh::~Mesh() { Engine::get().remove(connections_); }

Connection* Mesh::connection(int peer) const {
  if (peer < 0 || size_t(peer) >= connections_.size() || connections_[peer] == nullptr)
    throw std::invalid_argument("no such peer: " + std::to_string(peer));
  return connections_[peer].get();
}

std::unique_ptr<Operation> Mesh::exchange(const std::vector<Buffer>& sends, const std::vector<Buffer>& recvs,
                                          uint64_t tag) {
  auto operation = prepare(sends, recvs);
  start(*operation, tag);
  return operation;
}

std::unique_ptr<Operation> Mesh::prepare(const std::vector<Buffer>& sends, const std::vector<Buffer>& recvs) const {
  auto operation = std::make_unique<Operation>();
  operation->transfers.reserve(sends.size() + recvs.size());
  for (const Buffer& buffer : recvs)
    operation->transfers.push_back({operation.get(), connection(buffer.peer), false, 0, buffer.data, buffer.nbytes});
  for (const Buffer& buffer : sends)
    operation->transfers.push_back({operation.get(), connection(buffer.peer), true, 0, buffer.data, buffer.nbytes});
  return operation;
}

void Mesh::start(Operation& operation, uint64_t tag) {
  for (Transfer& transfer : operation.transfers) {
    transfer.tag = tag;
    transfer.done = 0;
    transfer.finished = false;
  }
  operation.left = int(operation.transfers.size());
  Engine::get().start(operation);
}

}  // namespace narrowcast
