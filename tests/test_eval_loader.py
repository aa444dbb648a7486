import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from pipeline import eval_loader
from pipeline.eval_loader import EvalLoader, EvalView
from pipeline.program import InputError
from pipeline.shard_format import Sample, write_manifest, write_shard
from pipeline.shard_store import ShardStore

CPU = torch.device("cpu")
LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
# Mean difference from torchvision in levels of 0-255 for the worst of forty drawn pictures, as
# measured with DALI 2.4.0; the test fails above 1.3 times these. Half a pixel of shift gives 6.
MEASURED = {"bilinear": 0.27, "bicubic": 0.23}


def view_of(interpolation="bilinear", resize_px=40, crop_px=32, **normalisation):
    return EvalView(
        resize_px=resize_px,
        crop_px=crop_px,
        interpolation=interpolation,
        **(normalisation or LEVELS),
    )


def loader_of(folder, view=None, batch=16):
    return EvalLoader(ShardStore(folder), view or view_of(), batch=batch, device=CPU, threads=1)


@pytest.fixture(params=["dali", "torchvision"], autouse=True)
def engine(request, monkeypatch):
    """Makes the views by DALI, or as on a machine without it."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
    else:
        monkeypatch.setattr(eval_loader, "dali_views", None)
    return request.param


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_are_torchvisions_resize_and_centre_crop(
    shard_set, clean_pictures, engine, interpolation
):
    chain = T.Compose(
        [T.Resize(40, T.InterpolationMode(interpolation)), T.CenterCrop(32), T.PILToTensor()]
    )
    expected = torch.stack(
        [chain(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in clean_pictures]
    )
    views = torch.cat([batch for batch, _ in loader_of(shard_set, view_of(interpolation))])
    difference = (views - expected).abs().mean(dim=(1, 2, 3))
    assert difference.max() < (1.3 * MEASURED[interpolation] if engine == "dali" else 1e-3)


def test_every_picture_comes_once_in_the_order_of_the_shards_with_its_label(shard_set):
    batches = list(loader_of(shard_set))
    assert [len(views) for views, _ in batches] == [len(labels) for _, labels in batches]
    labels = np.concatenate([labels for _, labels in batches])
    assert labels.dtype == np.int64 and labels.tolist() == [n % 3 for n in range(40)]
    (whole,) = [views for views, _ in loader_of(shard_set, batch=40)]
    assert torch.equal(torch.cat([views for views, _ in batches]), whole)


@pytest.mark.parametrize(
    ("batch", "lengths"), [(16, [16, 16, 8]), (40, [40]), (64, [40]), (39, [39, 1]), (20, [20, 20])]
)
def test_the_last_batch_has_what_is_left(shard_set, batch, lengths):
    assert [len(views) for views, _ in loader_of(shard_set, batch=batch)] == lengths


def test_views_are_normalised_float32(shard_set):
    normalisation = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    ((views, _),) = loader_of(shard_set, view_of(**normalisation), batch=40)
    ((levels, _),) = loader_of(shard_set, batch=40)
    mean, std = (torch.tensor(normalisation[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert views.dtype == torch.float32 and views.shape == (40, 3, 32, 32)
    assert torch.allclose(views, (levels / 255 - mean) / std, atol=1e-5)


def test_batches_keep_their_values_while_later_ones_are_made(shard_set):
    batches = iter(loader_of(shard_set, batch=5))
    first, _ = next(batches)
    kept = first.clone()
    assert len(list(batches)) == 7 and torch.equal(first, kept)


def test_a_loader_may_be_walked_twice(shard_set):
    loader = loader_of(shard_set)
    for (one, _), (other, _) in zip(loader, loader, strict=True):
        assert torch.equal(one, other)


def test_damaged_bytes_are_left_out_and_counted(own_set, flip_bit):
    flip_bit(own_set, 0, 1)
    flip_bit(own_set, 2, 10)
    loader = loader_of(own_set)
    labels = np.concatenate([labels for _, labels in loader])
    assert labels.tolist() == [n % 3 for n in range(40) if n not in (1, 39)]
    assert loader.skipped == 2


def test_walking_again_does_not_count_the_same_damage_twice(own_set, flip_bit):
    flip_bit(own_set, 0, 1)
    loader = loader_of(own_set)
    for _ in range(2):
        assert sum(len(views) for views, _ in loader) == 39
    assert loader.skipped == 1


def test_a_header_that_lies_or_is_none_is_left_out_and_counted(
    pack_set, clean_pictures, with_size, tmp_path
):
    bomb = with_size(clean_pictures[3], 60_000, 60_000)
    pictures = [b"not a picture", *clean_pictures[1:3], bomb, *clean_pictures[4:9]]
    loader = loader_of(pack_set(tmp_path / "lies", pictures, (9,)))
    assert sum(len(views) for views, _ in loader) == 7 and loader.skipped == 2


@pytest.mark.parametrize("batch", [3, 9, 1])
def test_pictures_that_cannot_be_decoded_are_left_out_and_counted(
    pack_set, clean_pictures, tmp_path, batch
):
    cut = {3: clean_pictures[3][:900], 5: clean_pictures[5][:900]}
    pictures = [cut.get(number, picture) for number, picture in enumerate(clean_pictures[:9])]
    loader = loader_of(pack_set(tmp_path / "garbage", pictures, (9,)), batch=batch)
    found = list(loader)
    assert np.concatenate([labels for _, labels in found]).tolist() == [
        n % 3 for n in range(9) if n not in cut
    ]
    assert loader.skipped == 2
    sound = pack_set(tmp_path / "sound", clean_pictures[:9], (9,))
    ((whole, _),) = loader_of(sound, batch=9)
    rows = [n for n in range(9) if n not in cut]
    assert torch.equal(torch.cat([views for views, _ in found]), whole[rows])


def test_a_crop_larger_than_the_resized_picture_is_an_input_error():
    with pytest.raises(InputError, match=r"crop of 41 px does not fit .* side is 40 px"):
        view_of(crop_px=41)


def test_pictures_without_labels_have_label_minus_one(tmp_path, clean_pictures):
    sample = Sample(key="a", picture=clean_pictures[0], width=64, height=48)
    write_manifest(tmp_path, [write_shard(tmp_path / "x.tar", [sample])], [], {})
    ((_, labels),) = loader_of(tmp_path)
    assert labels.tolist() == [-1]
