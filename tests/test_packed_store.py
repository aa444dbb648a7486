"""Packing into an object store: the bytes of a local packing, and no disk for the whole set."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline import packed_store
from pipeline.curation import CurationConfig
from pipeline.make_shards import pack
from pipeline.pack_config import PackConfig, TooManyRefusedError
from pipeline.program import InputError
from pipeline.remote_folder import RetryPolicy
from pipeline.shard_cache import GIB, CacheConfig
from pipeline.shard_store import ShardStore

PROGRAM = Path(__file__).resolve().parents[1] / "pipeline" / "make_shards.py"
URL = "s3://bucket/set"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, draw_photo):
    """Thirty pictures in two folders, one of them broken."""
    folder = tmp_path_factory.mktemp("thirty") / "pictures"
    for number in range(30):
        path = folder / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_photo(number, 320, 240).save(path, compress_level=1)
    (folder / "ant/broken.jpg").write_bytes(b"<html>")
    return folder


@pytest.fixture(scope="module")
def whole(pictures):
    """The files of a packing into a folder."""
    return packed_into(pictures, pictures.parent / "whole")


def packed_into(pictures, output, **settings):
    config = PackConfig(source=str(pictures), output=output, shard_samples=4, **settings)
    pack(config, QUIET)
    if config.url:
        return None
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def files_in(bucket):
    names = bucket.names("set/")
    return {name.removeprefix("set/"): bucket.read(name) for name in names}


def finished_in(bucket):
    names = bucket.names("set/.packing/done-")
    return {int(re.search(r"done-(\d+)", name)[1]) for name in names}


def test_a_set_in_a_store_has_the_bytes_of_one_in_a_folder(bucket, pictures, whole, tmp_path):
    packed_into(pictures, URL, scratch=tmp_path / "scratch", workers=2)
    assert files_in(bucket) == whole
    assert list((tmp_path / "scratch").iterdir()) == []
    store = ShardStore(URL, CacheConfig(folder=tmp_path / "cache", gib=10_000_000 / GIB))
    assert store.manifest.samples == 30 and store.picture(7, 0).tobytes()
    store.close()
    with pytest.raises(InputError, match="already holds finished shards"):
        packed_into(pictures, URL, scratch=tmp_path / "scratch")


@pytest.mark.usefixtures("bucket")
def test_the_disk_holds_no_more_shards_than_there_are_workers(pictures, whole, tmp_path):
    largest = max(len(data) for name, data in whole.items() if name.endswith(".tar"))
    seen, over = [0], threading.Event()

    def watch():
        while not over.wait(0.005):
            total = 0
            for place, _, names in os.walk(tmp_path / "scratch"):
                for name in names:
                    with contextlib.suppress(OSError):  # it has just gone
                        is_shard = "shard-" in name
                        total += Path(place, name).stat().st_size if is_shard else 0
            seen.append(total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        packed_into(pictures, URL, scratch=tmp_path / "scratch", workers=2)
    finally:
        over.set()
        thread.join()
    assert 0 < max(seen) <= 2 * (largest + 4096) < sum(map(len, whole.values())) / 2


def shards_written(store_proxy):
    """Numbers of the shards whose tars were written since the last time that this was asked."""
    paths = [re.search(r"shard-(\d+)\.tar", path) for path, _ in store_proxy.writes]
    store_proxy.writes.clear()
    return {int(found[1]) for found in paths if found}


def test_parts_on_machines_of_their_own_are_joined_to_the_same_bytes(
    bucket, store_proxy, pictures, whole, tmp_path
):
    for part, scratch in (("2/2", "one"), ("1/2", "two")):
        packed_into(pictures, URL, part=part, workers=1, scratch=tmp_path / scratch)
        assert "set/manifest.json" not in bucket.names()
        assert list((tmp_path / scratch).iterdir()) == []
    assert finished_in(bucket) == set(range(8))
    with pytest.raises(InputError, match="with other settings: give every part the same"):
        packed_into(pictures, URL, part="1/2", seed=1, scratch=tmp_path / "one")
    assert shards_written(store_proxy) == set(range(8))
    packed_into(pictures, URL, workers=1, scratch=tmp_path / "three")
    assert files_in(bucket) == whole
    assert shards_written(store_proxy) == set()


def running(pictures, scratch, workers=2):
    words = (pictures, URL, "--shard-samples", 4, "--workers", workers, "--scratch", scratch)
    command = [sys.executable, PROGRAM, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


def test_killed_and_begun_again_elsewhere_it_does_no_finished_shard_again(
    bucket, store_proxy, pictures, whole, tmp_path
):
    moments, finished = np.random.default_rng(0), set()
    for kill in range(2):
        goal = int(moments.integers(8, 16))
        process = running(pictures, tmp_path / f"machine{kill}")
        while len(store_proxy.writes) < goal and process.poll() is None:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not shards_written(store_proxy) & finished
        finished = finished_in(bucket)
    assert 0 < len(finished) < 8 and "set/manifest.json" not in bucket.names()
    process = running(pictures, tmp_path / "last")
    out = process.communicate()[0]
    assert process.returncode == 0 and f"{len(finished)} of 8 shards are finished already" in out
    assert shards_written(store_proxy) == set(range(8)) - finished
    assert files_in(bucket) == whole


def test_a_finished_shard_whose_tar_is_gone_or_other_is_packed_again(
    bucket, pictures, whole, tmp_path
):
    packed_into(pictures, URL, part="1/2", workers=1, scratch=tmp_path)
    bucket.delete("set/shard-000002.tar")
    bucket.write("set/shard-000004.tar", b"half of it")
    bucket.write("set/.packing/done-000006.json", b"\x80no JSON")
    packed_into(pictures, URL, workers=1, scratch=tmp_path)
    assert files_in(bucket) == whole


def test_other_pictures_begin_anew_and_the_packing_before_ends_at_its_next_shard(
    bucket, pictures, tmp_path
):
    packed_into(pictures, URL, part="1/2", workers=1, scratch=tmp_path)
    before = bucket.read("set/.packing/plan.json")
    packed_into(pictures, URL, seed=3, workers=1, scratch=tmp_path)
    assert json.loads(bucket.read("set/manifest.json"))["made_by"]["seed"] == 3
    assert not bucket.names("set/.packing/")
    bucket.delete("set/manifest.json")
    bucket.write("set/.packing/plan.json", before.replace(b'"seed": 0', b'"seed": 5'))
    store = packed_store.PackedStore(URL)
    with pytest.raises(InputError, match="another packing, of other pictures"):
        store.put(tmp_path, 0, packed_store.ShardResult(), json.loads(before))


def test_faults_of_the_store_are_tried_again_and_one_that_stays_is_one_line(
    bucket, store_proxy, pictures, whole, tmp_path, monkeypatch
):
    quick = RetryPolicy(attempts=3, first_s=0.01, longest_s=0.02, connect_s=1)
    monkeypatch.setattr(packed_store, "RetryPolicy", lambda: quick)
    store_proxy.write_fault = lambda _, path: ("status", 503) if "manifest" in path else None
    with pytest.raises(InputError, match=r"503.*the same command goes on"):
        packed_into(pictures, URL, workers=1, scratch=tmp_path)
    assert len(finished_in(bucket)) == 8
    faults = [("status", 503), None, ("drop",), None]
    store_proxy.write_fault = lambda number, _: faults[number % 4]
    packed_into(pictures, URL, workers=1, scratch=tmp_path)
    assert files_in(bucket) == whole


@pytest.mark.usefixtures("bucket")
def test_what_was_refused_can_be_looked_up_when_too_much_was(pictures, tmp_path):
    with pytest.raises(TooManyRefusedError, match=r"refused\.jsonl lists them") as error:
        packed_into(pictures, URL, max_refused=0, workers=1, scratch=tmp_path)
    [path] = tmp_path.rglob("refused.jsonl")
    assert "broken.jpg" in path.read_text() and str(path) in str(error.value)


WRONG = {
    "no such bucket": ({"output": "s3://nowhere/set"}, "OUTPUT s3://nowhere/set cannot be written"),
    "not of a service": ({"output": "https://host/set"}, "give s3:// or gs://"),
    "not empty": ({"output": "s3://bucket/other"}, "is not empty .*'notes'"),
    "parts that compare": (
        {"output": URL, "part": "1/2", "curation": CurationConfig(duplicates="drop")},
        "in a folder that they share",
    ),
    "scratch of a folder": ({"output": "out", "scratch": Path("s")}, "leave --scratch out"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_output_is_an_input_error_and_nothing_is_written(
    what, bucket, pictures, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    bucket.write("other/notes", b"of somebody")
    settings, message = WRONG[what]
    with pytest.raises(InputError, match=message):
        packed_into(pictures, **{"scratch": tmp_path / "scratch", **settings})
    assert bucket.names() == ["other/notes"] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_on_ray_the_bytes_are_the_same_and_workers_need_no_folder_of_the_program(
    bucket, pictures, whole, tmp_path
):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    packed_into(pictures, URL, part="1/4", workers=1, scratch=tmp_path)
    packed_into(pictures, URL, ray=True, workers=2, scratch=tmp_path)
    assert files_in(bucket) == whole
