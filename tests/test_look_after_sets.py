"""The sub-commands of check_shards for finished sets: verify, stats, drop, export-idx, sample."""

import gc
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import WebDataset

from pipeline.set_stats import gather
from pipeline.shard_format import read_index, read_manifest
from pipeline.shard_store import BadSampleError, ShardStore

ROOT = Path(__file__).resolve().parents[1]


def check_shards(*words, code=0):
    """Run the program, which must end with ``code``; gives what it says."""
    program = [sys.executable, ROOT / "pipeline" / "check_shards.py", *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def packed_set(picture_folder, pack_source):
    """Twelve pictures with metadata, in three shards."""
    for path in picture_folder.rglob("*.jpg"):
        path.with_suffix(".json").write_text(json.dumps({"owner": f"person {path.stem}"}))
    return pack_source(picture_folder, shard_samples=4)


def keys_in(folder):
    """The keys of the pictures that can be used."""
    store, keys = ShardStore(folder), []
    for shard in range(len(store.manifest.shards)):
        for index in range(store.manifest.shards[shard].samples):
            try:
                store.picture(shard, index)
                keys.append(store.key(shard, index))
            except BadSampleError as error:
                assert str(error) == "dropped by its owner"
    return keys


@pytest.mark.parametrize("erase", [False, True])
def test_dropped_pictures_are_not_read_any_more_and_the_set_still_verifies(packed_set, erase):
    before, old = keys_in(packed_set), read_manifest(packed_set)
    gone = {before[1], before[7]}
    text = check_shards("drop", packed_set, *gone, *(["--erase"] if erase else []))
    new = read_manifest(packed_set)
    assert "2 pictures dropped" in text and new.sha256[:12] in text
    assert sorted(keys_in(packed_set)) == sorted(set(before) - gone)
    assert new.sha256 != old.sha256 and new.made_by == old.made_by and new.samples == 12
    assert "are as the manifest says" in check_shards("verify", packed_set, "--decode", 1)


def test_erased_pictures_are_gone_from_the_tar_and_the_others_are_not(packed_set):
    key, *others = keys_in(packed_set)
    before = members_of(packed_set)
    check_shards("drop", packed_set, key, "--erase")
    after = members_of(packed_set)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{key}.jpg", f"{key}.json"}
    assert not any(after[f"{key}.jpg"]) and json.loads(after[f"{key}.json"]) == {}
    assert len(others) == 11


def members_of(folder):
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}
    return found


def test_keys_come_from_files_too(packed_set, tmp_path):
    keys = keys_in(packed_set)
    (tmp_path / "plain.txt").write_text(f"{keys[0]}\n\n{keys[1]}\n")
    (tmp_path / "lines.jsonl").write_text(json.dumps({"key": keys[2], "why": "asked"}) + "\n")
    check_shards("drop", packed_set, "--keys", tmp_path / "plain.txt", tmp_path / "lines.jsonl")
    assert keys_in(packed_set) == keys[3:]


def test_a_key_that_is_not_there_changes_nothing(packed_set):
    before = {path.name: path.read_bytes() for path in packed_set.iterdir()}
    error = check_shards("drop", packed_set, keys_in(packed_set)[0], "no/such", code=2)
    assert "no picture 'no/such' (1 of 2 keys" in error
    assert before == {path.name: path.read_bytes() for path in packed_set.iterdir()}


def test_dropping_twice_is_dropping_once(packed_set):
    key = keys_in(packed_set)[0]
    check_shards("drop", packed_set, key)
    manifest = read_manifest(packed_set)
    check_shards("drop", packed_set, key)
    assert read_manifest(packed_set).sha256 == manifest.sha256


def test_verify_decodes_when_asked(own_set):
    assert "as the manifest says" in check_shards("verify", own_set, "--decode", 1)


def test_verify_finds_what_does_not_decode(tmp_path, clean_pictures, pack_set):
    # A picture that was bad when it was packed: checksums fit, no decoder takes it.
    pictures = [*clean_pictures[:5], clean_pictures[5][:400]]
    folder = pack_set(tmp_path / "bad", pictures, (6,))
    assert "as the manifest says" in check_shards("verify", folder)
    error = check_shards("verify", folder, "--decode", 1, code=2)
    assert "1 of 1 shards differ" in error


def test_the_statistics_are_those_of_the_pictures(shard_set, clean_pictures, tmp_path):
    text = check_shards("stats", shard_set, "--picture", tmp_path / "stats.png")
    assert "40" in text and "3 of 13 to 14 pictures" in text
    with Image.open(tmp_path / "stats.png") as picture:
        assert picture.size == (1100, 770)
    stats = gather(ShardStore(shard_set))
    assert sorted(stats.bytes_N.tolist()) == sorted(map(len, clean_pictures))
    assert stats.shorter_px_N.min() == 16 and stats.aspect_N.max() == 15
    assert (stats.dropped, stats.equal, stats.unlabelled) == (0, 0, 0)


def test_equal_and_dropped_pictures_are_counted(tmp_path, clean_pictures, pack_set):
    folder = pack_set(tmp_path / "twice", [*clean_pictures[:4], *clean_pictures[:2]], (6,))
    check_shards("drop", folder, "ant/picture003")
    stats = gather(ShardStore(folder))
    assert (stats.equal, stats.dropped, len(stats.bytes_N)) == (2, 1, 5)


def test_samples_are_written_as_files(shard_set, clean_pictures, tmp_path):
    check_shards("sample", shard_set, tmp_path / "some", "--count", 5)
    files = list((tmp_path / "some").iterdir())
    assert len(files) == 5 and all(path.read_bytes() in clean_pictures for path in files)
    check_shards("sample", shard_set, tmp_path / "more", "--count", 5, "--seed", 1)
    assert {path.name for path in (tmp_path / "more").iterdir()} != {path.name for path in files}


def test_the_text_index_is_the_one_of_dalis_own_program(packed_set, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="DALI is not installed")
    check_shards("export-idx", packed_set, "--output", tmp_path / "idx")
    for tar in packed_set.glob("*.tar"):
        creator = wds2idx.IndexCreator(str(tar), str(tmp_path / "theirs.idx"), verbose=False)
        creator.create_index()
        creator.close()
        ours = (tmp_path / "idx" / f"{tar.stem}.idx").read_text().splitlines()
        assert ours == (tmp_path / "theirs.idx").read_text().splitlines()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves files open
def test_webdataset_and_dalis_own_reader_give_the_pictures_that_were_packed(packed_set, tmp_path):
    store = ShardStore(packed_set)
    expected = {
        store.key(shard, index): (store.picture(shard, index).tobytes(), int(record["label"]))
        for shard in range(3)
        for index, record in enumerate(store.records(shard))
    }
    tars = sorted(map(str, packed_set.glob("*.tar")))
    data = WebDataset(tars, shardshuffle=False, empty_check=False)
    found = {sample["__key__"]: (sample["jpg"], int(sample["cls"])) for sample in data}
    del data
    gc.collect()
    assert found == expected
    pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
    check_shards("export-idx", packed_set, "--output", tmp_path / "idx")
    indexes = sorted(map(str, (tmp_path / "idx").iterdir()))
    by_dali = read_by_dali(tars, indexes, 12)
    assert by_dali == list(expected.values())


def test_dalis_reader_does_not_see_what_was_dropped(packed_set, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
    gone, *rest = keys_in(packed_set)
    check_shards("drop", packed_set, gone)
    check_shards("export-idx", packed_set, "--output", tmp_path / "idx")
    tars = sorted(map(str, packed_set.glob("*.tar")))
    found = read_by_dali(tars, sorted(map(str, (tmp_path / "idx").iterdir())), 11)
    records = members_of(packed_set)
    assert [data for data, _ in found] == [records[f"{key}.jpg"] for key in rest]


def read_by_dali(tars, indexes, count):
    """Pictures and labels as DALI's own reader gives them."""
    from nvidia.dali import fn, pipeline_def

    from pipeline.dali_views import pipeline_arguments

    @pipeline_def
    def graph():
        return tuple(fn.readers.webdataset(paths=tars, index_paths=indexes, ext=["jpg", "cls"]))

    pipeline = graph(**pipeline_arguments(1, 1, torch.device("cpu"), prefetch=1))
    pipeline.build()
    found = []
    for _ in range(count):
        picture, label = pipeline.run()
        text = np.asarray(label.at(0)).tobytes().decode()
        found.append((np.asarray(picture.at(0)).tobytes(), int(text)))
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("drop", "SET"), "no keys: name them"),
        (("drop", "SET", "--keys", "absent"), "--keys absent: no such file"),
        (("verify", "SET", "--decode", 2), "--decode 2.0: give a share"),
        (("sample", "SET", "out", "--count", 0), "--count 0: give a number"),
        (("stats", "absent"), "absent is not a folder of shards"),
        (("export-idx", "absent"), "absent is not a folder of shards"),
    ],
)
def test_a_wrong_input_is_one_line(own_set, words, message):
    error = check_shards(*(own_set if word == "SET" else word for word in words), code=2)
    assert message in error and error.count("\n") == 1
    assert len(read_index(own_set / "shard-000000.index")) == 9
