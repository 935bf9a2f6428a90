"""What a finished language model writes: in one process, or split between a client and the server rank."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fslsage_rpc.device.placement import open_device
from fslsage_rpc.errors import InputError
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.language import data as e2e
from fslsage_rpc.language.beam_search import NextLogits, write_on
from fslsage_rpc.language.task import LanguageTask
from fslsage_rpc.measure.request_times import RequestLog
from fslsage_rpc.parties.predictor import FinishedServer
from fslsage_rpc.runs.finished import FinishedRun, load_finished
from fslsage_rpc.transport.link import connect
from fslsage_rpc.transport.wire_ledger import WireLedger

MEANINGS_AT_ONCE = 16


class LastPosition(nn.Module):
    """Logits `[B, T, classes]` to those of the last position `[B, classes]`, which alone travel."""

    def forward(self, logits: Tensor) -> Tensor:
        """See the class."""
        return logits[:, -1].clone()  # a view would take all of them along


class Written(NamedTuple):
    """Texts, and the bytes that went between the two halves for them: smashed data up, logits down."""

    texts: list[str]
    wire_bytes: int


class Bleu(NamedTuple):
    """The BLEU score, of 100, of so many meaning representations of the test set, against all their texts."""

    score: float
    meanings: int


def language_run(folder: str | Path) -> tuple[FinishedRun, LanguageTask]:
    """The finished run of a folder, of a language model, and its task.

    Raises:
        InputError: it is not one.
    """
    run = load_finished(folder)
    if not isinstance(run.task, LanguageTask):
        raise InputError(f"{folder}: got a run on {run.config.data.name}, expected one of a language model")
    return run, run.task


def generate(folder: str | Path, meanings: Sequence[str], beams: int) -> Written | None:
    """Write a text for each meaning representation, with the client's half of the model on one rank and the
    server's on rank 0; with `transport: local` both in this process.

    Collective. Returns them on the rank that hosts the client.

    Raises:
        InputError: the folder is not that of a finished language model, or a meaning is too long for it.
    """
    run, task = language_run(folder)
    clients = replace(run.config.clients, on_loss="fail")  # no rank can be spared here
    prompts(task, meanings)  # too long ones are found before ranks meet
    world = open_world(replace(run.config, clients=clients))
    try:
        half = nn.Sequential(run.split.server, LastPosition())
        server = FinishedServer(half, world.device) if world.hosts_server else None
        ledger, written = WireLedger(), None
        link = connect(world.transport, server, ledger, RequestLog())
        if link and world.transport.client_rank == 0:
            client = run.split.client.to(world.device).eval()

            def next_logits(tokens: Tensor) -> Tensor:
                return link.predict(client(tokens.to(world.device))).cpu()

            texts = _write(task, next_logits, meanings, beams)
            wire_bytes = sum(sum(kinds.values()) for kinds in ledger.take().values())
            written = Written(texts, wire_bytes if world.transport.size > 1 else 0)
        world.transport.barrier()
        world.close()
    except BaseException as error:
        world.fail(error)
    return written


def bleu(folder: str | Path, limit: int | None, beams: int) -> Bleu:
    """Score what the whole model writes for the first meaning representations of E2E's test set.

    Raises:
        InputError: the folder is not that of a finished language model, or sacrebleu is not installed.
    """
    run, task = language_run(folder)
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        raise InputError("bleu: needs sacrebleu: pip install 'fslsage_rpc[llm]'") from None
    device = open_device(run.config, 0)
    model = run.split.whole().to(device).eval()
    references: dict[str, list[str]] = defaultdict(list)
    for pair in e2e.read(run.config.data.root, "test"):
        references[pair.meaning].append(pair.reference)
    meanings = list(references)[:limit]
    texts = _write(task, lambda tokens: model(tokens.to(device))[:, -1].cpu(), meanings, beams)
    most = max(len(references[meaning]) for meaning in meanings)
    streams: list[list[Any]] = [  # None: no more; it is annotated to take texts alone
        [references[meaning][i] if i < len(references[meaning]) else None for meaning in meanings]
        for i in range(most)
    ]
    return Bleu(corpus_bleu(texts, streams).score, len(meanings))


def prompts(task: LanguageTask, meanings: Sequence[str]) -> list[list[int]]:
    """The tokens that each text begins with.

    Raises:
        InputError: a meaning representation is empty, or leaves no room for a text.
    """
    if not all(meaning.strip() for meaning in meanings):
        raise InputError("generate: got an empty TEXT, expected one as 'name[Aromi], eatType[pub]'")
    encoded = task.vocabulary.encode([e2e.prompt(meaning) for meaning in meanings])
    (longest,) = task.sample_shape
    for meaning, tokens in zip(meanings, encoded, strict=True):
        if len(tokens) >= longest:
            raise InputError(
                f"{meaning!r}: got {len(tokens)} tokens, expected less than data.arguments.tokens, {longest}"
            )
    return encoded


def _write(task: LanguageTask, next_logits: NextLogits, meanings: Sequence[str], beams: int) -> list[str]:
    """Meanings of one length are taken together: a text begins at its first token, without padding."""
    encoded = prompts(task, meanings)
    by_length = defaultdict(list)
    for place, tokens in enumerate(encoded):
        by_length[len(tokens)].append(place)
    texts = [""] * len(meanings)
    for places in by_length.values():
        for first in range(0, len(places), MEANINGS_AT_ONCE):
            here = places[first : first + MEANINGS_AT_ONCE]
            begun = torch.tensor([encoded[place] for place in here])
            longest, end = task.sample_shape[0], task.vocabulary.end
            written = write_on(next_logits, begun, task.classes, end, longest, beams)
            for place, tokens in zip(here, written, strict=True):
                texts[place] = task.vocabulary.decode(tokens).strip()
    return texts
