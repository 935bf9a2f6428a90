"""The addresses that a process listens on and those of this host's interfaces, as Linux tells them."""

import array
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

Address = IPv4Address | IPv6Address
PROC = Path("/proc")
LISTENING = "0A"
"""the state of a listening socket in /proc/net/tcp (TCP_LISTEN of the kernel's tcp_states.h)"""
GET_ADDRESS = 0x8915
"""SIOCGIFADDR of the kernel's sockios.h"""


@dataclass(frozen=True, order=True)
class Listener:
    """A TCP socket that takes connections; the unspecified address (0.0.0.0, ::) means all interfaces."""

    address: Address
    port: int


def listeners(process: int | str = "self") -> list[Listener]:
    """What a process of this host listens on, IPv4 before IPv6; nothing where there is no /proc.

    Args:
        process: its id.

    Raises:
        OSError: its files may not be looked at.
    """
    folder = PROC / str(process)
    if not (folder / "net").exists():
        return []
    inodes = set()
    for descriptor in (folder / "fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            kind, _, inode = os.readlink(descriptor).partition(":")
            if kind == "socket":
                inodes.add(inode.strip("[]"))
    found: list[Listener] = []
    for name in ("tcp", "tcp6"):
        with suppress(OSError):  # no IPv6 here
            rows = [line.split() for line in (folder / "net" / name).read_text().splitlines()[1:]]
            found += sorted(_listener(row[1]) for row in rows if row[3] == LISTENING and row[9] in inodes)
    return found


def interface_addresses() -> dict[Address, str]:
    """The name of each interface of this host by its addresses; nothing where the system does not tell."""
    found: dict[Address, str] = {}
    try:
        import fcntl
    except ImportError:  # Windows
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe, GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                found[IPv4Address(answer[20:24])] = name
    with suppress(OSError):
        for line in (PROC / "net" / "if_inet6").read_text().splitlines():
            number, *_, name = line.split()
            found[IPv6Address(int(number, 16))] = name
    return found


def hostname_address() -> Address | None:
    """What this host's name resolves to, which torch's libraries use where no interface is given."""
    try:
        return ip_address(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except (OSError, ValueError):
        return None


def _listener(text: str) -> Listener:
    """From the kernel's `0100007F:1F90`: words of 32 bits, each in the byte order of the machine."""
    address, _, port = text.partition(":")
    words = array.array("I", [int(address[i : i + 8], 16) for i in range(0, len(address), 8)])
    found = ip_address(words.tobytes())
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return Listener(mapped or found, int(port, 16))
