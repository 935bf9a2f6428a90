"""`python -m fslsage_rpc`."""

import sys

from fslsage_rpc.cli import main

if __name__ == "__main__":
    sys.exit(main())
