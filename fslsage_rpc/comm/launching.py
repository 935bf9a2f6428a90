"""The self-launching form: starts this program's own ranks on this host, as torchrun would."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fslsage_rpc.comm import rendezvous


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run `python -m fslsage_rpc ARGUMENTS` as so many ranks and wait for them.

    Returns:
        The exit status: 0; 2 where the ranks found the input wrong; 128 and its number after a signal; else
        1.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what went wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    rendezvous.register()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend=rendezvous.BACKEND,
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "fslsage_rpc", *arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:  # it could not say so itself
            print(f"fslsage_rpc: rank {rank} was ended by {first.signal_name()}", file=sys.stderr, flush=True)
        return 2 if first.exitcode == 2 else 1
    except SignalException as error:
        return 128 + error.sigval
    return 0
