"""Where a rank listens: one address of this host, never all of them; gloo on the same interface."""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from narrowcast.errors import InvalidInputError

LOOPBACK = "127.0.0.1"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
REMEDY = f"Set {GLOO_INTERFACE} to the network interface between the hosts, where no firewall parts the ranks."
_SIOCGIFCONF, _SIOCGIFMTU = 0x8912, 0x8921  # linux/sockios.h
_IFREQ = struct.Struct("16s4x4s16x")  # of an interface with an IPv4 address: netdevice(7)
_IFREQ_INT = struct.Struct("16si20x")
_IF_INET6 = Path("/proc/net/if_inet6")


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


@dataclass(frozen=True, kw_only=True)
class Card:
    """Words of a rank that meets others: the `address` of each in its `network`, or its `refusal`.

    `given`: whoever started the rank has said which interface it takes.
    """

    network: str
    address: str = LOOPBACK
    given: bool = False
    refusal: str | None = None

    @classmethod
    def this(cls) -> "Card":
        """The card of this rank."""
        network, given = Host.this().network, bool(os.environ.get(GLOO_INTERFACE))
        try:
            return cls(network=network, address=own_address(None), given=given)
        except InvalidInputError as error:
            return cls(network=network, refusal=str(error))

    def leads_to(self, cards: Sequence["Card"]) -> str:
        """An address of the network between the ranks: its own, or where that is loopback, one on another host.

        MASTER_ADDR often leads to loopback on the very host that it names.
        """
        elsewhere = [each.address for each in cards if each.network != self.network and not loops(each.address)]
        return elsewhere[0] if elsewhere and loops(self.address) and not self.given else self.address

    def binds(self, cards: Sequence["Card"]) -> str:
        """The address that this rank, whose card it is, listens on among ranks of `cards`."""
        return self.address if self.given else address_towards(self.leads_to(cards))


def own_address(interface: str | None) -> str:
    """The address of `interface` (a name or an address), else of GLOO_SOCKET_IFNAME, else of the way to MASTER_ADDR.

    InvalidInputError for an interface that this host does not have. Where nothing is said, loopback.
    """
    if not interface:
        given = [_address_of(name) for name in os.environ.get(GLOO_INTERFACE, "").split(",") if name]
        return given[0] if given else address_towards(os.environ.get("MASTER_ADDR", LOOPBACK))
    try:
        address = ipaddress.ip_address(interface)
    except ValueError:
        return _address_of(interface)
    if address.is_unspecified:
        raise _no_interface(interface)
    return interface


def lead_gloo(cards: Sequence[Card], rank: int) -> None:
    """Set GLOO_SOCKET_IFNAME, where it is not, to this rank's interface on the network between the ranks of `cards`.

    Left alone, gloo takes what the host's name leads to: on many hosts that is loopback.
    InvalidInputError, alike on every rank, if one of them has refused or cannot be reached.
    """
    check_refusals("process group", [card.refusal for card in cards])
    reached = [card.leads_to(cards) for card in cards]
    check_reachable("process group", reached, [card.network for card in cards])
    if not cards[rank].given:
        os.environ[GLOO_INTERFACE] = interface_of(cards[rank].binds(cards))


def unconnected() -> InvalidInputError:
    """The error for ranks that are all there, and do not reach each other."""
    return InvalidInputError(
        "process group",
        expected="ranks that reach each other",
        found=f"that some do not; this one is on {os.environ[GLOO_INTERFACE]}, {own_address(None)}",
        remedy=REMEDY,
    )


def check_refusals(subject: str, refusals: Sequence[str | None]) -> None:
    """InvalidInputError, alike on every rank, if one of them has refused."""
    for rank, refusal in enumerate(refusals):
        if refusal is not None:
            raise InvalidInputError(
                subject,
                expected="one that every rank of the group can use",
                found=f"that rank {rank} cannot",
                remedy=refusal,
            )


def check_reachable(subject: str, addresses: Sequence[str], networks: Sequence[str]) -> None:
    """InvalidInputError if a rank listens on loopback while another one is on another host."""
    for rank, address in enumerate(addresses):
        if loops(address) and len(set(networks)) > 1:
            raise InvalidInputError(
                subject,
                expected="addresses that the ranks of all hosts reach",
                found=f"rank {rank} of the group on {address}",
                remedy=REMEDY,
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


def interface_of(address: str) -> str:
    """The interface of this host that has the address; "" for none."""
    return next((name for name, each in _addresses() if each == address), "")


def mtu_of(interface: str) -> int:
    """Bytes of the largest packet that an interface of this host sends."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = fcntl.ioctl(probe, _SIOCGIFMTU, _IFREQ_INT.pack(interface.encode(), 0))
    return int(_IFREQ_INT.unpack(found)[1])


def loops(address: str) -> bool:
    """True for one that leads nowhere but to the host itself."""
    return ipaddress.ip_address(address).is_loopback


def address_towards(host: str) -> str:
    """The address of this host on the way to another one; loopback where none leads there."""
    with contextlib.suppress(OSError):  # a name that leads nowhere
        for family, kind, _, _, target in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(target)  # of UDP: nothing is sent
                return str(probe.getsockname()[0])
    return LOOPBACK


def _address_of(interface: str) -> str:
    for name, address in _addresses():
        if name == interface:
            return address
    raise _no_interface(interface)


def _addresses() -> Iterator[tuple[str, str]]:
    """Names of this host's interfaces, once with each address: IPv4 before IPv6."""
    room = array("B", bytes(_IFREQ.size * 1024))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("iP", len(room), room.buffer_info()[0])
        nbytes, _ = struct.unpack("iP", fcntl.ioctl(probe, _SIOCGIFCONF, asked))
    for label, packed in _IFREQ.iter_unpack(room[:nbytes]):
        yield label.rstrip(b"\0").decode().split(":")[0], socket.inet_ntoa(packed)
    for line in _IF_INET6.read_text(encoding="ascii").splitlines() if _IF_INET6.exists() else ():
        digits, _, _, scope, _, name = line.split()
        if scope != "20":  # of the link, which needs its number besides
            yield name, str(ipaddress.IPv6Address(int(digits, 16)))


def _no_interface(found: str) -> InvalidInputError:
    names = ", ".join(name for _, name in socket.if_nameindex())
    return InvalidInputError(
        "interface",
        expected=f"a network interface of this host ({names}) or one of their addresses",
        found=repr(found),
        remedy=f"Pass one of them as interface, or set {GLOO_INTERFACE} to one's name.",
    )
