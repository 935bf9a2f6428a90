"""Measures one client's link by TCP connections of its own.

    python probe.py serve ADDRESS                        in the server's namespace, until stdin ends
    python probe.py measure ADDRESS WARM_UP_SECONDS      in a client's: prints one line of JSON

Rates, in bit/s, are of what comes through the receiver's interface while a connection fills the link; the
round trip is the median of small messages, in seconds.
"""

import contextlib
import json
import os
import select
import socket
import statistics
import struct
import sys
import threading
import time
from pathlib import Path

INTERFACE = "eth0"
PORT = 29400
MEASURED_SECONDS = 1.0
ROUND_TRIPS = 11
CHUNK_BYTES = 1 << 16
SILENCE_SECONDS = 20.0
REPLY = struct.Struct("=d")
ORDER = struct.Struct("=4sd")


def serve(address: str) -> None:
    """Answer one connection after another; each begins with an order: echo, sink or give."""
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    with socket.create_server((address, PORT)) as listener:
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(SILENCE_SECONDS)
                order, warm_up_seconds = ORDER.unpack(_receive(connection, ORDER.size))
                if order == b"echo":
                    _echo(connection)
                elif order == b"sink":
                    receive_rate(connection, warm_up_seconds)
                else:
                    _flood(connection)


def measure(address: str, warm_up_seconds: float) -> dict[str, float]:
    """Measure the link to the server; the round trip first, while its queues are empty."""
    with _connect(address, b"echo", 0.0) as connection:
        round_trip = statistics.median([_round_trip(connection) for _ in range(ROUND_TRIPS)])
    with _connect(address, b"sink", warm_up_seconds) as connection:
        up = _flood(connection)
    with _connect(address, b"give", warm_up_seconds) as connection:
        down = receive_rate(connection, warm_up_seconds)
    return {"up_bits_per_second": up, "down_bits_per_second": down, "round_trip_seconds": round_trip}


def receive_rate(connection: socket.socket, warm_up_seconds: float) -> float:
    """Receive for the warm-up, in which the sender finds the link's speed, and then measure.

    Returns:
        The rate in bit/s, which the sender is told too.
    """
    buffer = bytearray(1 << 20)
    begin = time.monotonic() + warm_up_seconds
    first: tuple[float, int] | None = None
    while first is None or time.monotonic() < first[0] + MEASURED_SECONDS:
        if not connection.recv_into(buffer):
            raise ConnectionError("the sending end of the probe has gone")
        if first is None and time.monotonic() >= begin:
            first = time.monotonic(), _received_bytes()
    rate = 8 * (_received_bytes() - first[1]) / (time.monotonic() - first[0])
    connection.sendall(REPLY.pack(rate))
    with contextlib.suppress(ConnectionError):
        while connection.recv_into(buffer):
            pass
    return rate


def _received_bytes() -> int:
    """What has come through the interface: unlike what the stream delivers, it is not held up by a loss."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counters.split()[0])
    raise ConnectionError(f"there is no interface {INTERFACE} here")


def _flood(connection: socket.socket) -> float:
    """Send until the receiver has measured; what is still queued then is thrown away.

    Returns:
        The receiver's rate.
    """
    chunk = os.urandom(CHUNK_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    while True:
        readable, writable, _ = select.select([connection], [connection], [], SILENCE_SECONDS)
        if readable:
            rate: float = REPLY.unpack(_receive(connection, REPLY.size))[0]
            return rate
        if not writable:
            raise ConnectionError("the link of the probe has fallen silent")
        connection.send(chunk)


def _echo(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while message := connection.recv(1):
        connection.sendall(message)


def _round_trip(connection: socket.socket) -> float:
    began = time.monotonic()
    connection.sendall(b".")
    _receive(connection, 1)
    return time.monotonic() - began


def _connect(address: str, order: bytes, warm_up_seconds: float) -> socket.socket:
    connection = socket.create_connection((address, PORT), timeout=SILENCE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(ORDER.pack(order, warm_up_seconds))
    return connection


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError("the other end of the probe has gone")
        data += more
    return data


def _end_with_launcher() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        print(json.dumps(measure(sys.argv[2], float(sys.argv[3]))))
