"""A job whose ranks may outlive each other, and the run in one process that it is held to."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import yaml

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer
from support import elastic_rank
from support.forked_ranks import LOOPBACK, RankProcess, fork, job_variables

END_SECONDS = 150


class ElasticJob:
    """Ranks of one run, each a process that nobody ends when another dies. A context: none outlives it."""

    def __init__(self, ranks: int, keys: dict[str, Any], folder: Path, **variables: str):
        self.folder = folder / "run"
        self._log = folder / "log"
        self._log.touch()
        self._config = folder / "config.yaml"
        keys = {**keys, "transport": "rpc", "output": str(folder)}
        keys["clients"] = {"on_loss": "drop", **keys["clients"]}
        self._config.write_text(yaml.safe_dump(keys))
        self._ranks = ranks
        with socket.create_server((LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
        self._variables = {**job_variables(ranks, port), **variables}
        self.processes: dict[int, RankProcess] = {}
        self._all: list[RankProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._all:
            process.kill()
            process.join()

    def start(self, fault: str = "-1:0:step:kill", ranks: Iterator[int] | None = None) -> Self:
        """Start these ranks, or all."""
        for rank in ranks or range(self._ranks):
            variables = {**self._variables, "FAULT": fault}
            process = fork(rank, variables, self._log, elastic_rank.main, ["train", str(self._config)])
            self.processes[rank] = process
            self._all.append(process)
        return self

    def wait(self, *ranks: int) -> list[int]:
        """The exit statuses of these ranks."""
        statuses = []
        for rank in ranks:
            self.processes[rank].join(END_SECONDS)
            status = self.processes[rank].exitcode
            assert status is not None, f"no end:\n{self.said}"
            statuses.append(status)
        return statuses

    def wait_until(self, text: str) -> None:
        """Until this has been said."""
        deadline = time.monotonic() + END_SECONDS
        while text not in self.said:
            assert time.monotonic() < deadline, f"not said: {text}\n{self.said}"
            time.sleep(0.05)

    @property
    def said(self) -> str:
        """The output of all ranks so far."""
        return self._log.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines that are events."""
        return [line for line in self.lines if "event" in line]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The lines that are rounds."""
        return [line for line in self.lines if "event" not in line]


def assert_equals_one_process(job: ElasticJob, keys: dict[str, Any]) -> None:
    """The job's model and figures are those of one process with the same clients in the same rounds."""
    experiment = Experiment.prepare(from_tree({**keys, "transport": "local"}))
    experiment.federation.follow(job.events)
    trainer = Trainer(experiment, open_world(experiment.config))
    lines: list[dict[str, Any]] = []
    trainer.train(lambda line, reports: lines.append(line))
    assert [line["round"] for line in job.rounds] == list(range(1, keys["rounds"] + 1))
    for mine, its in zip(lines, job.rounds, strict=True):
        for key in ("participants", "paper_bytes", "paper_bytes_total"):
            assert its[key] == mine[key], key
        loss = mine["train_loss"]
        assert its["train_loss"] == (loss and pytest.approx(loss, rel=1e-9))
    model = torch.load(job.folder / "model.pt", weights_only=True)
    for name, expected in trainer.final_model().items():
        assert (model[name].double() - expected.double()).norm() <= 1e-9 * expected.double().norm(), name


def gone_on_with_after_the_servers_death(keys: dict[str, Any], folder: Path) -> ElasticJob:
    """A job whose server is killed in round 3, which ends all ranks, and that is then started again."""
    with ElasticJob(3, keys, folder) as job:
        job.start("0:3:server:kill")
        assert job.wait(0, 1, 2) == [-signal.SIGKILL, 1, 1], job.said
        assert job.said.count("rank 0 is gone, and the job's store with it") == 1
        job.start()
        assert job.wait(0, 1, 2) == [0, 0, 0], job.said
    return job
