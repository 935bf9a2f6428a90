"""The commands of language models."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fslsage_rpc.commands import count, needs_ranks
from fslsage_rpc.config.loading import load
from fslsage_rpc.job.stopping import uninterrupted


def add_commands(commands: Any) -> None:
    """Add them to argparse's subparsers."""
    generate = commands.add_parser("generate", help="write texts with the finished language model of a run")
    generate.add_argument("run", help="run folder")
    generate.add_argument("meanings", nargs="+", metavar="TEXT", help="as 'name[Aromi], eatType[pub]'")
    generate.set_defaults(command=_generate)
    bleu = commands.add_parser("bleu", help="score what a finished language model writes for the test set")
    bleu.add_argument("run", help="run folder")
    bleu.add_argument("limit", nargs="?", metavar="N", help="its first N meaning representations; else all")
    bleu.set_defaults(command=_bleu)
    for command in (generate, bleu):
        command.add_argument("--beams", default="10", metavar="N", help="of the beam search")


def _generate(options: argparse.Namespace, arguments: list[str]) -> int:
    with uninterrupted():
        from fslsage_rpc.language.generation import generate, language_run

    beams = count("--beams", options.beams)
    if needs_ranks(load(Path(options.run) / "config.yaml")):
        language_run(options.run)
        from fslsage_rpc.job.launching import launch

        return launch(2, arguments)  # one for each half of the model
    written = generate(options.run, options.meanings, beams)
    if written:
        print(*written.texts, sep="\n")
        if written.wire_bytes:
            print(f"{written.wire_bytes:,} bytes between the two halves", file=sys.stderr)
    return 0


def _bleu(options: argparse.Namespace, arguments: list[str]) -> int:
    with uninterrupted():
        from fslsage_rpc.language.generation import bleu

    beams = count("--beams", options.beams)
    limit = count("N", options.limit) if options.limit else None
    scored = bleu(options.run, limit, beams)
    print(f"BLEU {scored.score:.2f} on {scored.meanings} meaning representations, {beams} beams")
    return 0
