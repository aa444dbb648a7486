"""The ready-made files for launchers: each says what its name says, and accelerate takes it."""

import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from model.stopping import RESTART_CODE

LAUNCH = Path(__file__).resolve().parents[1] / "docs" / "launch"


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("1-gpu.yaml", 1, 1), ("8-gpus.yaml", 1, 8), ("4x8-gpus.yaml", 4, 32)],
)
def test_accelerate_reads_the_files_as_what_they_are(name, machines, processes):
    config = load_config_from_file(str(LAUNCH / name))
    assert (config.num_machines, config.num_processes) == (machines, processes)


def test_the_slurm_script_is_a_shell_script_that_stops_and_requeues_itself():
    path = LAUNCH / "slurm.sh"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    text = path.read_text()
    assert "--signal=B:USR1@" in text and "scontrol requeue" in text


def test_the_kubernetes_job_goes_on_after_an_eviction_but_not_after_a_wrong_input():
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][:2] == ["accelerate", "launch"]
    assert "auto" in container["command"]
    failing = job["podFailurePolicy"]["rules"][1]
    assert failing["onExitCodes"]["values"] == [2]


def test_the_page_names_the_code_that_asks_for_a_restart():
    assert f"| {RESTART_CODE} | stopped by SIGTERM" in (LAUNCH / "README.md").read_text()
