"""The files that a new user touches first: the configurations and the README's commands."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from fslsage_rpc.config.loading import load
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.variants import sweep_runs

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_of_the_repository_is_valid(path: Path) -> None:
    config = load(path)
    assert config.name in (path.stem, "run")
    if config.sweep.variants:
        assert sweep_runs(config)


def test_the_reference_lists_every_key_with_its_default() -> None:
    path = ROOT / "configs" / "reference.yaml"
    assert load(path) == Config()

    def keys(tree: dict[str, Any], prefix: str = "") -> set[str]:
        below = {
            k for key, v in tree.items() if isinstance(v, dict) and v for k in keys(v, f"{prefix}{key}.")
        }
        return below | {f"{prefix}{key}" for key in tree}

    listed = keys(yaml.safe_load(path.read_text()))
    assert listed == keys(dataclasses.asdict(Config())) | {"base"}


def test_ci_runs_the_readmes_commands_in_the_readmes_words() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    set_up = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "
    train = "torchrun --standalone --nproc_per_node=3 -m fslsage_rpc train configs/quickstart.yaml"
    assert lines.count(f"{set_up}. && {train}") == 1
    assert lines.count(f"{set_up}'.[test,llm]' && pytest") == 1


def test_jobs_that_the_repository_starts_by_torchrun_need_no_host_name_that_resolves() -> None:
    alone, address = "--standalone", "--local-addr=127.0.0.1"
    folders = [ROOT / name for name in (".ci", "benchmarks", "launch", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in ("", ".py", ".sh")]
    starters = [text for path in files if path.is_file() and alone in (text := path.read_text())]
    own = Path(__file__).read_text()
    starters.remove(own)
    assert len(starters) > 5
    for text in starters:
        assert text.count(alone) == text.count(address)
