"""The ready-made files for launchers: each says what its name says, and accelerate takes it."""

import itertools
import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from model.stopping import LOST_CODE, RESTART_CODE
from pipeline.program import InputError

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


def run_slurm_script(folder, code, seconds, restarts):
    """What the script of a job leaves whose processes exit with ``code`` after so long."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in SLURM.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    more = {"PATH": f"{programs}:{os.environ['PATH']}", "CODE": str(code), "SECONDS": str(seconds),
            "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
    words = ["demo", "--output", "a folder"]
    return subprocess.run(
        ["bash", LAUNCH / "slurm.sh", *words],
        cwd=folder,
        env={**os.environ, **IN_A_JOB, **more},
        check=False,
    ).returncode


SAVED = (RESTART_CODE, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)
LOST = (LOST_CODE, 128 + signal.SIGKILL, 1)


@pytest.mark.parametrize(
    ("code", "seconds", "restarts", "is_requeued"),
    [
        *((code, 5, 100, True) for code in SAVED),
        *((code, 5, 0, False) for code in (0, 2, 130)),
        *((code, 700, 0, False) for code in (0, 2, 130)),
        *((code, 5, 2, True) for code in LOST),
        *((code, 5, 3, False) for code in LOST),  # not for ever
        *((code, 700, 3, True) for code in LOST),
    ],
)
def test_a_slurm_job_requeues_itself_where_another_start_helps(
    tmp_path, code, seconds, restarts, is_requeued
):
    assert run_slurm_script(tmp_path, code, seconds, restarts) == code
    said = (tmp_path / "said").read_text()
    assert ("scontrol requeue 4711\n" in said) == is_requeued


def test_each_task_of_a_slurm_job_is_a_process_of_the_run(tmp_path):
    run_slurm_script(tmp_path, 0, 0, 0)
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


def in_kubernetes(name):
    """The job of a file, and the service where there is one."""
    documents = list(yaml.safe_load_all((LAUNCH / name).read_text()))
    return documents[-1], documents[0]


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kubernetes-4x8.yaml"])
def test_a_kubernetes_job_goes_on_after_an_eviction_but_not_after_a_wrong_input(name):
    job = in_kubernetes(name)[0]["spec"]
    rules = job["podFailurePolicy"]["rules"]
    codes = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes == {InputError.exit_code: "FailJob", RESTART_CODE: "Ignore"}
    assert rules[0]["action"] == "FailJob"  # the first that fits decides
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a policy for failures asks for it
    (container,) = pod["containers"]
    assert container["command"][:2] == ["python", "eval/launch.py"]
    assert "auto" in container["command"]
    shared = {mount["name"] for mount in container["volumeMounts"]}
    assert shared == {volume["name"] for volume in pod["volumes"]}


def test_the_pods_of_a_kubernetes_job_find_the_first_of_them():
    job, service = in_kubernetes("kubernetes-4x8.yaml")
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    command = pod["containers"][0]["command"]
    values = dict(itertools.pairwise(command))
    assert values["--master-addr"] == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert values["--node-rank"] == "$(JOB_COMPLETION_INDEX)"  # set where completions are Indexed
    assert spec["completionMode"] == "Indexed"
    assert int(values["--nnodes"]) == spec["completions"] == spec["parallelism"]


def test_the_page_names_the_code_that_asks_for_a_restart():
    assert f"| {RESTART_CODE} | stopped by SIGTERM" in (LAUNCH / "README.md").read_text()
