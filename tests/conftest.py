"""Pictures and shards that several test files share; ``draw_photo`` needs no download."""

import io
import os
import shutil
import struct
import tarfile
from pathlib import Path

# Arrays here are small: more threads only wait for each other, for minutes on a busy machine.
# Numpy's and torch's libraries read it when they are loaded.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from rich.console import Console

from pipeline.entry_list import Entry, EntryList, write_list
from pipeline.make_shards import pack
from pipeline.pack_config import PackConfig
from pipeline.picture_header import BadHeaderError, read_header
from pipeline.shard_format import FLAG_DROPPED, Sample, read_index, write_manifest, write_shard
from pipeline.shard_store import ShardStore

# A busy machine is no reason to fail: hypothesis would else stop examples above 0.2 s.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def photo(seed, width=96, height=72):
    """A picture with what a photograph has: smooth areas, sharp edges and noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    for _ in range(6):
        x, y = rng.integers(0, width), rng.integers(0, height)
        pixels[y : y + height // 4, x : x + width // 4] = rng.integers(0, 256, 3)
    pixels += rng.integers(-8, 9, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encoded(image, file_format="JPEG", **options):
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def header_size(picture):
    try:
        return read_header(picture)[1:3]
    except BadHeaderError:
        return 64, 48


def pack_pictures(folder, pictures, shard_sizes, classes=("ant", "bee", "cat")):
    """Write a finished set; ``pictures`` without a header are 64 x 48 in the index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, first = [], 0
    for number, size in enumerate(shard_sizes):
        samples = []
        for place in range(first, first + size):
            picture = pictures[place]
            width, height = header_size(picture)
            label = place % len(classes)
            samples.append(
                Sample(
                    key=f"{classes[label]}/picture{place:03d}",
                    picture=picture,
                    width=width,
                    height=height,
                    label=label,
                )
            )
        shards.append(write_shard(folder / f"shard-{number:06d}.tar", samples))
        first += size
    write_manifest(folder, shards, classes, {"program": "tests"})
    return folder


@pytest.fixture(scope="session")
def keys_of(tmp_path_factory):
    """``keys_of(names)`` gives the key that each name gets in a list of them all."""

    def keys(names):
        folder = tmp_path_factory.mktemp("list")
        write_list(folder, (Entry(name, "", 0) for name in names))
        entries = EntryList(folder, len(names), seed=0)
        found = {entry.name: key for key, entry in entries.read(0, len(names))}
        entries.close()
        return [found[name] for name in names]

    return keys


@pytest.fixture(scope="session")
def draw_photo():
    """``draw_photo(seed, width, height)`` gives a Pillow image."""
    return photo


@pytest.fixture(scope="session")
def encode():
    """``encode(image, file_format, **options)`` gives the bytes of a picture file."""
    return encoded


def resized_header(jpeg, width, height):
    """A JPEG whose frame header says that it has another size."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


@pytest.fixture(scope="session")
def with_size():
    """``with_size(jpeg, width, height)`` gives a JPEG whose header lies."""
    return resized_header


@pytest.fixture
def pack_source(tmp_path):
    """``pack_source(source, **settings)`` packs into a new folder and gives it."""

    def pack_it(source, **settings):
        output = tmp_path / f"packed{len(list(tmp_path.glob('packed*')))}"
        config = PackConfig(source=str(source), output=output, workers=1, **settings)
        pack(config, Console(quiet=True))
        return output

    return pack_it


@pytest.fixture(scope="session")
def samples_in():
    """``samples_in(folder)`` gives the picture and the name of the class of each key."""

    def read(folder):
        store = ShardStore(folder)
        classes = store.manifest.classes
        return {
            store.key(shard, index): (
                store.picture(shard, index).tobytes(),
                classes[record["label"]] if record["label"] >= 0 else None,
            )
            for shard in range(len(store.manifest.shards))
            for index, record in enumerate(store.records(shard))
            if not record["flags"] & FLAG_DROPPED
        }

    return read


@pytest.fixture(scope="session")
def pack_set():
    """``pack_set(folder, pictures, shard_sizes)`` writes a finished set and gives its folder."""
    return pack_pictures


@pytest.fixture
def picture_folder(tmp_path):
    """Twelve JPEGs in three folders, each a class."""
    for number in range(12):
        path = tmp_path / "pictures" / ("ant", "bee", "cat")[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number, 40 + 4 * number, 60).save(path, quality=90)
    return tmp_path / "pictures"


@pytest.fixture(scope="session")
def clean_pictures():
    """Forty JPEGs of many shapes, one of them grey."""
    shapes = [(64 + 7 * (n % 9), 48 + 11 * (n % 5)) for n in range(40)]
    shapes[5], shapes[6] = (300, 20), (16, 200)
    images = [photo(n, *shape) for n, shape in enumerate(shapes)]
    images[7] = images[7].convert("L")
    return [encoded(image, quality=90) for image in images]


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory, clean_pictures):
    """Three shards of 9, 20 and 11 pictures, for reading only."""
    return pack_pictures(tmp_path_factory.mktemp("clean") / "shards", clean_pictures, (9, 20, 11))


@pytest.fixture
def own_set(shard_set, tmp_path):
    """A copy of ``shard_set`` that a test may damage."""
    return Path(shutil.copytree(shard_set, tmp_path / "own"))


@pytest.fixture(scope="session")
def flip_bit():
    """``flip_bit(folder, shard, index)`` damages one picture of a set on the disk."""

    def flip(folder, shard, index):
        tar = folder / f"shard-{shard:06d}.tar"
        record = read_index(tar.with_suffix(".index"))[index]
        data = bytearray(tar.read_bytes())
        data[int(record["block"]) * 512 + int(record["size"]) // 2] ^= 1
        tar.write_bytes(data)

    return flip


@pytest.fixture(scope="session")
def s3_address():
    """Host and port of an S3 server on loopback."""
    from tests.s3_server import running_s3  # here, as moto takes a second to import

    with running_s3() as address:
        yield address


@pytest.fixture
def bucket(s3_address):
    """An empty bucket of the name ``bucket``, which the environment leads to."""
    from tests.s3_server import Bucket, environment_of

    found = Bucket(s3_address, "bucket")
    with environment_of(found.url):
        yield found
    found.client.close()


@pytest.fixture
def store_proxy(bucket):
    """The way to the bucket, which a test may disturb; see ``fault_proxy``."""
    from tests.fault_proxy import proxy_to
    from tests.s3_server import environment_of

    with proxy_to(*bucket.address) as running, environment_of(running.url):
        yield running


@pytest.fixture(scope="session")
def test_data():
    """The folder of real picture packs."""
    folder = Path(os.environ.get("MOCO_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real pictures: {folder} is absent; set MOCO_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def real_pictures(test_data):
    """The bytes of 25 ImageNet photographs."""
    with tarfile.open(test_data / "imagenet_samples.tar") as tar:
        members = [member for member in tar if member.name.endswith(".JPEG")]
        return [tar.extractfile(member).read() for member in members[::10]]
