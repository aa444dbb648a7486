import hashlib
import itertools
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.program import InputError
from pipeline.shard_format import (
    INDEX_HEADER,
    INDEX_RECORD,
    Sample,
    atomic_file,
    read_index,
    read_manifest,
    tar_header,
    write_manifest,
    write_shard,
)

SAMPLES = [
    Sample(key="ant/one", picture=b"\xff\xd8" + b"a" * 700, width=30, height=20, label=0),
    Sample(key="bee/two", picture=b"\xff\xd8" + b"b" * 510, width=9, height=65_535, label=1),
    Sample(key="three", picture=b"\xff\xd8c", width=1, height=2, metadata={"é": 1, "b": [2]}),
]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def rewrite(path, **changed):
    """Write a manifest again with other values."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changed}))


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "x.tar", SAMPLES)
    for name in ("x.tar", "x.index"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_shard_has_its_frozen_bytes(tmp_path):
    # These digits may change with FORMAT_VERSION only: shards on people's disks have this layout.
    info = write_shard(tmp_path / "x.tar", SAMPLES)
    assert info.sha256[:16] == "10b22c14c3a8d7a0"
    assert info.index_sha256[:16] == "9c2635e1b6a5a18a"


def test_the_manifest_entry_describes_the_files(tmp_path):
    info = write_shard(tmp_path / "x.tar", iter(SAMPLES))
    tar, index = (tmp_path / "x.tar").read_bytes(), (tmp_path / "x.index").read_bytes()
    assert (info.name, info.samples, info.bytes) == ("x.tar", 3, len(tar))
    assert info.sha256 == hashlib.sha256(tar).hexdigest()
    assert info.index_sha256 == hashlib.sha256(index).hexdigest()


def test_tarfile_reads_every_member_with_its_bytes(tmp_path):
    write_shard(tmp_path / "x.tar", SAMPLES)
    with tarfile.open(tmp_path / "x.tar", "r:") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(members) == [
        *("ant/one.jpg", "ant/one.cls", "bee/two.jpg", "bee/two.cls", "three.jpg", "three.json")
    ]
    assert members["ant/one.jpg"] == SAMPLES[0].picture and members["bee/two.cls"] == b"1"
    assert json.loads(members["three.json"]) == SAMPLES[2].metadata


def test_a_tar_says_nothing_about_who_made_it_and_when(tmp_path):
    write_shard(tmp_path / "x.tar", SAMPLES)
    with tarfile.open(tmp_path / "x.tar", "r:") as tar:
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
    assert facts == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 8192, 8704, 9216, 9728, 10240])
def test_a_tar_ends_in_two_empty_blocks_and_fills_whole_records(tmp_path, size):
    write_shard(tmp_path / "x.tar", [Sample(key="k", picture=b"x" * size, width=1, height=1)])
    data = (tmp_path / "x.tar").read_bytes()
    assert len(data) % tarfile.RECORDSIZE == 0 and data.endswith(bytes(1024))
    with tarfile.open(tmp_path / "x.tar", "r:") as tar:
        assert [member.size for member in tar] == [size]
        assert len(data) - tar.offset >= 1024 - 512  # tarfile has read one of the empty blocks


def test_webdataset_reads_the_same_pictures_and_labels(shard_set, clean_pictures):
    samples = []
    for tar in sorted(shard_set.glob("*.tar")):
        with tar.open("rb") as stream:  # opened here because webdataset leaves its files open
            files = tar_file_expander([{"url": tar.name, "stream": stream}])
            samples += group_by_keys(files)
    assert [sample["jpg"] for sample in samples] == clean_pictures
    assert [int(sample["cls"]) for sample in samples] == [n % 3 for n in range(40)]
    assert samples[4]["__key__"] == "bee/picture004"


def test_an_index_record_is_24_bytes_and_its_header_32(tmp_path):
    write_shard(tmp_path / "x.tar", SAMPLES)
    assert INDEX_RECORD.itemsize == 24 and INDEX_HEADER.size == 32
    assert (tmp_path / "x.index").stat().st_size == 32 + 3 * 24


def test_an_index_says_where_each_picture_lies_and_what_it_is(tmp_path):
    write_shard(tmp_path / "x.tar", SAMPLES)
    data = (tmp_path / "x.tar").read_bytes()
    for sample, record in zip(SAMPLES, read_index(tmp_path / "x.index"), strict=True):
        start = int(record["block"]) * 512
        assert data[start : start + record["size"]] == sample.picture
        assert record["crc32"] == zlib.crc32(sample.picture)
        assert (record["width"], record["height"]) == (sample.width, sample.height)
        assert record["label"] == sample.label and record["flags"] == 0


def test_an_index_can_be_read_without_this_program(tmp_path):
    # Byte for byte as shards/README.md describes it for other languages.
    write_shard(tmp_path / "x.tar", SAMPLES)
    data = (tmp_path / "x.index").read_bytes()
    assert struct.unpack_from("<8sIIQI", data) == (
        *(b"MOCOIDX\0", 1, 24, 3),
        zlib.crc32(data[32:]),
    )
    crc32 = zlib.crc32(SAMPLES[1].picture)
    assert struct.unpack_from("<IIIiHHHH", data, 56) == (6, 512, crc32, 1, 9, 65_535, 0, 0)


def test_no_samples_make_no_shard(tmp_path):
    assert write_shard(tmp_path / "x.tar", []) is None
    assert names_in(tmp_path) == []


def test_an_exception_in_the_middle_leaves_nothing(tmp_path):
    def samples():
        yield SAMPLES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.tar", samples())
    assert names_in(tmp_path) == []


def test_a_shard_in_the_making_has_no_name_that_a_reader_looks_at(tmp_path):
    seen = []

    def samples():
        for sample in SAMPLES:
            seen.append(names_in(tmp_path))
            yield sample

    write_shard(tmp_path / "x.tar", samples())
    assert seen == [[], [".x.tar.part"], [".x.tar.part"]] and names_in(tmp_path) == [
        "x.index",
        "x.tar",
    ]


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    # What a power cut leaves under a name is then whole; a kill cannot show the difference.
    events, fsync, replace = [], os.fsync, Path.replace

    def noted_fsync(handle):
        fsync(handle)
        events.append(("on the disk", Path(f"/proc/self/fd/{handle}").readlink().name))

    def noted_replace(path, target):
        events.append(("named", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_shard(tmp_path / "x.tar", SAMPLES)
    assert events == [
        ("on the disk", ".x.tar.part"),
        ("on the disk", ".x.index.part"),
        ("named", "x.tar"),
        ("named", "x.index"),
        ("on the disk", tmp_path.name),
    ]


def test_no_tar_stays_behind_where_its_index_cannot_be_written(tmp_path):
    (tmp_path / "x.index").mkdir()  # stands for a disk that fills up between the two
    with pytest.raises(OSError):
        write_shard(tmp_path / "x.tar", SAMPLES)
    assert names_in(tmp_path) == ["x.index"]


def test_an_earlier_file_stays_whole_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ValueError), atomic_file(tmp_path / "x") as file:
        file.write(b"half of the n")
        file.flush()
        assert (tmp_path / "x").read_bytes() == b"old"
        raise ValueError
    assert (tmp_path / "x").read_bytes() == b"old" and names_in(tmp_path) == ["x"]


@pytest.mark.parametrize("key", ["ключ", "k" * 101])
def test_a_key_that_ustar_cannot_hold_is_refused(tmp_path, key):
    with pytest.raises(ValueError):
        write_shard(tmp_path / "x.tar", [Sample(key=key, picture=b"a", width=1, height=1)])
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("place", [0, 8, 12, 17, 24, 32, 60, -1])
def test_a_flipped_bit_anywhere_in_an_index_is_an_input_error(tmp_path, place):
    write_shard(tmp_path / "x.tar", SAMPLES)
    data = bytearray((tmp_path / "x.index").read_bytes())
    data[place] ^= 4
    (tmp_path / "x.index").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.index (is damaged|is not a shard|has index version)"):
        read_index(tmp_path / "x.index")


@pytest.mark.parametrize("size", [0, 5, 32, 103, 105])
def test_an_index_of_another_length_is_an_input_error(tmp_path, size):
    write_shard(tmp_path / "x.tar", SAMPLES)
    data = (tmp_path / "x.index").read_bytes()
    (tmp_path / "x.index").write_bytes((data + b"\0")[:size])
    with pytest.raises(InputError, match=r"x\.index is (damaged|not a shard index)"):
        read_index(tmp_path / "x.index")


def test_an_index_of_another_version_names_both_versions(tmp_path):
    (tmp_path / "x.index").write_bytes(INDEX_HEADER.pack(b"MOCOIDX\0", 2, 32, 0, 0))
    with pytest.raises(InputError, match=r"version 2 with 32 bytes .* reads version 1 with 24"):
        read_index(tmp_path / "x.index")


def test_a_manifest_gives_back_what_was_written(tmp_path):
    info = write_shard(tmp_path / "x.tar", SAMPLES)
    written = write_manifest(tmp_path, [info], ["ant", "bee"], {"seed": 3})
    assert written == read_manifest(tmp_path)
    assert (written.shards, written.classes, written.samples) == ((info,), ("ant", "bee"), 3)
    data = (tmp_path / "manifest.json").read_bytes()
    assert written.sha256 == hashlib.sha256(data).hexdigest()


def test_an_unfinished_folder_is_an_input_error_that_counts_its_tars(tmp_path):
    write_shard(tmp_path / "x.tar", SAMPLES)
    with pytest.raises(InputError, match=r"has 1 tar files but no manifest\.json"):
        read_manifest(tmp_path)


def test_a_missing_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder of shards"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"version": 1}', "\udcff\udcfe"])
def test_a_damaged_manifest_is_an_input_error(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"manifest\.json is not a manifest of shards"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_version_names_both_versions(own_set):
    rewrite(own_set / "manifest.json", version=9)
    with pytest.raises(InputError, match=r"manifest\.json has version 9, this program reads 1"):
        read_manifest(own_set)


@pytest.mark.parametrize("name", ["../x", "a/b.tar", "/etc/passwd", "..", ".", ""])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(own_set, name):
    shards = json.loads((own_set / "manifest.json").read_text())["shards"]
    rewrite(own_set / "manifest.json", shards=[{**shards[0], "name": name}])
    with pytest.raises(InputError, match=r"which is not a .* in its folder"):
        read_manifest(own_set)


@pytest.mark.parametrize("changed", [{"samples": "9"}, {"samples": -1}, {"name": 5}])
def test_a_manifest_with_a_value_of_the_wrong_kind_is_refused(own_set, changed):
    shards = json.loads((own_set / "manifest.json").read_text())["shards"]
    rewrite(own_set / "manifest.json", shards=[{**shards[0], **changed}])
    with pytest.raises(InputError, match=r"manifest\.json"):
        read_manifest(own_set)


def test_an_index_holds_the_largest_place_size_and_side_that_it_promises():
    record = np.zeros(1, INDEX_RECORD)
    for name, value in (("block", 2**32 - 1), ("size", 2**32 - 1), ("width", 65_535)):
        record[name] = value
        assert record[name][0] == value


def test_shards_with_the_same_pictures_in_another_order_differ(tmp_path):
    orders = itertools.permutations(SAMPLES)
    infos = [write_shard(tmp_path / f"{n}.tar", order) for n, order in enumerate(orders)]
    assert len({info.sha256 for info in infos}) == 6


def test_a_write_that_fails_names_its_file(tmp_path):
    with pytest.raises(OSError) as caught, atomic_file(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x")


@pytest.mark.parametrize(
    "name", ["a.jpg", "ant/" + "b" * 90 + ".cls", "c" * 100, "d" * 60 + "/" + "e" * 60]
)
@pytest.mark.parametrize("size", [0, 7, 511, 99_999, 2**32 - 1])
def test_a_tar_header_is_what_tarfile_writes(name, size):
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    assert tar_header(name, size) == member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def test_a_reader_made_from_the_specification_alone_reads_a_set(shard_set, clean_pictures):
    # shards/README.md in other words; nothing of pipeline/ is used.
    manifest = json.loads((shard_set / "manifest.json").read_bytes())
    assert (manifest["format"], manifest["version"]) == ("mocostream-shards", 1)
    found = []
    for shard in manifest["shards"]:
        tar = (shard_set / shard["name"]).read_bytes()
        index = (shard_set / shard["name"]).with_suffix(".index").read_bytes()
        assert hashlib.sha256(tar).hexdigest() == shard["sha256"] and len(tar) == shard["bytes"]
        assert hashlib.sha256(index).hexdigest() == shard["index_sha256"]
        magic, version, size, count, crc32 = struct.unpack("<8sIIQI4x", index[:32])
        assert (magic, version, size, count) == (b"MOCOIDX\0", 1, 24, shard["samples"])
        assert zlib.crc32(index[32:]) == crc32
        for place in range(32, len(index), 24):
            block, size, crc32, label, width, height, flags, zero = struct.unpack(
                "<IIIiHHHH", index[place : place + 24]
            )
            jpeg = tar[512 * block : 512 * block + size]
            assert zlib.crc32(jpeg) == crc32 and (flags, zero) == (0, 0) and width and height
            name = tar[512 * (block - 1) :][:100].split(b"\0")[0].decode("ascii")
            assert name.startswith(manifest["classes"][label] + "/") and name.endswith(".jpg")
            found.append(jpeg)
    assert found == clean_pictures
