"""The command line, with a fault in the first attempt of one rank, named by FAULT="rank:round:place:fault".

The round counts from 1, as the screen does. The rank goes to the place and waits there until the others have
a sign of life from it and the checkpoint of the round before has been written; then the fault happens:
`kill` (SIGKILL), `stop` (SIGSTOP), `raise`, `cut` (its connections to other ranks break off), `mute` (they
carry nothing any more; needs a network namespace and iptables). `absent` at any place is a rank that never
starts.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fslsage_rpc import cli  # first: it sets what torch logs
from fslsage_rpc.comm.rpc import RpcWorld
from fslsage_rpc.comm.rpc_link import RpcLink
from fslsage_rpc.parties.alignment import AuxiliaryFit
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import Align, Push
from fslsage_rpc.parties.server import Server
from fslsage_rpc.training.trainer import Trainer

SIGN_OF_LIFE_SECONDS = 1.5
rank, round, place, fault = os.environ["FAULT"].split(":")
first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
mine = os.environ["RANK"] == rank and first_attempt
happened = False
now = 0


def due(where: str) -> bool:
    """Is this the place, the fault yet to happen?"""
    return mine and not happened and now == int(round) and where == place


def happen(where: str, wait: bool = True) -> None:
    """The fault, if this is its place."""
    global happened
    if not due(where):
        return
    happened = True
    if wait:
        time.sleep(SIGN_OF_LIFE_SECONDS)
    Path(os.environ["FAULT_TIME"]).write_text(str(time.time()))
    if fault == "raise":
        raise ZeroDivisionError("a fault for the test")
    if fault in ("cut", "mute"):
        return for_connections(shut if fault == "cut" else mute)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])


def for_connections(do: Callable[[socket.socket], None]) -> None:
    """Do something to all TCP connections of this process but those to the job's store."""
    for name in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        try:
            over_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
            if over_tcp and connection.getpeername()[1] != int(os.environ["MASTER_PORT"]):
                do(connection)
        except OSError:
            pass
        finally:
            connection.close()


def shut(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def mute(connection: socket.socket) -> None:
    """From now on what is sent over it is dropped, in both directions."""
    ends = [str(end[1]) for end in (connection.getsockname(), connection.getpeername())]
    for source, destination in (ends, ends[::-1]):
        rule = ["--protocol", "tcp", "--sport", source, "--dport", destination, "--jump", "DROP"]
        subprocess.run(["iptables", "--append", "OUTPUT", *rule], check=True)


def before(owner: type, method: str, where: str) -> None:
    """Make it a place: the fault happens as the method is entered."""
    true: Callable[..., Any] = getattr(owner, method)

    def entered(*arguments: Any, **keywords: Any) -> Any:
        happen(where)
        return true(*arguments, **keywords)

    setattr(owner, method, entered)


def train_round(self: Trainer, number: int) -> float:
    global now
    now = number + 1
    return true_train_round(self, number)


def submit(self: RpcLink, request: Any, on_answer: Any) -> None:
    """Uploading and waiting for an alignment: the request is on its way when the fault happens."""
    where = {Push: "uploading", Align: "alignment"}.get(type(request.body), "")
    if due(where):
        time.sleep(SIGN_OF_LIFE_SECONDS)
    true_submit(self, request, on_answer)
    happen(where, wait=False)


def all_reduce(self: RpcWorld, *arguments: Any) -> None:
    """In the all-reduce: the others come to it only after the fault."""
    if now == int(round) and place == "all-reduce" and first_attempt:
        if mine:
            threading.Timer(SIGN_OF_LIFE_SECONDS, happen, ["all-reduce", False]).start()
        else:
            time.sleep(2 * SIGN_OF_LIFE_SECONDS)
    true_all_reduce(self, *arguments)


if mine and fault == "absent":
    Path(os.environ["FAULT_TIME"]).write_text(str(time.time()))
    time.sleep(3600)
true_train_round, Trainer.train_round = Trainer.train_round, train_round  # type: ignore[method-assign]
true_submit, RpcLink._submit = RpcLink._submit, submit  # type: ignore[method-assign]
true_all_reduce, RpcWorld.all_reduce = RpcWorld.all_reduce, all_reduce  # type: ignore[method-assign]
before(Client, "backward", "computing")
before(Server, "submit", "serving")
before(AuxiliaryFit, "fit", "fitting")
before(Server, "average", "averaging")
sys.exit(cli.main())
