"""Shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests must not depend on the cores

import torch

torch.set_num_threads(1)
