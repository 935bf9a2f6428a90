"""The command line as one rank, with a fault in a round, at a place: FAULT="rank:round:place:kind".

Places:

- `step`: between two steps of a client.
- `averaging`: before the all-reduce.
- `closing`: after a trained round, before its line.
- `server`: on rank 0, as it waits for the round's requests.
- `start`, in round -1: before the parties are built.

Kinds are `kill`, `stop` and `raise`. Three more variables make a rank slow:

- PACE: seconds to wait before each round of the generation after the first loss.
- SLOW_FIT: a client whose auxiliary model takes the server 2 s more to fit.
- SLOW_PART: a rank that takes 2 s more to write its part of a checkpoint.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from fslsage_rpc import cli  # first: it sets what torch logs
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.server import Server
from fslsage_rpc.randomness import LocalStep
from fslsage_rpc.runs import checkpoints
from fslsage_rpc.training.trainer import Trainer

true_train_round, true_batches = Trainer.train_round, Client.batches
true_average_clients, true_close_round = Trainer._average_clients, Trainer._close_round
true_wait, true_fit = Server.wait, AuxiliaryFit.fit
true_init, true_write_part = Trainer.__init__, checkpoints.write_part
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
current = -1
done = False


def fault(here: str) -> None:
    """Do it, once."""
    global done
    rank, round, place, kind = os.environ["FAULT"].split(":")
    if os.environ["RANK"] == rank and current == int(round) and place == here and not done:
        done = True
        print("fault now", flush=True)
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        else:
            raise ZeroDivisionError("a fault for the test")


def train_round(self: Trainer, t: int) -> float:
    global current
    current = t
    if self.world.generation == 1:  # time for a replacement to start
        time.sleep(float(os.environ.get("PACE", "0")))
    return true_train_round(self, t)


def batches(self: Client, t: int) -> Iterator[Any]:
    for step, batch in enumerate(true_batches(self, t)):
        if step == 1:
            fault("step")
        yield batch


def average_clients(self: Trainer, *arguments: Any) -> None:
    fault("averaging")
    true_average_clients(self, *arguments)


def close_round(self: Trainer, *arguments: Any) -> Any:
    fault("closing")
    return true_close_round(self, *arguments)


def wait(self: Server) -> None:
    fault("server")
    true_wait(self)


def fit(self: AuxiliaryFit, targets: Any, at: LocalStep, *more: Any) -> Any:
    if str(at.client) == os.environ.get("SLOW_FIT"):
        time.sleep(2)
    return true_fit(self, targets, at, *more)


def init(self: Trainer, *arguments: Any) -> None:
    fault("start")
    true_init(self, *arguments)


def write_part(*arguments: Any) -> Any:
    if os.environ["RANK"] == os.environ.get("SLOW_PART"):
        time.sleep(2)
    return true_write_part(*arguments)


def main(*arguments: str) -> None:
    """The command, as this rank."""
    Trainer.train_round, Client.batches = train_round, batches  # type: ignore[method-assign]
    Trainer._average_clients, Trainer._close_round = average_clients, close_round  # type: ignore[method-assign]
    Server.wait, AuxiliaryFit.fit = wait, fit  # type: ignore[method-assign]
    Trainer.__init__, checkpoints.write_part = init, write_part  # type: ignore[method-assign]
    sys.exit(cli.main(arguments))
