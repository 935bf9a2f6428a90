"""`fslsage_rpc.load`: what runs have left, as plain data and as tables."""

import json
import sys
from pathlib import Path

import pytest

import fslsage_rpc
from support.report_folders import MIB, line, write_bench, write_run, write_sweep
from support.trees import tree
from support.user_input import mistake

SUMMARY = {"first_round": 1, "test_accuracy": {"last": 0.5, "best": 0.75}, "diverged": None}


def study(folder: Path) -> Path:
    """A sweep with one run that is finished, one that is not, and one without a round."""
    write_sweep(
        folder,
        {
            "iid-fsl_sage-seed0": [0.25, 0.75, 0.5, 0.5],
            "iid-fsl_sage-seed1": [0.25],
            "skewed-splitfed_v1-seed1": [],
        },
    )
    (folder / "iid-fsl_sage-seed0" / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "skewed-fsl_sage-seed2").mkdir()
    return folder


def test_a_run_is_what_train_has_returned(tmp_path: Path) -> None:
    trained = fslsage_rpc.train(tree(tmp_path, rounds=2, seed=3))
    (loaded,) = fslsage_rpc.load(trained.folder)
    assert loaded == trained
    assert (loaded.seed, loaded.variant) == (3, None)
    assert loaded.config["clients"]["batch_size"] == 16
    assert [line["round"] for line in loaded.rounds] == [1, 2]


def test_of_a_sweep_it_has_all_runs_that_have_begun(tmp_path: Path) -> None:
    runs = fslsage_rpc.load(study(tmp_path / "study"))
    assert [(run.variant, run.seed, len(run.rounds)) for run in runs] == [
        ("iid-fsl_sage", 0, 4),
        ("iid-fsl_sage", 1, 1),
        ("skewed-splitfed_v1", 1, 0),
    ]
    assert [run.summary for run in runs] == [SUMMARY, None, None]
    assert runs[1].rounds == [line(0, 0.25, aligned=True)]
    assert runs[-1].config["algorithm"]["name"] == "splitfed_v1"
    assert [run.seed for run in runs[:2]] == [0, 1]
    assert runs[0].folder == tmp_path / "study" / "iid-fsl_sage-seed0"


def test_tables_have_nested_keys_with_dots(tmp_path: Path) -> None:
    runs = fslsage_rpc.load(study(tmp_path / "study"))
    rounds = runs.rounds_table()
    assert list(rounds.columns[:3]) == ["variant", "seed", "round"]
    assert list(rounds["seed"]) == [0, 0, 0, 0, 1]
    assert list(rounds["test_accuracy"]) == [0.25, 0.75, 0.5, 0.5, 0.25]
    assert set(rounds["wire_bytes.smashed_up"]) == {2 * MIB}
    assert list(rounds["alignment.nmse_before"].notna()) == [True, False, True, False, True]
    assert "alignment" not in rounds.columns, "null in some rounds, it is a mapping in others"
    summary = runs.summary_table()
    assert summary.to_dict("records") == [
        {
            "variant": "iid-fsl_sage",
            "seed": 0,
            "first_round": 1,
            "test_accuracy.last": 0.5,
            "test_accuracy.best": 0.75,
            "diverged": None,
        }
    ]


def test_a_table_of_nothing_has_no_rows(tmp_path: Path) -> None:
    runs = fslsage_rpc.load(write_sweep(tmp_path / "study", {}))
    assert len(runs) == len(runs.rounds_table()) == len(runs.summary_table()) == 0


def test_without_pandas_tables_say_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fslsage_rpc.load(study(tmp_path / "study"))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"^tables of runs need pandas: pip install pandas$"):
        runs.rounds_table()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    bench = write_bench(tmp_path / "bench")
    assert mistake(fslsage_rpc.load, bench) == (
        f"load: got '{bench}', which holds a bench, expected a run or a sweep"
    )
    assert "which cannot be read (No such file or directory)" in mistake(fslsage_rpc.load, tmp_path / "no")
    damaged = write_run(tmp_path / "run", [0.5])
    (damaged / "summary.json").write_text("{}")
    assert mistake(fslsage_rpc.load, damaged) == (
        f"{damaged / 'summary.json'}: is damaged, expected what the program wrote"
    )
