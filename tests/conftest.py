"""Shared by all tests."""

import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests must not depend on the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder is looked up nowhere

import pytest
import torch

torch.set_num_threads(1)
STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes", type=float, help="begin no test later than this; those are skipped, by name"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip(f"begins no more after {minutes:g} minutes")


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with e2e/ and tokenizer/ of toy_language.py."""
    from support.toy_language import write_data, write_tokenizer

    root = tmp_path_factory.mktemp("toy")
    write_data(root)
    write_tokenizer(root / "tokenizer")
    return root
