#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <utility>

#include "emulator.h"

namespace narrowcast {
namespace {

constexpr const char* kDevice = "link0";
constexpr const char* kNetmask = "255.255.255.0";
constexpr int kDevicePackets = 1000;  // room in the device itself, from which the emulator takes them at once

void checked(int result, const char* doing) {
  if (result < 0) fail(doing);
}

class Descriptor {
 public:
  Descriptor(int fd, const char* doing) : fd_(fd) { checked(fd, doing); }
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

ifreq request(const char* device) {
  ifreq asked{};
  std::snprintf(asked.ifr_name, IFNAMSIZ, "%s", device);
  return asked;
}

void bring_up(int control, const char* device) {
  ifreq asked = request(device);
  asked.ifr_flags = IFF_UP | IFF_RUNNING;
  checked(ioctl(control, SIOCSIFFLAGS, &asked), "bringing an interface up");
}

void set_address(int control, unsigned long what, const std::string& address) {
  ifreq asked = request(kDevice);
  sockaddr_in internet{};
  internet.sin_family = AF_INET;
  if (inet_pton(AF_INET, address.c_str(), &internet.sin_addr) != 1) {
    errno = EINVAL;
    fail("reading an address");
  }
  std::memcpy(&asked.ifr_addr, &internet, sizeof internet);
  checked(ioctl(control, what, &asked), "setting an address");
}

int open_tun() {
  Descriptor tun(open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), "opening /dev/net/tun");
  ifreq asked = request(kDevice);
  asked.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
  checked(ioctl(tun.get(), TUNSETIFF, &asked), "making a TUN device");
  int header = kHeader;
  checked(ioctl(tun.get(), TUNSETVNETHDRSZ, &header), "setting the header of a TUN device");
  checked(ioctl(tun.get(), TUNSETOFFLOAD, TUN_F_CSUM), "leaving checksums out");
  return tun.release();
}

}  // namespace

int enter_namespace(const std::string& address, int mtu) {
  checked(unshare(CLONE_NEWNET), "making a network namespace");
  Descriptor control(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "opening a socket");
  bring_up(control.get(), "lo");
  Descriptor tun(open_tun(), "opening a TUN device");
  set_address(control.get(), SIOCSIFADDR, address);
  set_address(control.get(), SIOCSIFNETMASK, kNetmask);
  ifreq asked = request(kDevice);
  asked.ifr_mtu = mtu;
  checked(ioctl(control.get(), SIOCSIFMTU, &asked), "setting the MTU");
  asked = request(kDevice);
  asked.ifr_qlen = kDevicePackets;
  checked(ioctl(control.get(), SIOCSIFTXQLEN, &asked), "setting the length of a queue");
  bring_up(control.get(), kDevice);
  return tun.release();
}

}  // namespace narrowcast
