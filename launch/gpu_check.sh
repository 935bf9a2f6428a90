#!/usr/bin/env bash
# All that a machine with a GPU can say, in seven stages, none of which can cost another one its results:
#
#     launch/gpu_check.sh FOLDER [--stages 1-4]
#
# writes FOLDER/results.jsonl and FOLDER/stage-N.log as it goes, and prints a summary last. It needs no network, and
# nothing but torch, torchvision, pyyaml, rich and pytest. Images are synthetic.
# Without a GPU it does what a CPU can, and names the rest as skipped.
#
# No GPU has run this yet. The three calls of whoever has one first, the first two under 6 minutes each by their limits:
#
#     launch/gpu_check.sh OUT --stages 1-4
#     launch/gpu_check.sh OUT --stages 5-7        once what the first call found is mended
#     launch/gpu_paper.sh SECONDS DATA OUT/paper  and at once, while the machine is warm; DATA holds CIFAR-10, or a part
#
# Keys after OUT/paper, as model.memory_format=channels_last, take what stage 2 found fastest and stage 3 right.
# launch/gpu_check.sh OUT --summary > docs/results/gpu-check.md makes the page to commit.
set -euo pipefail
exec python3 "$(dirname "$0")/gpu_check.py" "$@"
