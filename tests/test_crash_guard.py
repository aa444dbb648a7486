import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.shard_format import read_manifest

ROOT = Path(__file__).resolve().parents[1]
# What a defect in a decoder looks like from outside, on pictures that ask for it.
DEFECTS = """
import os, signal, time
import simplejpeg
decode = simplejpeg.decode_jpeg
def broken(data, *arguments, **more):
    while b"LATER" in data and not os.path.exists("hangs"):
        time.sleep(0.01)
    if b"CRASH" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"HANG" in data:
        open("hangs", "w").close()
        time.sleep(600)
    if b"KILL" in data and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(data, *arguments, **more)
simplejpeg.decode_jpeg = broken
"""


@pytest.fixture
def pack_with_defects(tmp_path, draw_photo, encode):
    """``pack(defect, ...)`` packs 40 pictures, of which one has a defect's name in its comment."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEFECTS)
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(encode(draw_photo(number)))

    def pack(defect, *flags, **others):
        for number, comment in {"17": defect, **others}.items():
            data = encode(draw_photo(17), comment=comment.encode())
            (tmp_path / "in" / f"{number.removeprefix('picture_')}.jpg").write_bytes(data)
        program = [sys.executable, ROOT / "pipeline" / "make_shards.py", "in", "out"]
        words = [*program, "--shard-samples", "8", "--workers", "2", *flags]
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / "out"

    return pack


def refused_in(folder):
    path = folder / "refused.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["file"]: row["reason"] for row in rows}


def test_a_picture_that_crashes_its_decoder_is_refused_and_the_others_are_packed(pack_with_defects):
    output = pack_with_defects("CRASH")
    assert refused_in(output) == {"17.jpg": "crashed its decoder"}
    assert read_manifest(output).samples == 39 and not (output / ".packing").exists()


def test_a_picture_that_takes_too_long_is_refused(pack_with_defects):
    started = time.monotonic()
    output = pack_with_defects("HANG", "--max-seconds", "2")
    assert refused_in(output) == {"17.jpg": "took too long: more than 2 s"}
    assert read_manifest(output).samples == 39 and time.monotonic() - started < 60


def test_a_picture_that_hangs_while_another_crashes_is_refused_after_its_time(pack_with_defects):
    # The crash ends the pool: what hangs in another worker is then looked at alone, and hangs.
    started = time.monotonic()
    output = pack_with_defects("CRASH LATER", "--max-seconds", "3", picture_18="HANG")
    assert refused_in(output) == {
        "17.jpg": "crashed its decoder",
        "18.jpg": "took too long: more than 3 s",
    }
    assert read_manifest(output).samples == 38 and time.monotonic() - started < 60


def test_a_worker_that_is_killed_from_outside_costs_no_picture(pack_with_defects):
    # As the system does it when the memory is used up: the picture is fine when it is alone.
    output = pack_with_defects("KILL")
    assert refused_in(output) == {} and read_manifest(output).samples == 40
