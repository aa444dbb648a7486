import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data_config import DataConfig
from pipeline.loader import PairLoader
from pipeline.program import InputError
from pipeline.show_views import ShowConfig, as_pictures, collect, drawn_values
from pipeline.torch_views import decode
from pipeline.view_recipe import PAIRS, draw_view
from tests.warm_python import warm_python

PROGRAM = Path(__file__).resolve().parents[1] / "pipeline" / "show_views.py"


def run_program(*arguments, cwd):
    command = [*warm_python(), str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def config_of(shard_set, **options):
    return ShowConfig(shards=shard_set, output=Path("x.png"), image_px=32, **options)


def test_the_command_writes_both_pictures_from_another_folder(shard_set, tmp_path):
    done = run_program(shard_set, "sheet.png", "--pictures", 2, "--image-px", 32, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("sheet.png", "sheet-drawn.png"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and min(image.size) > 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet-drawn.png", "sheet.png"]


def test_a_missing_set_is_an_input_error():
    with pytest.raises(InputError, match="nowhere is not a folder of shards"):
        collect(config_of(Path("nowhere")))


def test_the_sheet_shows_the_views_that_training_sees(shard_set):
    originals, columns, _ = collect(config_of(shard_set, pictures=8, repeats=2))
    data = DataConfig(shards=shard_set, image_px=32, lanes=1)
    with PairLoader(data, global_batch=8, seed=0, device=torch.device("cpu")) as loader:
        batch, planned = next(loader), loader.plan(0)
    assert len(columns) == 4 and len(originals) == 8
    assert (np.array(columns[0]) == as_pictures(batch.query_N3HW, data)).all()
    assert (np.array(columns[1]) == as_pictures(batch.key_N3HW, data)).all()
    assert (np.array(columns[2]) != np.array(columns[0])).any()  # the next epoch
    assert [one.tobytes() for one in originals] == [decode(p).tobytes() for p in planned.pictures]


def test_views_are_shown_in_the_colours_that_they_had():
    data = DataConfig()
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    mean, std = torch.tensor([data.mean, data.std]).view(2, 1, 3, 1, 1)
    shown = as_pictures((levels - mean) / std, data)
    assert shown.shape == (1, 16, 16, 3) and (shown[0, ..., 0].ravel() == np.arange(256)).all()


def test_histograms_show_the_share_of_samples_that_drew_each_operation():
    sizes = np.full((4000, 2), 100)
    view = draw_view(PAIRS["moco-v3"][1], sizes, (0, 0, 1), np.arange(4000))
    shares = drawn_values(view, sizes)["share of samples"]
    expected = {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.1, "solarise": 0.2}
    assert shares == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("wrong", [{"pictures": 0}, {"repeats": 0}])
def test_a_sheet_of_nothing_is_an_input_error(shard_set, wrong):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))} 0: give a number of at least 1"):
        config_of(shard_set, **wrong)


def test_a_sheet_is_a_png(shard_set):
    with pytest.raises(InputError, match=r"x\.jpg: give a name that ends in \.png"):
        ShowConfig(shards=shard_set, output=Path("x.jpg"))
