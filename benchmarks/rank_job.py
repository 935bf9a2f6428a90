"""A benchmark that is a job of ranks: its command line, and its start."""

import argparse
import os
import subprocess
import sys


def overrides_on_ranks(script: str, description: str | None, ranks: int) -> list[str]:
    """On a rank, the command line's overrides of the configuration; without ranks, start so many of the
    script under torchrun, one thread each, and leave with their status.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    overrides: list[str] = parser.parse_args().overrides
    if "RANK" in os.environ:
        return overrides
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher += [f"--nproc_per_node={ranks}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    sys.exit(subprocess.run([sys.executable, *launcher, script, *overrides], env=environment).returncode)
