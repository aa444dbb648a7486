"""The learning rate of a run follows its batch, once, and the start says so."""

import dataclasses
import json
from pathlib import Path

import pytest

from eval.learning_rate import about_lr
from eval.recipes import RECIPES
from eval.run_arguments import parse_arguments
from eval.run_folder import Asked, refuse_other_run
from model.schedule import lr_at
from pipeline.settings import to_plain


def rate(*words):
    return parse_arguments([*words], "").run.optimiser.lr


@pytest.mark.parametrize("recipe", RECIPES)
def test_at_the_published_batch_a_recipe_has_the_published_rate_at_every_step(recipe):
    published, config = RECIPES[recipe], parse_arguments([recipe], "").run
    for step in (0, 1, 500, 999):
        now, before = (lr_at(c.optimiser, step, 1000, 10, c.batch) for c in (config, published))
        assert now == pytest.approx(before, rel=1e-15)
    assert config == dataclasses.replace(published, optimiser=config.optimiser)


@pytest.mark.parametrize(
    ("words", "lr", "said"),
    [
        (["moco-v2"], 0.03, []),
        (["moco-v2", "--batch", "64"], 0.0075, ["learning rate 0.0075: 0.03 x 64/256"]),
        (["moco-v1", "--batch=1024"], 0.12, ["learning rate 0.12: 0.03 x 1024/256"]),
        (["cifar10", "--batch", "256"], 0.03, ["learning rate 0.03: 0.06 x 256/512"]),
        (["cifar10", "--batch", "256", "--optimiser.lr", "0.06"], 0.06,
         ["learning rate 0.06; by the linear rule cifar10 has 0.03, 0.06 x 256/512"]),
        (["cifar10", "--batch", "256", "--optimiser.lr=0.06"], 0.06, ["learning rate 0.06; by"]),
        (["cifar10", "--batch", "256", "--optimiser.lr", "0.03"], 0.03, ["learning rate 0.03: "]),
        (["moco-v2", "--optimiser.lr", "0.1"], 0.1, ["learning rate 0.1; by the linear rule"]),
        (["moco-v3-300"], 4.8, ["learning rate 4.8: 0.3 x 4096/256"]),
        (["moco-v3-vit-s", "--batch", "1024"], 6e-4, ["learning rate 0.0006: 0.00015 x 1024/256"]),
        (["moco-v3-300", "--optimiser.lr", "0.45", "--optimiser.lr-batch", "256"], 7.2,
         ["learning rate 7.2; by the linear rule moco-v3-300 has 4.8, 0.3 x 4096/256"]),
        (["moco-v2", "--batch", "64", "--optimiser.lr_batch", "128"], 0.015,
         ["learning rate 0.015; by the linear rule moco-v2 has 0.0075, 0.03 x 64/256"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)  # fmt: skip
def test_the_rate_follows_the_batch_unless_it_is_given(words, lr, said):
    config = parse_arguments(words, "").run
    assert config.optimiser.lr == pytest.approx(lr, rel=1e-12)
    lines = list(about_lr(config))
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


def settings_file(folder, config):
    path = folder / "config.json"
    path.write_text(json.dumps(to_plain(config)))
    return str(path)


def test_what_a_run_wrote_is_its_rate_and_is_not_scaled_again(tmp_path):
    config = parse_arguments(["moco-v3-300", "--batch", "96"], "").run
    file = settings_file(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["optimiser"]["lr"] == 0.3 * 96 / 256
    assert parse_arguments(["--config", file], "").run == config
    assert parse_arguments(["moco-v3-300", "--config", file], "").run == config
    assert rate("--config", file, "--batch", "192") == pytest.approx(0.3 * 192 / 256)


@pytest.mark.parametrize(
    ("content", "lr"),
    [
        ({"batch": 64}, 0.0075),
        ({"batch": 64, "optimiser": {"momentum": 0.8}}, 0.0075),
        ({"batch": 64, "optimiser": {"lr": 0.02}}, 0.02),
        ({"optimiser": {"lr": 0.02}}, 0.02),
        ({"batch": 64, "optimiser": {"lr": 0.02, "lr_batch": 128}}, 0.01),
    ],
    ids=str,
)
def test_a_file_with_another_batch_or_rate_counts_as_flags_do(content, lr, tmp_path):
    (tmp_path / "some.json").write_text(json.dumps(content))
    assert rate("moco-v2", "--config", str(tmp_path / "some.json")) == pytest.approx(lr)


def test_a_checkpoint_of_an_older_version_that_scaled_at_each_step_goes_on():
    config = parse_arguments(["moco-v3-300"], "").run
    before = dataclasses.replace(config, optimiser=RECIPES["moco-v3-300"].optimiser)
    data = {"manifest_sha256": "00", "samples": 8192}
    state = {"step": 1, "data": data, "config": to_plain(before)}
    refuse_other_run(Asked(config, Path("run"), "00"), state, "step-1")
