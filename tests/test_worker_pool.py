import subprocess
import sys
from pathlib import Path

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
