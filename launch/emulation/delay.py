"""Delays packets where the kernel has no netem: holds the ids of packets that wait in NFQUEUE.

    python delay.py QUEUE=SECONDS [QUEUE=SECONDS ...]

Runs in the router's namespace. Packets stay in the kernel, unsegmented; only their ids come here, and each is
let go SECONDS after it came. Prints `ready`, and ends with the end of its standard input.
"""

import contextlib
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from typing import Any

NETLINK_NETFILTER = 12
SO_RCVBUFFORCE = 33
SOL_NETLINK, NETLINK_NO_ENOBUFS = 270, 5
SUBSYSTEM_QUEUE = 3 << 8
PACKET, CONFIG, VERDICT_BATCH = 0, 2, 3  # messages, linux/netfilter/nfnetlink_queue.h
COMMAND, PARAMETERS, QUEUE_LENGTH, FLAG_MASK, FLAGS = 1, 2, 3, 4, 5  # attributes of CONFIG
VERDICT_HEADER, PACKET_HEADER = 2, 1  # attributes of VERDICT_BATCH and PACKET
BIND, COPY_IDS_ONLY, KEEP_UNSEGMENTED, ACCEPT = 1, 1, 4, 1
REQUEST, ACKNOWLEDGE = 1, 4
ERROR = 2
MOST_WAITING = 100_000
RECEIVE_BUFFER_BYTES = 16 << 20
NICENESS = -10  # late release would lengthen the delay on a busy machine


class Queue:
    """One NFQUEUE and the packets that wait in it, first come, first gone.

    Raises:
        OSError: the kernel has no such queue, or another program holds it.
    """

    def __init__(self, number: int, seconds: float):
        self._number = number
        self._seconds = seconds
        self._waiting: deque[tuple[float, int]] = deque()
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self.socket.bind((0, 0))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        self.socket.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
        self._configure((COMMAND, struct.pack(">BBH", BIND, 0, 0)))
        self._configure((PARAMETERS, struct.pack(">IB", 0, COPY_IDS_ONLY)))
        self._configure((QUEUE_LENGTH, struct.pack(">I", MOST_WAITING)))
        keep = struct.pack(">I", KEEP_UNSEGMENTED)
        self._configure((FLAG_MASK, keep), (FLAGS, keep))
        self.socket.setblocking(False)

    def take(self) -> None:
        """Note the packets that have come."""
        due = time.monotonic() + self._seconds
        with contextlib.suppress(BlockingIOError):
            while True:
                for kind, body in _messages(self.socket.recv(1 << 16)):
                    if kind == SUBSYSTEM_QUEUE | PACKET:
                        self._waiting.append((due, _packet_id(body)))

    def release(self) -> float | None:
        """Let go what has waited long enough.

        Returns:
            When the next one is due, on the monotonic clock.
        """
        now, last = time.monotonic(), None
        while self._waiting and self._waiting[0][0] <= now:
            last = self._waiting.popleft()[1]
        if last is not None:  # a batch verdict is for all ids up to this one
            self._send(VERDICT_BATCH, REQUEST, (VERDICT_HEADER, struct.pack(">II", ACCEPT, last)))
        return self._waiting[0][0] if self._waiting else None

    def _configure(self, *attributes: tuple[int, bytes]) -> None:
        self._send(CONFIG, REQUEST | ACKNOWLEDGE, *attributes)
        for kind, body in _messages(self.socket.recv(1 << 16)):
            if kind == ERROR and (number := struct.unpack_from("=i", body)[0]):
                raise OSError(-number, f"NFQUEUE {self._number}: {os.strerror(-number)}")

    def _send(self, message: int, flags: int, *attributes: tuple[int, bytes]) -> None:
        body = struct.pack("=BBH", 0, 0, socket.htons(self._number))
        for kind, value in attributes:
            body += struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)
        header = struct.pack("=IHHII", len(body) + 16, SUBSYSTEM_QUEUE | message, flags, 0, 0)
        self.socket.send(header + body)


def _messages(data: bytes) -> list[tuple[int, bytes]]:
    """The netlink messages in what was received: type and body of each."""
    found, start = [], 0
    while start + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, start)
        found.append((kind, data[start + 16 : start + length]))
        start += (length + 3) & ~3
    return found


def _packet_id(body: bytes) -> int:
    start = 4
    while start + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, start)
        if kind == PACKET_HEADER:
            id: int = struct.unpack_from(">I", body, start + 4)[0]
            return id
        start += (length + 3) & ~3
    raise ValueError("a packet without an id")


def main(arguments: list[str]) -> None:
    """Serve the queues until standard input ends."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    specified = [argument.split("=") for argument in arguments]
    queues: dict[Any, Queue] = {
        (queue := Queue(int(number), float(seconds))).socket: queue for number, seconds in specified
    }
    print("ready", flush=True)
    while True:
        due = [when for queue in queues.values() if (when := queue.release()) is not None]
        # select, not epoll: its time-out is in microseconds
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        readable, _, _ = select.select([sys.stdin, *queues], [], [], wait)
        if sys.stdin in readable:
            return
        for ready in readable:
            queues[ready].take()


if __name__ == "__main__":
    main(sys.argv[1:])
