#!/usr/bin/env bash
# Everything that a machine with a GPU can say, in one command and under 8 minutes, without a network:
#
#     launch/gpu_check.sh [FOLDER] [DATA]
#
# runs the tests that need a GPU, then measures samples per second, with CUDA graphs and without, against the bare
# arithmetic, and writes gpu-speed.json and gpu-speed.md into FOLDER (docs/results). DATA is a folder with torchvision's CIFAR-10; without
# it images are synthetic. Nothing needs to be installed but torch, torchvision, pyyaml, rich and pytest. Without a
# GPU the tests are skipped by name, and the measurement is a tiny one on the CPU, named so in its files.
set -euo pipefail
folder=${1:+$(realpath -m "$1")} data=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "== tests that need a GPU, and those of what they rest on"
# of the settings of all tests, those that other packages would have to be there for are left out
python3 -m pytest -o addopts= -p no:cacheprovider -vv --durations=10 tests/test_cuda.py tests/test_placement.py

echo "== samples per second"
python3 benchmarks/gpu_speed.py "${folder:-docs/results}" ${data:+--data "$data"}
