"""`fslsage`, or `python -m fslsage_rpc`."""

import gc
import sys

from fslsage_rpc.job.stopping import INTERRUPTED, uninterrupted


def main() -> int:
    """Run the command line, see `fslsage_rpc.cli`; Ctrl-C while that is imported is no traceback either.

    Returns:
        The exit status.
    """
    try:
        with uninterrupted():
            from fslsage_rpc.cli import main as run
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        gc.freeze()  # or the interpreter ends with a second's search for garbage among torch's modules


if __name__ == "__main__":
    sys.exit(main())
