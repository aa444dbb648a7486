import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pipeline.program import InputError
from pipeline.shard_format import INDEX_HEADER, INDEX_RECORD, index_bytes, read_index, read_manifest
from pipeline.sources import SourceConfig

WNIDS = ("n02119789", "n01440764", "n03028079")


def tar_bytes(members):
    """A tar as GNU tar writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def metadata_in(folder):
    with tarfile.open(folder / "shard-000000.tar") as tar:
        return {
            m.name.removesuffix(".json"): json.loads(tar.extractfile(m).read())
            for m in tar
            if m.name.endswith(".json")
        }


@pytest.fixture
def photos(draw_photo, encode):
    return [encode(draw_photo(number)) for number in range(9)]


@pytest.fixture
def ilsvrc(tmp_path, photos):
    """ImageNet in little, as its archives are: training set, validation set, devkit."""
    inner = []
    for number, wnid in enumerate(WNIDS):
        names = [f"{wnid}_{n}.JPEG" for n in (7, 12, 3)]
        inner.append((f"{wnid}.tar", tar_bytes(zip(names, photos[3 * number :], strict=False))))
    inner = [(name, data) for name, data in inner]
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in (1, 2, 3)]
    val = list(zip(names, photos, strict=False))
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(reversed(val)))
    # The devkit's own numbers: 1 to 3 are WNIDS in that order, which is not alphabetical; its
    # table goes on with synsets that are no leaves.
    synsets = np.array(
        [(n + 1, wnid, 0) for n, wnid in enumerate(WNIDS)] + [(4, "n00001740", 2)],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")],
    )
    matrix = io.BytesIO()
    savemat(matrix, {"synsets": synsets})
    devkit = [
        ("ILSVRC2012_devkit_t12/data/meta.mat", matrix.getvalue()),
        ("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"3\n1\n2\n"),
    ]
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, data in devkit:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return tmp_path


def test_the_training_archive_of_imagenet_packs_to_its_classes(
    ilsvrc, pack_source, samples_in, photos
):
    output = pack_source(ilsvrc / "ILSVRC2012_img_train.tar")
    assert read_manifest(output).classes == tuple(sorted(WNIDS))
    expected = {}
    for number, wnid in enumerate(WNIDS):
        for n, photo in zip((7, 12, 3), photos[3 * number :], strict=False):
            expected[f"{wnid}/{wnid}_{n}"] = (photo, wnid)
    assert samples_in(output) == expected


VALIDATION = dict(zip((1, 2, 3), ("n03028079", "n02119789", "n01440764"), strict=True))


def test_the_validation_archive_of_imagenet_takes_its_labels_from_the_devkit(
    ilsvrc, pack_source, samples_in, photos
):
    reading = SourceConfig(labels=ilsvrc / "ILSVRC2012_devkit_t12.tar.gz")
    output = pack_source(ilsvrc / "ILSVRC2012_img_val.tar", reading=reading)
    assert read_manifest(output).classes == tuple(sorted(WNIDS))
    prefix = "ILSVRC2012_img_val/ILSVRC2012_val_"
    assert samples_in(output) == {
        f"{prefix}{n:08d}": (photos[n - 1], wnid) for n, wnid in VALIDATION.items()
    }


@pytest.mark.parametrize("form", ["a synset a line", "a name and a synset"])
def test_labels_can_be_text(ilsvrc, pack_source, samples_in, form):
    named = form != "a synset a line"
    lines = [f"ILSVRC2012_val_{n:08d}.JPEG {w}" if named else w for n, w in VALIDATION.items()]
    (ilsvrc / "labels.txt").write_text("\n".join(lines) + "\n")
    reading = SourceConfig(labels=ilsvrc / "labels.txt")
    output = pack_source(ilsvrc / "ILSVRC2012_img_val.tar", reading=reading)
    found = {int(key[-8:]): label for key, (_, label) in samples_in(output).items()}
    assert found == VALIDATION


def test_too_few_labels_are_an_input_error(ilsvrc, pack_source):
    (ilsvrc / "labels.txt").write_text("n01440764\n")
    reading = SourceConfig(labels=ilsvrc / "labels.txt")
    with pytest.raises(InputError, match="no number from 1 to 1"):
        pack_source(ilsvrc / "ILSVRC2012_img_val.tar", reading=reading)


def test_a_shard_set_is_packed_again_with_labels_names_and_metadata(
    pack_source, samples_in, tmp_path, photos
):
    for number, photo in enumerate(photos):
        folder = tmp_path / "in" / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(photo)
        (folder / f"{number}.json").write_text(json.dumps({"n": number}))
    first = pack_source(tmp_path / "in", shard_samples=4)
    again = pack_source(first, seed=5)
    assert samples_in(again) == samples_in(first)
    assert list(samples_in(again)) != list(samples_in(first))
    assert len(read_manifest(first).shards) == 3 and len(read_manifest(again).shards) == 1
    assert metadata_in(again) == {f"{('ant', 'bee')[n % 2]}/{n}": {"n": n} for n in range(9)}


def test_what_was_dropped_from_a_set_is_not_packed_again(own_set, pack_source, samples_in):
    path = own_set / "shard-000001.index"
    records = read_index(path).copy()
    records["flags"][3] = 1
    path.write_bytes(index_bytes(records))
    assert INDEX_HEADER.size + 20 * INDEX_RECORD.itemsize == path.stat().st_size
    again = samples_in(pack_source(own_set))
    assert len(again) == 39 and again == samples_in(own_set)


def test_webdataset_tars_of_others_keep_labels_and_metadata(
    tmp_path, pack_source, samples_in, photos
):
    (tmp_path / "wds").mkdir()
    for shard in range(2):
        members = []
        for n in range(3):  # the same keys in both shards
            members += [(f"{n:06d}.jpg", photos[3 * shard + n]), (f"{n:06d}.cls", b"%d" % n)]
            members += [(f"{n:06d}.seg.png", b"mask"), (f"{n:06d}.json", b'{"shard": %d}' % shard)]
        (tmp_path / "wds" / f"data-{shard}.tar").write_bytes(tar_bytes(members))
    output = pack_source(tmp_path / "wds")
    assert samples_in(output) == {
        f"data-{shard}/{n:06d}": (photos[3 * shard + n], str(n))
        for shard in range(2)
        for n in range(3)
    }
    assert metadata_in(output)["data-1/000002"] == {"shard": 1}
    rows = [json.loads(line) for line in (output / "ignored.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rows} == {"not the picture of its sample"} and len(rows) == 6


def test_a_tar_that_is_cut_off_gives_what_it_holds_and_says_so(
    tmp_path, pack_source, samples_in, photos
):
    data = tar_bytes([(f"{n}.jpg", photos[n]) for n in range(3)])
    (tmp_path / "cut.tar").write_bytes(data[: 1536 + 2 * len(photos[0]) + 200])
    output = pack_source(tmp_path / "cut.tar")
    assert 1 <= len(samples_in(output)) < 3
    assert "cut off" in (output / "ignored.jsonl").read_text()


def test_what_is_no_tar_is_an_input_error(tmp_path, pack_source):
    (tmp_path / "no.tar").write_bytes(b"<html>" * 500)
    with pytest.raises(InputError, match="is not a tar"):
        pack_source(tmp_path / "no.tar")
    assert not (tmp_path / "packed0").exists()


def test_a_grey_photo_in_a_tar_keeps_its_bytes(tmp_path, pack_source, samples_in, encode):
    grey = encode(Image.new("L", (30, 20), 90))
    (tmp_path / "one.tar").write_bytes(tar_bytes([("./a.b/grey.jpg", grey)]))
    ((data, label),) = samples_in(pack_source(tmp_path / "one.tar")).values()
    assert (data, label) == (grey, None)
