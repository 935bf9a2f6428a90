"""The command line, with a fault at the n-th estimate of one rank: FAULT="rank:n:raise" or "rank:n:kill"."""

import os
import signal
import sys
from typing import Any

from fslsage_rpc import cli  # first: it sets what torch logs
from fslsage_rpc.parties.client import Client

faulty_rank, countdown, fault = os.environ["FAULT"].split(":")
estimates = 0
true_estimate = Client.estimate


def estimate(self: Client, *arguments: Any) -> Any:
    global estimates
    estimates += 1
    if os.environ["RANK"] == faulty_rank and estimates == int(countdown):
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        raise ZeroDivisionError("a fault for the test")
    return true_estimate(self, *arguments)


Client.estimate = estimate  # type: ignore[method-assign]
sys.exit(cli.main())
