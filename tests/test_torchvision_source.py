import numpy as np
import pytest
from torchvision import datasets

from pipeline.program import InputError
from pipeline.shard_format import read_manifest
from pipeline.sources import SourceConfig
from pipeline.torchvision_source import open_dataset, picture_of, torchvision_source


def test_pictures_in_files_keep_their_bytes(picture_folder, pack_source, samples_in):
    output = pack_source("torchvision:ImageFolder", reading=SourceConfig(root=picture_folder))
    expected = {path.read_bytes(): path.parent.name for path in picture_folder.rglob("*.jpg")}
    assert dict(samples_in(output).values()) == expected


def test_pictures_in_memory_are_stored_with_their_labels(tmp_path, pack_source, samples_in):
    # MNIST as it lies on the disk when it is unpacked: a header of big-endian numbers, then bytes.
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pictures = np.arange(5 * 28 * 28, dtype=np.uint32).reshape(5, 28, 28).astype(np.uint8)
    for part, count in (("train", 5), ("t10k", 3)):
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pictures[:count].tobytes())
        labels = np.arange(count, dtype=np.uint8)[::-1]
        header = np.array([0x801, count], ">i4").tobytes()
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    reading = SourceConfig(root=tmp_path)
    source = torchvision_source("torchvision:MNIST:train", reading)
    assert [entry.name for entry in source.entries] == [f"MNIST/train/{n}.png" for n in range(5)]
    output = pack_source("torchvision:MNIST:test", reading=reading)
    classes = read_manifest(output).classes
    assert len(classes) == 10 and classes[0] == "0 - zero"
    labels = {key: label for key, (_, label) in samples_in(output).items()}
    assert labels == {f"MNIST/test/{n}": name for n, name in enumerate(classes[2::-1])}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:CIFAR11", "torchvision has no data set 'CIFAR11'"),
        ("torchvision:os", "torchvision has no data set 'os'"),
        ("torchvision:CIFAR10:best", "CIFAR10 has no split 'best'"),
        ("torchvision:CIFAR10:train", "cannot be opened .*--root"),
    ],
)
def test_what_is_not_there_is_an_input_error(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        torchvision_source(name, SourceConfig(root=tmp_path))


def test_the_png_of_a_picture_is_without_loss(tmp_path):
    place = f"torchvision:FakeData:{tmp_path}"
    open_dataset.cache_clear()
    data, label = picture_of(place, 3)
    image, expected = datasets.FakeData()[3]
    from io import BytesIO

    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(BytesIO(data))), np.asarray(image))
    assert label == int(expected)
