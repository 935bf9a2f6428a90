"""The five algorithms on E2E texts: a small GPT-2 with LoRA on two client ranks, by loss on unseen texts.

    python benchmarks/language.py --data ROOT [--tokenizer FOLDER] [--out DIR]

Trains configs/e2e_gpt2_tiny.yaml once with each algorithm, over RPC, and writes a table of losses on the
development set, beside the unigram entropy of the training texts: the least that a model can lose on them
that knows how frequent each token is, and nothing else.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from fslsage_rpc.config.loading import load
from fslsage_rpc.language.data import IGNORED
from fslsage_rpc.tasks import open_task

CONFIG = Path(__file__).parent.parent / "configs" / "e2e_gpt2_tiny.yaml"
ALGORITHMS = ("fsl_sage", "cse_fsl", "splitfed_v1", "splitfed_v2", "fedavg")


def unigram_entropy(keys: list[str]) -> float:
    """Of the predicted tokens of the training texts, in nats, by their own frequencies."""
    config = load(CONFIG, keys)
    task = open_task(config)
    batches = task.batches(task.load(train=True), 500, torch.device("cpu")).in_order()
    following = torch.cat([y[y != IGNORED] for _, y in batches])
    shares = following.bincount(minlength=task.classes).double() / len(following)
    return float(torch.special.entr(shares).sum())


def main() -> None:
    """Train, and print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, metavar="ROOT", help="folder that holds e2e/")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="GPT-2's; else ROOT/gpt2_tokenizer")
    parser.add_argument("--out", default="runs/language", metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    tokenizer = options.tokenizer or f"{options.data}/gpt2_tokenizer"
    keys = [f"data.root={options.data}", f"data.arguments.tokenizer={tokenizer}", *options.overrides]
    lines = [
        f"Unigram entropy of the training texts: {unigram_entropy(keys):.2f} nats a token.",
        "",
        "| algorithm | dev loss by round, nats | perplexity | right tokens | s/round | wire MiB |",
        "|---|---|---|---|---|---|",
    ]
    for algorithm in ALGORITHMS:
        run = [f"algorithm.name={algorithm}", f"name={algorithm}", f"output={options.out}", "resume=never"]
        subprocess.run([sys.executable, "-m", "fslsage_rpc", "train", str(CONFIG), *keys, *run], check=True)
        folder = Path(options.out) / algorithm
        rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = rounds[-1]
        seconds = last["elapsed_seconds"] / len(rounds)
        wire = sum(sum(line["wire_bytes"].values()) for line in rounds) / 2**20
        losses = ", ".join(f"{line['test_loss']:.2f}" for line in rounds if line["test_loss"] is not None)
        lines.append(
            f"| {algorithm} | {losses} | {last['test_perplexity']:.1f} | {last['test_accuracy']:.3f} "
            f"| {seconds:.1f} | {wire:.0f} |"
        )
    text = "\n".join(lines)
    print(text)
    (Path(options.out) / "language.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
