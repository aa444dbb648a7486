"""The rules of the layout that no linter checks."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "pipeline": {"pipeline"},
    "model": {"model"},
    "eval": {"eval", "model", "pipeline"},
}
EVERYWHERE = {*MAY_IMPORT, "train", "tests", "shards"}
DRAWERS = {"utils", "util", "helpers", "common", "misc"}
THIRD_PARTY = {"torch", "timm", "webdataset", "accelerate", "rich", "tyro", "PIL", "nvidia"}


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def is_program(path):
    return "run_program(main" in path.read_text() and path.name != "program.py"


PROGRAMS = [ROOT / "train.py", *(p for k in MAY_IMPORT for p in modules(k) if is_program(p))]


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for k in MAY_IMPORT for p in modules(k)], ids=name_of)
def test_imports_point_downwards(path):
    package = path.relative_to(ROOT).parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for top in {name.split(".")[0] for name in names} & EVERYWHERE:
            assert top in MAY_IMPORT[package], f"{path.name} must not import {top}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_module_hides_another_or_is_a_drawer_for_everything(package):
    names = {path.stem for path in modules(package)} - {"__init__"}
    assert not names & (sys.stdlib_module_names | THIRD_PARTY | DRAWERS)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_holds_a_docstring_and_nothing_else(package):
    body = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]


def test_folders_without_code_of_their_own_are_no_packages():
    assert not list((ROOT / "shards").rglob("*.py"))
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("path", [p for p in PROGRAMS if p.parent != ROOT], ids=name_of)
def test_a_program_in_a_package_imports_from_the_repository_root(path):
    assert "if not __package__:" in path.read_text()
    assert "sys.path[0] = str(Path(__file__).resolve().parents[1])" in path.read_text()


SOON_HELPED = {"train.py", "make_shards.py"}  # the others import torch too, for seconds each


@pytest.mark.parametrize(
    "path",
    [p if p.name in SOON_HELPED else pytest.param(p, marks=pytest.mark.slow) for p in PROGRAMS],
    ids=name_of,
)
def test_a_program_explains_itself_from_any_folder(path, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, path, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    summary = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    assert " ".join(summary.split()) in " ".join(done.stdout.replace("│", " ").split())
    assert "--" in done.stdout
    assert not list(tmp_path.iterdir())


def test_programs_that_need_no_tensors_start_without_torch():
    programs = "pipeline.make_shards, pipeline.check_shards, pipeline.show_order"
    code = f"import sys, {programs}; assert not {{'torch', 'numba', 'nvidia'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def settings_of(path):
    """Each setting of a file's frozen dataclasses, and whether a help text stands below it."""
    for node in ast.walk(ast.parse(path.read_text())):
        is_settings = isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Protocol"))
        if not is_settings or "Protocol" in {getattr(base, "id", "") for base in node.bases}:
            continue
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "Suppress" not in ast.unparse(field.annotation):
                has_help = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                is_nested = ast.unparse(field.annotation).endswith(("Config", "Protocol"))
                yield f"{node.name}.{field.target.id}", has_help or is_nested


def test_every_setting_has_help():
    files = [ROOT / "train.py", *(path for package in MAY_IMPORT for path in modules(package))]
    settings = dict(item for path in files for item in settings_of(path))
    assert len(settings) > 50
    assert [name for name, has_help in settings.items() if not has_help] == []
