import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.worker_pool import run_jobs

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
print("program read", flush=True)
sys.path.insert(0, {root!r})
from os.path import basename
from pipeline.worker_pool import run_jobs
if __name__ == "__main__":
    results = {{}}
    run_jobs(basename, ["a/b", "c/d", "e/f"], 2, results.__setitem__, lambda done: None)
    print(sorted(results.items()), sys.modules["__main__"].basename is basename)
"""


def test_workers_import_what_their_job_needs_and_not_the_program(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["program read", "[(0, 'b'), (1, 'd'), (2, 'f')] True"]


@pytest.mark.parametrize("colour", ["red", "blue"])
def test_workers_see_the_environment_of_the_program_as_it_is_now(monkeypatch, colour):
    monkeypatch.setenv("COLOUR", colour)  # the server that makes workers is older
    before, seen = os.environ.copy(), {}
    run_jobs(os.getenv, ["COLOUR", "PYTHONPATH"], 1, seen.__setitem__, print)
    assert seen == {0: colour, 1: before.get("PYTHONPATH")} and os.environ == before


def test_without_a_place_for_the_servers_socket_workers_start_one_by_one(tmp_path):
    folder = tmp_path / ("x" * 100)  # a socket's path has at most 108 characters
    folder.mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[1] == "[(0, 'b'), (1, 'd'), (2, 'f')] True", done.stderr


def test_after_a_job_that_fails_its_worker_begins_no_other(tmp_path):
    folders = [str(tmp_path / name) for name in ("0", "0", *map(str, range(1, 40)))]
    finished = {}
    with pytest.raises(FileExistsError):
        run_jobs(os.mkdir, folders, 1, finished.__setitem__, lambda _: None)
    assert finished == {0: None} and [path.name for path in tmp_path.iterdir()] == ["0"]
