"""`fslsage`, or `python -m fslsage_rpc`."""

import sys

from fslsage_rpc.stopping import INTERRUPTED, uninterrupted


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


if __name__ == "__main__":
    sys.exit(main())
