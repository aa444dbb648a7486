"""The ready-made files for launchers: each says what its name says, and accelerate takes it."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from model.stopping import LOST_CODE, RESTART_CODE

LAUNCH = Path(__file__).resolve().parents[1] / "docs" / "launch"


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("1-gpu.yaml", 1, 1), ("8-gpus.yaml", 1, 8), ("4x8-gpus.yaml", 4, 32)],
)
def test_accelerate_reads_the_files_as_what_they_are(name, machines, processes):
    config = load_config_from_file(str(LAUNCH / name))
    assert (config.num_machines, config.num_processes) == (machines, processes)


IN_A_JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_CPUS_PER_TASK": "6",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
# What Slurm's programs answer to the script; `srun` runs one of the tasks.
SLURM = {
    "scontrol": 'echo "scontrol $*" >> said; [ "$1" != show ] || printf "node7\\nnode8\\n"',
    "srun": 'while [[ $1 = --* ]]; do shift; done; "$@"',
    "python": 'env > environment; printf "%s\\n" "$@" > words; exit $CODE',
}


def run_slurm_script(folder, code, seconds):
    """What the script of a job leaves whose processes exit with ``code`` after so long."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in SLURM.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    more = {"PATH": f"{programs}:{os.environ['PATH']}", "CODE": str(code), "SECONDS": str(seconds)}
    words = ["demo", "--output", "a folder"]
    return subprocess.run(
        ["bash", LAUNCH / "slurm.sh", *words],
        cwd=folder,
        env={**os.environ, **IN_A_JOB, **more},
        check=False,
    ).returncode


@pytest.mark.parametrize(
    ("code", "seconds", "is_requeued"),
    [
        *((code, 5, code in (RESTART_CODE, 128 + signal.SIGUSR1, 128 + signal.SIGTERM))
          for code in (0, 2, 130, RESTART_CODE, LOST_CODE, 138, 143, 137, 1)),
        *((code, 700, code in (LOST_CODE, 137)) for code in (0, 2, 130, LOST_CODE, 137)),
    ],
)  # fmt: skip
def test_a_slurm_job_requeues_itself_where_another_start_helps(
    tmp_path, code, seconds, is_requeued
):
    assert run_slurm_script(tmp_path, code, seconds) == code
    said = (tmp_path / "said").read_text()
    assert ("scontrol requeue 4711\n" in said) == is_requeued


def test_each_task_of_a_slurm_job_is_a_process_of_the_run(tmp_path):
    run_slurm_script(tmp_path, 0, 0)
    assert (tmp_path / "words").read_text() == "train.py\ndemo\n--output\na folder\n"
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines()
    )
    expected = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "24711",
        "SRUN_CPUS_PER_TASK": "6",
    }
    assert environment.items() >= expected.items()


def test_the_kubernetes_job_goes_on_after_an_eviction_but_not_after_a_wrong_input():
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][:2] == ["accelerate", "launch"]
    assert "auto" in container["command"]
    failing = job["podFailurePolicy"]["rules"][1]
    assert failing["onExitCodes"]["values"] == [2]


def test_the_page_names_the_code_that_asks_for_a_restart():
    assert f"| {RESTART_CODE} | stopped by SIGTERM" in (LAUNCH / "README.md").read_text()
