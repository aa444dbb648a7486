import json
import shutil
import threading

import numpy as np
import pytest

from pipeline import shard_source, shard_store
from pipeline.local_tar import FileTar, MappedTar
from pipeline.program import InputError
from pipeline.shard_format import INDEX_RECORD, index_bytes, read_index
from pipeline.shard_store import BadSampleError, ShardStore


def set_flags(folder, shard, index, flags):
    path = folder / f"shard-{shard:06d}.index"
    records = read_index(path).copy()
    records["flags"][index] = flags
    path.write_bytes(index_bytes(records))


def test_every_picture_has_the_bytes_that_were_packed(shard_set, clean_pictures):
    store = ShardStore(shard_set)
    places = [(shard, i) for shard, size in enumerate(store.shard_samples) for i in range(size)]
    assert [store.picture(*place).tobytes() for place in places] == clean_pictures


def test_the_sizes_of_the_shards_are_those_of_the_manifest(shard_set):
    store = ShardStore(shard_set)
    assert store.shard_samples.tolist() == [9, 20, 11]
    assert [len(store.records(shard)) for shard in range(3)] == [9, 20, 11]


def test_records_give_size_and_label(shard_set):
    record = ShardStore(shard_set).records(0)[5]
    assert (record["width"], record["height"], record["label"]) == (300, 20, 2)


def test_the_key_names_the_picture_and_its_folder(shard_set):
    store = ShardStore(shard_set)
    assert [store.key(0, 0), store.key(1, 3), store.key(2, 10)] == [
        *("ant/picture000", "ant/picture012", "ant/picture039")
    ]


def test_pictures_cannot_be_written_to(shard_set):
    with pytest.raises(ValueError, match="read-only"):
        ShardStore(shard_set).picture(0, 0)[0] = 1


def test_a_flipped_bit_is_a_bad_sample_with_both_checksums(own_set, flip_bit):
    flip_bit(own_set, 1, 4)
    store = ShardStore(own_set)
    with pytest.raises(BadSampleError, match=r"crc32 [0-9a-f]{8}, packed as [0-9a-f]{8}"):
        store.picture(1, 4)
    assert store.key(1, 4) == "bee/picture013"
    store.picture(1, 3), store.picture(1, 5)  # its neighbours are fine


def test_behind_the_cut_of_a_truncated_tar_samples_are_bad(own_set):
    tar = own_set / "shard-000001.tar"
    cut = int(read_index(tar.with_suffix(".index"))["block"][10]) * 512 + 100
    tar.write_bytes(tar.read_bytes()[:cut])
    store = ShardStore(own_set)
    store.picture(1, 9)
    for index in range(10, 20):
        with pytest.raises(BadSampleError, match=f"truncated shard: {cut} bytes, needs "):
            store.picture(1, index)
    assert (store.key(1, 10), store.key(1, 15)) == ("bee/picture019", "")


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_without_a_tar_its_samples_are_bad_and_the_others_fine(own_set, content):
    (own_set / "shard-000000.tar").unlink()
    if content is not None:
        (own_set / "shard-000000.tar").write_bytes(content)
    store = ShardStore(own_set)
    with pytest.raises(BadSampleError, match="unreadable shard: "):
        store.picture(0, 0)
    assert store.key(0, 0) == ""
    store.picture(1, 0)


def test_a_dropped_sample_is_bad(own_set):
    set_flags(own_set, 2, 7, 1)
    store = ShardStore(own_set)
    with pytest.raises(BadSampleError, match="dropped by its owner"):
        store.picture(2, 7)
    store.picture(2, 6)


def test_flags_of_the_future_do_not_drop_a_sample(own_set):
    set_flags(own_set, 2, 7, 0b10)
    assert ShardStore(own_set).picture(2, 7).size


def spoil_index(path, how):
    if how == "missing":
        path.unlink()
    elif how == "of another packing":
        shutil.copy(path.with_name("shard-000000.index"), path)
    else:
        path.write_bytes(b"not an index")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "unreadable index: .*No such file"),
        ("of another packing", "has 9 samples, the manifest says 20"),
        ("damaged", r"unreadable index: shard-000001\.index is not a shard index"),
    ],
)
def test_without_a_good_index_the_samples_of_that_shard_are_bad(own_set, how, reason):
    spoil_index(own_set / "shard-000001.index", how)
    store = ShardStore(own_set)
    for read in (store.picture, lambda shard, _: store.records(shard)):
        with pytest.raises(BadSampleError, match=reason):
            read(1, 0)
    assert store.key(1, 0) == ""
    assert store.picture(0, 0).size and store.picture(2, 0).size


def test_a_shard_that_came_back_is_read_after_a_while(own_set, clean_pictures, monkeypatch):
    tar = own_set / "shard-000000.tar"
    tar.rename(own_set / "away")
    store = ShardStore(own_set)
    with pytest.raises(BadSampleError):
        store.picture(0, 0)
    (own_set / "away").rename(tar)
    with pytest.raises(BadSampleError):
        store.picture(0, 0)
    monkeypatch.setattr(shard_store, "RETRY_AFTER_S", 0)
    assert store.picture(0, 0).tobytes() == clean_pictures[0]


def test_reading_and_mapping_give_the_same_bytes_and_the_same_reasons(own_set, monkeypatch):
    tar = own_set / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    mapped = ShardStore(own_set)
    monkeypatch.setattr(shard_source, "is_network", lambda _: True)
    read = ShardStore(own_set)

    def outcome(store, shard, index):
        try:
            return store.picture(shard, index).tobytes()
        except BadSampleError as error:
            return str(error)

    places = [(shard, i) for shard in range(3) for i in range(store_size(mapped, shard))]
    assert isinstance(read._shard(0).tar, FileTar) and isinstance(mapped._shard(0).tar, MappedTar)
    assert [outcome(mapped, *p) for p in places] == [outcome(read, *p) for p in places]


def store_size(store, shard):
    return int(store.shard_samples[shard])


def test_tars_may_lie_in_another_folder_than_their_indexes(own_set, clean_pictures, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    for tar in own_set.glob("*.tar"):
        tar.rename(away / tar.name)
    manifest = json.loads((own_set / "manifest.json").read_text())
    for tars in (str(away), "../away"):
        (own_set / "manifest.json").write_text(json.dumps(manifest | {"tars": tars}))
        assert ShardStore(own_set).picture(0, 3).tobytes() == clean_pictures[3]
    (own_set / "manifest.json").write_text(json.dumps(manifest | {"tars": "pipe:cat"}))
    with pytest.raises(InputError, match="pipe: is not served"):
        ShardStore(own_set)


def test_a_picture_outlives_the_shard_that_it_came_from(shard_set, clean_pictures, monkeypatch):
    monkeypatch.setattr(shard_store, "OPEN_SHARDS", 1)
    store = ShardStore(shard_set)
    picture = store.picture(0, 0)
    store.picture(1, 0), store.picture(2, 0)
    assert len(store._open) == 1 and picture.tobytes() == clean_pictures[0]
    assert store.picture(0, 1).tobytes() == clean_pictures[1]


def test_many_threads_may_read_at_once(shard_set, clean_pictures, monkeypatch):
    monkeypatch.setattr(shard_store, "OPEN_SHARDS", 1)
    store, wrong = ShardStore(shard_set), []

    def read(seed):
        for number in np.random.default_rng(seed).integers(0, 29, 200):
            shard, index = (0, number) if number < 9 else (1, number - 9)
            if store.picture(shard, index).tobytes() != clean_pictures[number]:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == [] and INDEX_RECORD.itemsize == 24
