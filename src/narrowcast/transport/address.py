"""Where a rank listens: one address of this host, never all of them."""

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from narrowcast.errors import InvalidInputError

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host's identity. `machine`: whose cores are shared; `network`: where loopback leads."""

    machine: str
    network: str

    @classmethod
    def this(cls) -> "Host":
        """Where this process runs: containers may share a machine, and not its network."""
        try:
            machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            namespace = str(Path("/proc/self/ns/net").stat().st_ino)
        except OSError:
            machine, namespace = socket.gethostname(), ""
        return cls(machine=machine, network=f"{socket.gethostname()} {machine} {namespace}")


def own_address(interface: str | None) -> str:
    """The address of `interface` (a name or an address), else of GLOO_SOCKET_IFNAME, else of the way to MASTER_ADDR.

    InvalidInputError for an interface that this host does not have. Where nothing is said, loopback.
    """
    chosen = interface or os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not chosen:
        return _address_towards(os.environ.get("MASTER_ADDR", LOOPBACK))
    try:
        address = ipaddress.ip_address(chosen)
    except ValueError:
        return _address_of(chosen)
    if address.is_unspecified:
        raise _no_interface(chosen)
    return chosen


def check_reachable(addresses: Sequence[str], networks: Sequence[str]) -> None:
    """InvalidInputError if a rank listens on loopback while another one is on another host."""
    for rank, address in enumerate(addresses):
        if ipaddress.ip_address(address).is_loopback and len(set(networks)) > 1:
            raise InvalidInputError(
                "TCP transport",
                expected="addresses that the ranks of all hosts reach",
                found=f"rank {rank} of the group on {address}",
                remedy="Set GLOO_SOCKET_IFNAME, or pass interface, to the network interface between the hosts.",
            )


def listen(address: str) -> socket.socket:
    """A listening socket on a free port of `address`; InvalidInputError if this host does not have the address."""
    listener = socket.socket(family_of(address), socket.SOCK_STREAM)
    try:
        listener.bind((address, 0))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise _no_interface(address) from error
    listener.setblocking(False)
    return listener


def family_of(address: str) -> socket.AddressFamily:
    """IPv4 or IPv6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _address_towards(host: str) -> str:
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # of UDP: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return LOOPBACK


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
        except OSError:
            pass
    for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
        digits, _, _, scope, _, name = line.split()
        if name == interface and scope in ("00", "10"):  # global, or loopback
            return str(ipaddress.IPv6Address(int(digits, 16)))
    raise _no_interface(interface)


def _no_interface(found: str) -> InvalidInputError:
    names = ", ".join(name for _, name in socket.if_nameindex())
    return InvalidInputError(
        "interface",
        expected=f"a network interface of this host ({names}) or one of their addresses",
        found=repr(found),
        remedy="Pass one of them as interface, or set GLOO_SOCKET_IFNAME to it.",
    )
