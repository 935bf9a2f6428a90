#!/usr/bin/env bash
# All that a machine with a GPU can say, in seven stages, none of which can cost another one its results:
#
#     launch/gpu_check.sh FOLDER [--stages 1-4] [--data DATA]
#
# writes FOLDER/results.jsonl and FOLDER/stage-N.log as it goes, and prints a summary last. It needs no network, and
# nothing but torch, torchvision, pyyaml, rich and pytest. DATA is a folder with torchvision's CIFAR-10; without it
# images are synthetic. Without a GPU it does what a CPU can, and names the rest as skipped.
#
# No GPU has run this yet. The three calls of whoever has one first, each under 6 minutes by its own limits:
#
#     launch/gpu_check.sh OUT --stages 1-4
#     launch/gpu_check.sh OUT --stages 5-7        once what the first call found is mended
#     launch/gpu_paper.sh SECONDS DATA            and at once, while the machine is warm
#
# launch/gpu_check.sh OUT --summary > docs/results/gpu-check.md makes the page to commit.
set -euo pipefail
exec python3 "$(dirname "$0")/gpu_check.py" "$@"
