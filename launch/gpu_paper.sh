#!/usr/bin/env bash
# Accuracy of FSL-SAGE, CSE-FSL and SplitFedV1 on CIFAR-10, against rounds, bytes and seconds, in so many seconds:
#
#     launch/gpu_paper.sh SECONDS DATA [FOLDER [key=value ...]]
#
# DATA holds cifar-10-batches-py, all of its files or some; FOLDER is new or empty (runs/gpu-paper).
# The keys are those of configs/reference.yaml, as precision=bf16. benchmarks/gpu_paper.py says what is done.
# Needs torch, torchvision, pyyaml and rich, and no network. Without a GPU it runs too, on the CPU.
set -euo pipefail
started=$(date +%s.%N)
root=$(realpath "$(dirname "$0")/..")
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec python3 "$root/benchmarks/gpu_paper.py" --started "$started" "$@"
