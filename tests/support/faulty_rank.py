"""The command line as a rank of a job with faults: FAULTS="rank:round:place:fault ...", one in each attempt.

The round counts from 1, as the screen does. FAULT_FOLDER has the run's folder. The rank goes to the place and
waits there until the others have a sign of life from it. It also waits for the manifest of the checkpoint of
the round before. Then the attempt's fault happens, and its moment goes to a file of FAULT_FOLDER.

- `kill`: SIGKILL.
- `stop`: SIGSTOP.
- `raise`: an exception.
- `cut`: its connections to other ranks break off.
- `mute`: they carry nothing any more; it needs a network namespace and iptables.
- `absent`, at any place: a rank that never starts.

At `writing`, that manifest or the rank's part is being written.
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
from fslsage_rpc.job.signs_of_life import SignsOfLife
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import Align, Push
from fslsage_rpc.parties.server import Server
from fslsage_rpc.runs.checkpoint_files import MANIFEST
from fslsage_rpc.training.trainer import Trainer
from fslsage_rpc.transport.rpc import RpcTransport

WAITING_SECONDS = 60.0
FOLDER = Path(os.environ["FAULT_FOLDER"])
ATTEMPT = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank, round, place, fault = [*os.environ["FAULTS"].split(), "none:0:none:none"][ATTEMPT].split(":")
moment = FOLDER / f"fault-{ATTEMPT}"
manifest = FOLDER / "run" / "checkpoints" / f"round-{int(round) - 1:06d}" / MANIFEST
mine = os.environ["RANK"] == rank
happened = False
now = beats = 0


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
        wait_for_others()
    if fault in ("cut", "mute"):
        for_connections(shut if fault == "cut" else mute)
    moment.write_text(str(time.time()))
    if fault == "raise":
        raise ZeroDivisionError("a fault for the test")
    if fault in ("cut", "mute"):
        return
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])


def wait_for_others() -> None:
    """Until they know where this rank is, and the round before is not lost with it."""
    wait_for_sign_of_life()
    wait_until(manifest.exists)


def wait_for_sign_of_life() -> None:
    known = beats + 2  # the next one may be under way, with the place before
    wait_until(lambda: beats >= known)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAITING_SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError("no sign of life, or no checkpoint of the round before the fault's")
        time.sleep(0.01)


def beat(self: SignsOfLife) -> None:
    global beats
    true_beat(self)
    beats += 1


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


def submit(self: RpcTransport, request: Any, on_answer: Any) -> None:
    """Uploading and waiting for an alignment: the request is on its way when the fault happens."""
    where = {Push: "uploading", Align: "alignment"}.get(type(request.body), "")
    if due(where):
        wait_for_others()
    true_submit(self, request, on_answer)
    happen(where, wait=False)


def all_reduce(self: RpcTransport, weights: Weights) -> int:
    """In the all-reduce: the others come to it only after the fault."""
    if now == int(round) and place == "all-reduce":
        wait_until(manifest.exists)
        if mine:
            threading.Thread(target=happen, args=["all-reduce"]).start()
        else:
            wait_until(moment.exists)
    return true_all_reduce(self, weights)


def replace(source: str | Path, target: str | Path) -> None:
    """Stop at `writing`: a part or the manifest has been written and has yet to get its name.

    It belongs to the checkpoint of the round before; the round has begun.
    """
    name = MANIFEST if rank == "0" else f"rank-{rank}.pt"
    if mine and place == "writing" and Path(target) == manifest.with_name(name):
        wait_until(lambda: now == int(round))
        wait_for_sign_of_life()
        happen("writing", wait=False)
    true_replace(source, target)


if mine and fault == "absent":
    moment.write_text(str(time.time()))
    time.sleep(3600)
true_beat, SignsOfLife._beat = SignsOfLife._beat, beat  # type: ignore[method-assign]
true_train_round, Trainer.train_round = Trainer.train_round, train_round  # type: ignore[method-assign]
true_submit, RpcTransport.submit = RpcTransport.submit, submit  # type: ignore[method-assign]
true_all_reduce, RpcTransport.all_reduce = RpcTransport.all_reduce, all_reduce  # type: ignore[method-assign]
true_replace, os.replace = os.replace, replace
before(Client, "backward", "computing")
before(Server, "submit", "serving")
before(AuxiliaryFit, "fit", "fitting")
sys.exit(cli.main())
