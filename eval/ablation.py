"""The ablation tables of MoCo in miniature: length of the dictionary, momentum, mechanism.

    python eval/ablation.py TRAIN_SHARDS TEST_SHARDS FOLDER

Trains a small ResNet once for each cell and seed, with train.py and its recipe cifar10, judges it
by kNN, and prints figure 3 and the table of section 4.1 of https://arxiv.org/abs/1911.05722 as they
come out at that scale. The defaults are 30 runs; one of 10,000 labelled pictures of 32 px took two
minutes on a shared CPU core. Each finished run is a line of FOLDER/ablation.jsonl; the same command
goes on where it was interrupted. FOLDER/ablation.png is the figure.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

if not __package__:  # run as a script: import from the repository root, not from eval/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eval.ablation_report import Results, draw_figure, tables
from eval.run_report import LOG_NAME
from pipeline.command_line import parse_flags, require_at_least_1
from pipeline.program import InputError, run_program
from pipeline.settings import to_plain

ROOT = Path(__file__).resolve().parents[1]
RESULTS_NAME, SETTINGS_NAME, FIGURE_NAME = "ablation.jsonl", "settings.json", "ablation.png"
PAPER_MOMENTUM = 0.99  # of the queue in the sweep of K; the notebook's, as the set is small
INPUT_ERROR = 2  # exit code of train.py, for a run that diverged too


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What is compared, and on what."""

    train: Annotated[str, tyro.conf.Positional]
    """Labelled shards to train on; their labels vote in the kNN score."""
    test: Annotated[str, tyro.conf.Positional]
    """Labelled shards that are judged."""
    folder: Annotated[Path, tyro.conf.Positional]
    """Of the results; new, or one to go on with."""
    seeds: int = 3
    """Runs of each cell."""
    epochs: float = 8.0
    """Passes over the pictures in each run."""
    batch: int = 128
    """Pictures in a step; an end-to-end dictionary is as long."""
    lr: float = 0.03
    """The highest."""
    lengths: tuple[int, ...] = (128, 512, 2048)
    """Lengths K of queue and memory bank."""
    momenta: tuple[float, ...] = (0.0, 0.9, 0.99, 0.999)
    """Of the key encoder, at the greatest length."""
    threads: int = 0
    """CPU threads of a run. 0: all cores; 1 where other programs use them too."""
    backbone: str = "test_resnet"
    """Name in timm."""

    def __post_init__(self) -> None:
        require_at_least_1(self, "seeds", "batch")
        if not self.lengths or not self.momenta:
            raise InputError("--lengths and --momenta: give at least one number for each")


@dataclass(frozen=True)
class Cell:
    """One form of the method."""

    mechanism: str
    length: int
    momentum: float | None = None

    @property
    def name(self) -> str:
        """Of its folder and in the results."""
        momentum = "" if self.momentum is None else f"-m{self.momentum:g}"
        return f"{self.mechanism}-K{self.length}{momentum}"


def cells_of(config: AblationConfig) -> list[Cell]:
    """Every cell of the tables, each once."""
    longest = max(config.lengths)
    cells = [Cell("end-to-end", config.batch - 1)]
    cells += [Cell("queue", length, PAPER_MOMENTUM) for length in config.lengths]
    cells += [Cell("queue", longest, momentum) for momentum in config.momenta]
    cells += [Cell("memory-bank", length) for length in config.lengths]
    return list(dict.fromkeys(cells))


def command(config: AblationConfig, cell: Cell, seed: int) -> list[str]:
    """The run of a cell, as one could type it."""
    flags = {
        "encoder.backbone": config.backbone,
        "encoder.stem": "imagenet",
        "batch": config.batch,
        "epochs": config.epochs,
        "optimiser.lr": config.lr,
        "moco.mechanism": cell.mechanism,
        "moco.queue": cell.length,
        "seed": seed,
        "data.shards": config.train,
        "data.threads": config.threads,
        "knn-train": config.train,
        "knn-test": config.test,
        "knn-every": 10**9,  # after the last step only
        "save-every": 10**9,
        "output": run_folder(config, cell, seed),
    }
    if cell.momentum is not None:
        flags["moco.momentum"] = cell.momentum
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    is_begun = (run_folder(config, cell, seed) / LOG_NAME).exists()
    return ["train.py", "cifar10", *words, *(["--resume"] if is_begun else [])]


def run_folder(config: AblationConfig, cell: Cell, seed: int) -> Path:
    """Where a run of a cell lies."""
    return config.folder.absolute() / "runs" / f"{cell.name}-seed{seed}"


def train_cell(config: AblationConfig, cell: Cell, seed: int) -> dict[str, Any]:
    """Train and judge; the result of one run.

    Raises:
        InputError: if it ends otherwise than trained or diverged.
    """
    folder = run_folder(config, cell, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    output = folder.with_name(f"{folder.name}.log")  # a momentum has a point
    started = time.monotonic()
    with output.open("w") as file:
        words = [sys.executable, *command(config, cell, seed)]
        code = subprocess.run(words, cwd=ROOT, stdout=file, stderr=file, check=False).returncode
    result = {
        "cell": cell.name,
        "mechanism": cell.mechanism,
        "length": cell.length,
        "momentum": cell.momentum,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
    }
    if code == INPUT_ERROR and "has diverged" in output.read_text():
        return result | {"diverged": True}
    if code:
        last = (output.read_text().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"the run of {cell.name} ended with code {code}: {last} (see {output})")
    last_values: dict[str, float] = {}
    for line in (folder / LOG_NAME).read_text().splitlines():
        last_values |= json.loads(line)
    if "knn_top1" not in last_values:
        reason = last_values.get("knn_error", "its log has no score")
        raise InputError(f"the run of {cell.name} was not judged: {reason} (see {output})")
    wanted = ("step", "loss", "pretext_accuracy", "knn_top1")
    return result | {"diverged": False} | {name: last_values[name] for name in wanted}


def judge_untrained(config: AblationConfig, cell: Cell, seed: int) -> float:
    """The kNN score of the encoder that a run started with."""
    folder = run_folder(config, cell, seed)
    result = folder.with_name(f"{folder.name}.untrained.json")
    words = [sys.executable, "eval/knn.py", str(folder), "--untrained", "--train", config.train]
    words += ["--test", config.test, "--json", str(result)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"the untrained encoder could not be judged: {done.stderr.strip()}")
    top1: float = json.loads(result.read_text())["top1"]
    return top1


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished runs; a last line that was cut off is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def require_same_settings(config: AblationConfig) -> None:
    """See that a folder holds runs with these settings, or none.

    Raises:
        InputError: naming the setting that differs.
    """
    path = config.folder / SETTINGS_NAME
    now = {name: value for name, value in to_plain(config).items() if name != "folder"}
    now = json.loads(json.dumps(now))
    if path.exists():
        before = json.loads(path.read_text())
        for name in now:
            # More seeds and other cells may be asked for: the finished ones stay true.
            if (
                name not in ("seeds", "lengths", "momenta", "threads")
                and before.get(name) != now[name]
            ):
                raise InputError(
                    f"{config.folder} holds runs with {name} {before.get(name)}, now it is "
                    f"{now[name]}: use the same, or another folder"
                )
    config.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=1) + "\n")


def unfinished(config: AblationConfig, done: list[dict[str, Any]]) -> Iterator[tuple[Cell, int]]:
    """The runs that are left; all cells once before any for the second time."""
    finished = {(result["cell"], result["seed"]) for result in done}
    for seed in range(config.seeds):
        for cell in cells_of(config):
            if (cell.name, seed) not in finished:
                yield cell, seed


def report(config: AblationConfig, results: Results, console: Console) -> None:
    """Print the tables and draw the figure."""
    for table in tables(results, config.momenta, PAPER_MOMENTUM, max(config.lengths)):
        console.print(table)
    draw_figure(results, config.folder / FIGURE_NAME, PAPER_MOMENTUM, max(config.lengths))
    console.print(
        f"each run: {config.folder / RESULTS_NAME}; figure: {config.folder / FIGURE_NAME}"
    )


def main() -> None:
    """Train what is missing, then print the tables."""
    config, console = parse_flags(AblationConfig, __doc__), Console()
    require_same_settings(config)
    path = config.folder / RESULTS_NAME
    results = read_results(path)
    path.write_text("".join(json.dumps(result) + "\n" for result in results))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    left = list(unfinished(config, results))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=len(results) + len(left), completed=len(results))
        for cell, seed in left:
            progress.update(bar, description=f"{cell.name}, seed {seed}")
            result = train_cell(config, cell, seed)
            if cell.mechanism == "end-to-end":
                result["untrained_top1"] = judge_untrained(config, cell, seed)
            results.append(result)
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            progress.advance(bar)
    report(config, results, console)


if __name__ == "__main__":
    run_program(main)
