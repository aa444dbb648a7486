"""Two runs in one folder."""

import subprocess
from pathlib import Path

import pytest

from eval.run_lock import hold
from model.stopping import RESTART_CODE
from pipeline.program import InputError
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
HOLDER = (
    "import sys; from pathlib import Path; from eval.run_lock import hold\n"
    "hold(Path(sys.argv[1]), is_restart=False); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder until it is killed."""
    command = [*warm_python(), "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_folder_is_one_runs_until_that_ends_however_it_does(tmp_path, holder):
    with pytest.raises(InputError, match=f"another run is going on in {tmp_path}: wait") as refused:
        hold(tmp_path, is_restart=False)
    assert refused.value.exit_code == 2
    with pytest.raises(InputError) as refused:
        hold(tmp_path, is_restart=True)
    assert refused.value.exit_code == RESTART_CODE
    holder.stdin.close()
    holder.wait()
    hold(tmp_path, is_restart=False)


def test_a_run_may_go_on_in_the_process_that_holds_its_folder(tmp_path):
    hold(tmp_path, is_restart=False)
    hold(tmp_path, is_restart=False)
