"""Cutting this process's own connections: the way out of a call or collective that waits for a silent peer.

Gloo's collectives have no other: aborting a group does not wake those who wait in it, and a time-out would
take a slow rank for a dead one. Once the sockets are shut down they fail as they do when the peer dies.
"""

import os
import socket
import stat
from collections.abc import Collection
from contextlib import suppress

OPEN_FILES = "/dev/fd"  # Linux and macOS


def open_sockets() -> dict[int, int]:
    """The descriptors of this process's sockets, by what tells a socket from an earlier one of the same
    number.
    """
    found = {}
    for name in os.listdir(OPEN_FILES):
        with suppress(OSError):  # that of the listing itself
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[status.st_ino] = int(name)
    return found


def cut(spared: Collection[int], port: int) -> None:
    """Shut down all TCP connections of this process; whoever reads or writes there gets an error.

    Args:
        spared: of `open_sockets`, those to leave alone.
        port: connections accepted at this port of ours are left alone: those of the store's host.
    """
    for identity, descriptor in open_sockets().items():
        if identity not in spared:
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                if internet and connection.getsockname()[1] != port:
                    connection.getpeername()  # fails for a listening socket: Gloo aborts if that is shut down
                    connection.shutdown(socket.SHUT_RDWR)
