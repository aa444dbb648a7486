"""What a run says it was made with."""

import json
import re

import torch

from eval.environment import environment, git_state, processor, version


def test_an_environment_is_json_and_names_versions_code_and_machine():
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert found["cores"] >= 1 and found["memory_gib"] > 0.1
    assert found["gpus"] == [] or found["cuda"]
    assert found["processor"] == processor() != ""


def test_the_code_is_named_by_its_commit():
    state = git_state()
    assert state is None or re.fullmatch("[0-9a-f]{40}", state["commit"])


def test_outside_a_working_copy_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.environment.ROOT", tmp_path)
    assert git_state() is None


def test_a_package_that_is_absent_has_no_version():
    assert version("no-such-package-as-this") is None
