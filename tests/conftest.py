"""Shared by all tests."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests must not depend on the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder is looked up nowhere

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with e2e/ and tokenizer/ of toy_language.py."""
    from toy_language import write_data, write_tokenizer

    root = tmp_path_factory.mktemp("toy")
    write_data(root)
    write_tokenizer(root / "tokenizer")
    return root
