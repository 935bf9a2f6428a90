"""One rank of a training whose peak of resident memory is written down, or of a check of the same:

torchrun ... tests/support/peak_program.py FOLDER train|check CONFIG [key=value ...]
"""

import json
import os
import sys
from pathlib import Path

from fslsage_rpc.check.findings import COPIES
from fslsage_rpc.check.run import examine
from fslsage_rpc.cli import main
from fslsage_rpc.config.loading import load
from fslsage_rpc.device.memory import status_bytes


def write_peak(folder: Path) -> None:
    """Write how much this rank's training has held."""
    (folder / f"train-{os.environ['RANK']}.json").write_text(json.dumps(status_bytes("VmHWM")))


if __name__ == "__main__":
    folder, (command, config, *overrides) = Path(sys.argv[1]), sys.argv[2:]
    if command == "train":
        status = main([command, config, *overrides])
        write_peak(folder)
        sys.exit(status)
    findings = examine(load(config, overrides), configured=True)
    if findings:
        uses = [rank.use for rank in findings.ranks if rank.use]
        peaks = [(use.peak, (use.peak or 0) + COPIES * use.checkpoint) for use in uses]
        (folder / "check.json").write_text(json.dumps(peaks))
