"""This machine's network interfaces: the one that `cluster.interface` means, and the one on the way to another machine.
Linux, standard library only."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path

from dtrain.cluster.errors import UsageError

_SIOCGIFADDR = 0x8915  # netdevice(7): the address of an interface
_NAME_BYTES = 16
_LINK_LOCAL_SCOPE = "20"  # of /proc/net/if_inet6: such an address means nothing without its interface


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    name: str
    address: str  # IPv4 in dots, or IPv6

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


LOOPBACK = Interface(name="lo", address="127.0.0.1")


def list_interfaces() -> list[Interface]:
    """Every address that another process can reach us at, IPv4 before IPv6."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = ioctl(probe, _SIOCGIFADDR, struct.pack(f"{_NAME_BYTES}s16x", name.encode()[: _NAME_BYTES - 1]))
            except OSError:
                continue  # it has no IPv4 address
            found.append(Interface(name=name, address=socket.inet_ntoa(answer[20:24])))
    return found + _inet6()


def _inet6() -> list[Interface]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    rows = [line.split() for line in lines]
    return [
        Interface(name=row[5], address=str(ipaddress.IPv6Address(bytes.fromhex(row[0]))))
        for row in rows
        if len(row) == 6 and row[3] != _LINK_LOCAL_SCOPE
    ]


def network_of(asked: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """What `asked` means as a range of addresses ("10.0.0.0/8", a single address); None where it is a name."""
    try:
        return ipaddress.ip_network(asked, strict=False)
    except ValueError:
        return None


def pick(asked: str, found: Sequence[Interface]) -> Interface:
    """The first of `found` with that name, or with an address in that range. Raises UsageError with those there are."""
    network = network_of(asked)
    for interface in found:
        if interface.name == asked or (network is not None and ipaddress.ip_address(interface.address) in network):
            return interface
    what = f"no interface has an address in {asked}" if network is not None else f"there is no interface {asked}"
    raise UsageError(f"{what}. There are: {', '.join(map(str, found)) or 'none with an address'}.")


def resolve(name: str) -> list[str]:
    """The addresses of a host, as the system finds them; none for a name that it does not know."""
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM) if name else []
    except OSError:
        return []
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def way_to(address: str) -> str:
    """Our address on the way to another, "" where there is no way. Nothing is sent: connecting a UDP socket only asks
    the routing table."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def facing(asked: str, own: Sequence[str], hosts: Sequence[str]) -> Interface:
    """The one that `asked` means; auto: that of the first of our addresses in `own` that another machine can use, else
    the one on the way to one of `hosts`; loopback where `own` is nothing else and no host is elsewhere. Raises
    UsageError."""
    found = list_interfaces()
    if asked != "auto":
        return pick(asked, found)
    elsewhere = [address for host in hosts for address in resolve(host) if not is_loopback(address)]
    for address in [*own, *map(way_to, elsewhere)]:
        fitting = [one for one in found if one.address == address]
        if fitting and not is_loopback(address):
            return fitting[0]
    if own and all(map(is_loopback, own)):
        return LOOPBACK
    raise UsageError(
        "auto: this machine does not know at which of its addresses the others reach it. There are: "
        f"{', '.join(map(str, found))}. Name one, or a range of addresses like 10.0.0.0/8."
    )
