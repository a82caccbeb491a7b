// The link emulator: network namespaces, one a rank, joined by links of a given rate and delay.
//
// Each rank has one link into a switch without limits. A packet waits in the drop-tail queue of its sender's link,
// takes size / rate to go onto it, and arrives after the delay. The namespaces have no names: they live as long as a
// process in them or the emulator, which holds their TUN devices, so that nothing can be left behind.
#pragma once

#include <cerrno>
#include <cstddef>
#include <string>
#include <system_error>
#include <vector>

namespace narrowcast {

// A virtio_net_hdr (linux/virtio_net.h is no C++), passed on as it is: it says that the checksum is left out.
constexpr size_t kHeader = 10;

// Moves the calling thread, and those that it starts from now on, into a network namespace of its own.
// Returns the TUN device through which all that leaves for the network comes.
int enter_namespace(const std::string& address, int mtu);

// Carries packets between the devices, in the order of ranks, until the process is ended.
void carry(const std::vector<int>& devices, double rate_bps, double delay_s, size_t queue_bytes);

[[noreturn]] inline void fail(const char* doing) {
  throw std::system_error(errno, std::generic_category(), doing);
}

}  // namespace narrowcast
