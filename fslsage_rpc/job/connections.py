"""This process's own connections, and how long each may be without any answer.

It is the way out of a call or collective that waits for a peer that it cannot reach: these then fail as they
do when the peer dies. A time-out would take a slow rank for a dead one.
"""

import os
import socket
import stat
import sys
from contextlib import suppress

OPEN_FILES = "/dev/fd"  # Linux and macOS
LONGEST_SECONDS = 32_767
"""that keepalive takes"""
LONGEST_MILLISECONDS = 2**31 - 1


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


class Patience:
    """Has the system give up connections over which the other end's system has not answered for some time.

    What answers is the kernel, so a slow rank, or a slow link, is not taken for a broken one. By Linux's
    default a connection that carries nothing any more fails after some 15 minutes of trying, and one that
    waits for data never. Elsewhere than on Linux these defaults stay.
    """

    def __init__(self, seconds: float):
        self._options = []
        if sys.platform == "linux":
            idle, again = (min(max(1, round(seconds / n)), LONGEST_SECONDS) for n in (3, 10))
            enough = min(round(1000 * seconds), LONGEST_MILLISECONDS)
            self._options = [
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, again),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, enough),
            ]
        self._asked: set[int] = set()

    def ask(self) -> None:
        """Ask it of all connections that have come since the last time."""
        now = open_sockets() if self._options else {}
        for identity in now.keys() - self._asked:
            with suppress(OSError), socket.socket(fileno=os.dup(now[identity])) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    for option in self._options:
                        connection.setsockopt(*option)
        self._asked = set(now)
