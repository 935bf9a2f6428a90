"""Ranks of a job as forks of one process that has imported torch already: they start at once, where those of
torchrun take seconds. They end without the interpreter's own clean-up; nothing else is different. torchrun
and the launchers have tests of their own.
"""

import faulthandler
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed import TCPStore

from support.usual_order import keep_usual_order

RankProcess = multiprocessing.context.ForkServerProcess
LOOPBACK = "127.0.0.1"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(  # the command line first: it sets what torch logs
    ["fslsage_rpc.cli", "torch._dynamo", "fslsage_rpc.training.run", "fslsage_rpc.job.rpc_world"]
)


def run_ranks(
    ranks: int, program: Callable[..., None], arguments: Sequence[str], folder: Path, timeout: float
) -> str:
    """Call a function of a module on each rank of a job, and wait for the end, or kill all of it.

    Args:
        folder: for what the ranks say.

    Returns:
        That.
    """
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    variables = {**job_variables(ranks, store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    said = folder / f"said-{time.monotonic_ns()}"
    said.touch()  # a rank may end before it says anything
    processes: list[RankProcess] = []
    deadline = time.monotonic() + timeout
    try:
        for rank in range(ranks):
            processes.append(fork(rank, variables, said, program, arguments))
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGABRT)  # for the stacks of its threads, where they are asked for
            process.join(1)
        statuses = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    output = said.read_text()
    why = f"after {timeout:.0f} s" if late else output.strip().rpartition("\n")[2]
    assert statuses == [0] * ranks, f"exit statuses {statuses}: {why}\n{output}"
    return output


def job_variables(ranks: int, port: int) -> dict[str, str]:
    """Variables that tell every rank of a job on this host about it, its own number apart."""
    return {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
    }


def fork(
    rank: int, variables: dict[str, str], said: Path, program: Callable[..., None], arguments: Sequence[str]
) -> RankProcess:
    """Start one rank: it calls the function, with these variables beside RANK and this process's, and adds to
    what is said.
    """
    sys.audit("os.fork")  # which happens in another process
    variables = {**os.environ, **variables}  # as they are now: the process that forks has older ones
    process = CONTEXT.Process(target=_rank, args=(rank, variables, said, program, arguments))
    process.start()
    return process


def _rank(
    rank: int, variables: dict[str, str], said: Path, program: Callable[..., None], arguments: Sequence[str]
) -> None:
    os.environ.clear()
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    if faulthandler.is_enabled():  # PYTHONFAULTHANDLER asks for it
        faulthandler.enable(os.dup(2))  # stacks go where the tests' own output goes
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    keep_usual_order()
    program(*arguments)
