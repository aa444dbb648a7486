"""The ablation program: its cells, what it says of finished runs, and going on."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from eval.ablation import (
    AblationConfig,
    Cell,
    cells_of,
    command,
    read_results,
    require_same_settings,
    run_folder,
    train_cell,
    unfinished,
)
from eval.ablation_report import draw_figure, tables
from eval.run_arguments import parse_arguments
from pipeline.program import InputError

ROOT = Path(__file__).resolve().parents[1]


def settings(folder, **changes):
    return AblationConfig(**{"train": "TRAIN", "test": "TEST", "folder": folder, **changes})


def run_of(cell, seed, top1, **more):
    return {
        "cell": cell.name,
        "mechanism": cell.mechanism,
        "length": cell.length,
        "momentum": cell.momentum,
        "seed": seed,
        "diverged": False,
        "loss": 5.0,
        "pretext_accuracy": 0.5,
        "knn_top1": top1,
        **more,
    }


def test_each_cell_of_the_tables_stands_once(tmp_path):
    cells = cells_of(settings(tmp_path, lengths=(4, 8), momenta=(0.0, 0.99), batch=16))
    assert cells == [
        Cell("end-to-end", 15),
        Cell("queue", 4, 0.99),
        Cell("queue", 8, 0.99),
        Cell("queue", 8, 0.0),
        Cell("memory-bank", 4),
        Cell("memory-bank", 8),
    ]


def test_a_cell_is_a_run_of_train_py_that_differs_by_its_flags_only(tmp_path):
    config = settings(tmp_path)
    words = command(config, Cell("queue", 64, 0.5), 7)
    parsed = parse_arguments(words[1:], "").run
    moco = parsed.moco
    assert words[0] == "train.py"
    assert (moco.mechanism, moco.queue, moco.momentum, parsed.seed) == ("queue", 64, 0.5, 7)
    bank = parse_arguments(command(config, Cell("memory-bank", 64), 7)[1:], "").run
    assert bank.moco.mechanism == "memory-bank"
    assert bank.optimiser == parsed.optimiser
    assert bank.encoder == parsed.encoder


def test_a_run_that_was_not_judged_is_refused_with_the_reason(tmp_path, monkeypatch):
    cell, config = Cell("queue", 64, 0.5), settings(tmp_path)
    log = run_folder(config, cell, 0) / "run.jsonl"
    log.parent.mkdir(parents=True)
    lines = [{"step": 1, "loss": 5.0, "pretext_accuracy": 0.5}, {"step": 1, "knn_error": "no RAM"}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    with pytest.raises(InputError, match="was not judged: no RAM"):
        train_cell(config, cell, 0)


def test_finished_runs_are_not_made_again_and_a_cut_line_is_no_run(tmp_path):
    config = settings(tmp_path, lengths=(4,), momenta=(0.99,), batch=16, seeds=2)
    done = [run_of(Cell("queue", 4, 0.99), 0, 0.5), run_of(Cell("memory-bank", 4), 1, 0.4)]
    path = tmp_path / "ablation.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in done) + '{"cell": "queue-K4-m')
    assert read_results(path) == done
    assert list(unfinished(config, done)) == [
        (Cell("end-to-end", 15), 0),
        (Cell("memory-bank", 4), 0),
        (Cell("end-to-end", 15), 1),
        (Cell("queue", 4, 0.99), 1),
    ]


def test_other_settings_in_the_same_folder_are_refused_and_more_seeds_are_not(tmp_path):
    require_same_settings(settings(tmp_path / "new"))
    require_same_settings(settings(tmp_path / "new", seeds=9, lengths=(5,)))
    with pytest.raises(InputError, match=r"holds runs with epochs 8\.0, now it is 13"):
        require_same_settings(settings(tmp_path / "new", epochs=13.0))


@pytest.mark.parametrize("changes", [{"seeds": 0}, {"batch": 0}, {"lengths": ()}], ids=str)
def test_settings_without_runs_are_refused(tmp_path, changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        settings(tmp_path, **changes)


RUNS = [
    run_of(Cell("end-to-end", 15), 0, 0.30, untrained_top1=0.25),
    run_of(Cell("queue", 4, 0.99), 0, 0.40),
    run_of(Cell("queue", 4, 0.99), 1, 0.42),
    run_of(Cell("queue", 4, 0.0), 0, 0.10),
    run_of(Cell("queue", 4, 0.0), 1, 0.99, diverged=True),
    run_of(Cell("memory-bank", 4), 0, 0.35),
]


def test_tables_say_mean_deviation_number_and_what_diverged():
    out = io.StringIO()
    console = Console(file=out, width=100)
    for table in tables(RUNS, (0.0, 0.99), 0.99, 4):
        console.print(table)
    rows = [[cell.strip() for cell in line.split("│")] for line in out.getvalue().splitlines()]
    found = {row[1]: row[2:-1] for row in rows if len(row) > 2}
    assert found["end-to-end"] == ["", "30.0 (1)"]
    assert found["memory bank"] == ["35.0 (1)", ""]
    assert found["MoCo, queue"] == ["41.0 ± 1.4 (2)", ""]
    assert found["0"] == ["10.0 (1, 1 diverged)", "5.000", "0.500"]
    assert found["0.99"] == ["41.0 ± 1.4 (2)", "5.000", "0.500"]
    assert "encoder before training: 25.0" in out.getvalue()


def test_the_figure_is_a_png(tmp_path):
    draw_figure(RUNS, tmp_path / "figure.png", 0.99, 4)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_program_trains_every_cell_and_goes_on_where_it_stopped(shard_set, tmp_path):
    folder = tmp_path / "out"
    words = [sys.executable, "eval/ablation.py", str(shard_set), str(shard_set), str(folder)]
    words += ["--seeds", "1", "--epochs", "1", "--batch", "16", "--lengths", "8"]
    words += ["--momenta", "0"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    runs = read_results(folder / "ablation.jsonl")
    names = ["end-to-end-K15", "queue-K8-m0.99", "queue-K8-m0", "memory-bank-K8"]
    assert [run["cell"] for run in runs] == names
    assert all(run["step"] == 2 and 0 <= run["knn_top1"] <= 1 for run in runs)
    lines = (folder / "ablation.jsonl").read_text().splitlines(keepends=True)
    (folder / "ablation.jsonl").write_text("".join(lines[:3]))
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert read_results(folder / "ablation.jsonl")[:3] == runs[:3]
    assert "MoCo, queue" in again.stdout
