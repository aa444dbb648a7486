"""Shards behind a real S3 protocol server, with everything going wrong in between."""

import functools
import http.server
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from rich.console import Console

from pipeline import check_shards, found_tars, remote_folder
from pipeline.check_shards import IndexConfig
from pipeline.data_config import DataConfig
from pipeline.loader import PairLoader
from pipeline.program import InputError
from pipeline.remote_folder import RetryPolicy
from pipeline.shard_cache import GIB, CacheConfig
from pipeline.shard_store import BadSampleError, ShardStore
from tests.fault_proxy import proxy_to

ROOT = Path(__file__).resolve().parents[1]
QUICK = RetryPolicy(attempts=5, first_s=0.02, longest_s=0.1, connect_s=1, stalled_s=1, request_s=5)
SHARDS, EACH, PICTURE_BYTES = 12, 10, 20_000


def noise(number):
    return random.Random(number).randbytes(PICTURE_BYTES)


@pytest.fixture(scope="module")
def big_set(tmp_path_factory, pack_set):
    """Twelve shards of 0.2 MB; what is in them is no picture, which the store does not mind."""
    pictures = [noise(number) for number in range(SHARDS * EACH)]
    return pack_set(tmp_path_factory.mktemp("remote") / "set", pictures, [EACH] * SHARDS)


@pytest.fixture(scope="module")
def s3(big_set):
    """A moto server with ``big_set`` in s3://bucket/set; its address."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys
    )
    client.create_bucket(Bucket="bucket")
    for path in big_set.iterdir():
        client.put_object(Bucket="bucket", Key=f"set/{path.name}", Body=path.read_bytes())
    client.close()
    yield host, port
    server.stop()


@pytest.fixture
def proxy(s3, monkeypatch):
    """The way to ``s3``, which a test may disturb."""
    with proxy_to(*s3) as running:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setattr(remote_folder, "PART_BYTES", 50_000)
        yield running


@contextmanager
def opened(cache, gib=1.0, policy=QUICK, url="s3://bucket/set"):
    store = ShardStore(url, CacheConfig(folder=cache, gib=gib), policy)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def watched(folder, limit_bytes):
    """Look at the folder's size all the time; it must never be above the limit."""
    stop, seen = threading.Event(), [0]

    def sizes():
        with os.scandir(folder) as entries, suppress(FileNotFoundError):
            return {entry.inode(): entry.stat().st_size for entry in entries}
        return None

    def watch():
        before = None
        while not stop.is_set():
            now = sizes()
            if now is not None and now == before:  # else it may mix two moments
                seen.append(sum(now.values()))
            before = now
            time.sleep(0.001)  # servers and readers run in this process too

    folder.mkdir(exist_ok=True)
    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    stop.set()
    thread.join()
    assert 0 < max(seen) <= limit_bytes


def read_all(store, rounds=1):
    for _ in range(rounds):
        for shard in range(SHARDS):
            for index in range(EACH):
                assert store.picture(shard, index).tobytes() == noise(shard * EACH + index)


def test_every_picture_arrives_and_the_second_time_nothing_is_fetched(proxy, tmp_path):
    with opened(tmp_path) as store:
        read_all(store)
    assert any(span == "bytes=0-49999" for _, span in proxy.requests)
    with opened(tmp_path) as again:
        before = len(proxy.requests)
        read_all(again)
        assert len(proxy.requests) == before and again.counters.fetched_bytes < 10_000


def test_through_errors_slow_and_broken_bodies_and_hang_ups_every_byte_is_right(proxy, tmp_path):
    faults = [None, ("status", 503), ("cut", 700), ("slow", 0.05), ("drop",), None, None]
    draw = random.Random(1)
    with opened(tmp_path, policy=RetryPolicy(**{**vars(QUICK), "attempts": 12})) as store:
        proxy.fault = lambda *_: draw.choice(faults)
        read_all(store)
        assert store.counters.retries > 20


def test_a_body_that_stalls_is_given_up_and_asked_for_again(proxy, tmp_path):
    with opened(tmp_path) as store:
        proxy.fault = lambda number, _: ("slow", 60) if number == 2 else None
        started = time.monotonic()
        store.picture(3, 0)
        assert store.counters.retries >= 1 and time.monotonic() - started < 30


def test_an_object_that_changes_while_it_is_fetched_is_fetched_anew(proxy, tmp_path):
    with opened(tmp_path) as store:
        store.records(0)
        first = len(proxy.requests)
        proxy.fault = lambda number, _: ("etag", '"other"') if number == first + 2 else None
        assert store.picture(0, 9).tobytes() == noise(9)
        spans = [span for path, span in proxy.requests[first:] if path.endswith(".tar")]
        assert spans.count("bytes=0-49999") == 2


def test_an_object_that_is_not_the_manifests_makes_bad_samples_only(s3, proxy, tmp_path):
    other = boto3.client("s3", endpoint_url=proxy.url, region_name="us-east-1")
    direct = boto3.client("s3", endpoint_url=f"http://{s3[0]}:{s3[1]}", region_name="us-east-1")
    body = direct.get_object(Bucket="bucket", Key="set/shard-000005.tar")["Body"]
    right = body.read()
    body.close()
    flipped = bytearray(right)
    flipped[100_000] ^= 1
    try:
        for wrong, reason in ((bytes(flipped), "sha256"), (right[:-512], "the manifest says")):
            direct.put_object(Bucket="bucket", Key="set/shard-000005.tar", Body=wrong)
            with opened(tmp_path / reason[:3]) as store:
                with pytest.raises(BadSampleError, match=reason):
                    store.picture(5, 0)
                assert store.picture(4, 0).tobytes() == noise(40)
    finally:
        direct.put_object(Bucket="bucket", Key="set/shard-000005.tar", Body=right)
        other.close(), direct.close()


def test_a_server_that_goes_away_and_comes_back_is_waited_for(proxy, tmp_path):
    with opened(tmp_path, policy=RetryPolicy(first_s=0.1, longest_s=0.5, connect_s=1)) as store:
        store.picture(0, 0)
        away = threading.Event()
        proxy.fault = lambda *_: ("drop",) if not away.is_set() else None
        threading.Timer(1.0, away.set).start()
        assert store.picture(1, 1).tobytes() == noise(11)
        assert store.counters.waited_s > 0.8


def test_a_server_that_stays_away_makes_bad_samples_soon_and_what_is_here_goes_on(proxy, tmp_path):
    with opened(tmp_path) as store:
        store.picture(0, 0)
        proxy.fault = lambda *_: ("status", 503)
        with pytest.raises(BadSampleError, match="503"):
            store.picture(1, 0)
        before = len(proxy.requests)
        with pytest.raises(BadSampleError):  # no new attempt for each sample
            store.picture(1, 1)
        assert len(proxy.requests) == before
        assert store.picture(0, 5).tobytes() == noise(5)


def test_while_a_server_is_away_each_further_file_is_asked_for_once(proxy, tmp_path):
    with opened(tmp_path) as store:
        requests = []
        for shard in (1, 2, 3):
            proxy.fault = lambda *_: ("status", 503)
            before = len(proxy.requests)
            with pytest.raises(BadSampleError, match="503"):
                store.picture(shard, 0)
            requests.append(len(proxy.requests) - before)
        assert requests == [QUICK.attempts, 1, 1]
        # One answer, and everything is insisted on again.
        proxy.fault = lambda *_: None
        assert store.picture(4, 0).tobytes() == noise(40)
        first = len(proxy.requests)
        proxy.fault = lambda number, _: ("status", 503) if number == first else None
        assert store.picture(5, 0).tobytes() == noise(50)


def fetched_from(proxy, first):
    """The tars of the requests from number ``first``, in order."""
    return [path.rpartition("-")[2] for path, _ in proxy.requests[first:] if path.endswith(".tar")]


def finished(cache):
    """The tars in a cache."""
    return [p for p in cache.iterdir() if p.suffix != ".part" and p.stat().st_size > 100_000]


def wait_until(is_so, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert is_so()


@pytest.mark.parametrize("needed", [11, 1])  # one that nobody fetches yet, one on its way
def test_a_shard_that_is_needed_now_passes_those_that_are_fetched_ahead(
    proxy, tmp_path, monkeypatch, needed
):
    monkeypatch.setattr(remote_folder, "PART_BYTES", 4_000)  # about fifty parts
    proxy.fault = lambda _, path: ("slow", 0.03) if path.endswith(".tar") else None
    with opened(tmp_path) as store:
        store.records(needed)
        store.prefetch([0, 1, 2, 3])
        wait_until(lambda: len(fetched_from(proxy, 0)) > 20)
        first = len(proxy.requests)
        assert store.picture(needed, 5).tobytes() == noise(needed * EACH + 5)
        tars = fetched_from(proxy, first)
        own = [place for place, name in enumerate(tars) if name == f"{needed:06d}.tar"]
        # At most the parts that were on their way when it was asked for.
        assert len(own) > 20 and own[-1] - len(own) < 2 * remote_folder.PARTS_AT_ONCE
        wait_until(lambda: len(finished(tmp_path)) == len({0, 1, 2, 3, needed}))


@pytest.mark.usefixtures("proxy")
def test_the_cache_stays_below_its_limit_while_threads_and_prefetches_fight_for_it(
    tmp_path,
):
    limit = 900_000  # four of the twelve shards
    with watched(tmp_path / "c", limit), opened(tmp_path / "c", limit / GIB) as store:
        errors = []

        def reader(seed):
            draw = random.Random(seed)
            for _ in range(25):
                shard, index = draw.randrange(SHARDS), draw.randrange(EACH)
                store.prefetch(draw.sample(range(SHARDS), 4))
                if store.picture(shard, index).tobytes() != noise(shard * EACH + index):
                    errors.append((shard, index))

        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert errors == [] and store.evictions > 5


READER = """
import random, sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from pipeline import remote_folder
from pipeline.shard_cache import GIB, CacheConfig
from pipeline.shard_store import ShardStore
remote_folder.PART_BYTES = 50_000
draw = random.Random(int(sys.argv[1]))
cache = CacheConfig(folder=Path(sys.argv[2]), gib=int(sys.argv[3]) / GIB)
store = ShardStore("s3://bucket/set", cache)
for _ in range(int(sys.argv[4])):
    shard, index = draw.randrange(12), draw.randrange(10)
    right = random.Random(shard * 10 + index).randbytes(20_000)
    assert store.picture(shard, index).tobytes() == right, (shard, index)
store.close()
"""


def start_reader(seed, cache, limit, count):
    root = str(ROOT)
    code = READER.format(root=root)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, (seed, cache, limit, count))])


def test_two_processes_share_a_cache_and_each_shard_is_fetched_once(proxy, tmp_path):
    readers = [start_reader(seed, tmp_path, 10_000_000, 120) for seed in (1, 2)]
    assert [reader.wait(120) for reader in readers] == [0, 0]
    firsts = [path for path, span in proxy.requests if span == "bytes=0-49999"]
    assert len(firsts) == len(set(firsts)) == SHARDS


@pytest.mark.usefixtures("proxy")
def test_two_processes_keep_a_small_cache_below_its_limit(tmp_path):
    limit = 900_000
    with watched(tmp_path / "c", limit):
        readers = [start_reader(seed, tmp_path / "c", limit, 40) for seed in (3, 4)]
        assert [reader.wait(120) for reader in readers] == [0, 0]


def test_what_a_killed_process_left_is_cleared_and_fetched_anew(proxy, tmp_path):
    proxy.fault = lambda _, path: ("slow", 60) if path.endswith(".tar") else None
    victim = start_reader(5, tmp_path, 10_000_000, 10)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.kill()
    victim.wait()
    assert list(tmp_path.glob("*.part"))
    proxy.fault = lambda *_: None
    with opened(tmp_path) as store:
        assert not list(tmp_path.glob("*.part"))
        read_all(store)


@pytest.mark.usefixtures("proxy")
def test_a_cache_too_small_for_two_shards_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--data\.cache-gib .* is too small .* give at least"):
        ShardStore("s3://bucket/set", CacheConfig(folder=tmp_path, gib=300_000 / GIB), QUICK)


@pytest.mark.usefixtures("proxy")
def test_no_manifest_and_no_server_are_input_errors(tmp_path):
    for url, way in (("s3://bucket/none", "cannot be read"), ("http://127.0.0.1:9/x", "cannot")):
        with pytest.raises(InputError, match=way):
            ShardStore(url, CacheConfig(folder=tmp_path), RetryPolicy(attempts=1, connect_s=1))


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Python's file server with the one feature it lacks."""

    def do_GET(self):
        path = self.translate_path(self.path.replace("/datasets/o/n/resolve/v1", "").split("?")[0])
        if self.path.startswith("/bucket/"):  # as the XML interface of Google's store has it
            path = self.translate_path(self.path.removeprefix("/bucket").replace("%2F", "/"))
        data = Path(path).read_bytes()
        start, end = 0, len(data)
        if span := self.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last) + 1, len(data))
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", '"fixed"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        self.wfile.write(data[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def web(big_set):
    handler = functools.partial(RangeHandler, directory=str(big_set.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_shards_are_read_from_a_web_server(web, tmp_path):
    with opened(tmp_path, url=f"{web}/set/") as store:
        read_all(store)


def test_shards_are_read_from_googles_store_at_an_address_of_the_environment(
    web, tmp_path, monkeypatch
):
    monkeypatch.setenv("GOOGLE_BASE_URL", web)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    with opened(tmp_path, url="gs://bucket/set") as store:
        read_all(store)


def test_shards_are_read_from_a_hub_at_an_address_of_the_environment(web, tmp_path):
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from pathlib import Path\n"
        "from pipeline.shard_cache import CacheConfig\n"
        "from pipeline.shard_store import ShardStore\n"
        f"cache = CacheConfig(folder=Path({str(tmp_path)!r}))\n"
        "store = ShardStore('hf://datasets/o/n@v1/set', cache)\n"
        "print(store.picture(7, 7).tobytes().hex()); store.close()"
    )
    environment = {**os.environ, "HF_ENDPOINT": web}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert out.stdout.decode().strip() == noise(77).hex(), out.stderr.decode()


def test_only_the_tars_may_be_remote(big_set, web, tmp_path):
    own = tmp_path / "indexes"
    own.mkdir()
    for path in big_set.glob("*.index"):
        (own / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((big_set / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps(manifest | {"tars": f"{web}/set"}))
    with opened(tmp_path / "cache", url=own) as store:
        read_all(store)


@pytest.mark.usefixtures("proxy")
def test_the_loader_gives_the_same_batches_from_a_folder_and_from_a_url(shard_set, tmp_path, s3):
    client = boto3.client("s3", endpoint_url=f"http://{s3[0]}:{s3[1]}", region_name="us-east-1")
    for path in shard_set.iterdir():
        client.put_object(Bucket="bucket", Key=f"pictures/{path.name}", Body=path.read_bytes())
    client.close()

    def batches(shards):
        config = DataConfig(
            shards=shards, image_px=32, engine="torchvision", cache=tmp_path, cache_gib=0.01
        )
        with PairLoader(config, global_batch=8, seed=1, device=torch.device("cpu")) as loader:
            return [(b.sample_N, b.query_N3HW) for b in (next(loader) for _ in range(12))]

    pairs = zip(batches(str(shard_set)), batches("s3://bucket/pictures"), strict=True)
    for (sample_N, query_N3HW), (other_N, other_N3HW) in pairs:
        assert np.array_equal(sample_N, other_N) and torch.equal(query_N3HW, other_N3HW)


@pytest.mark.usefixtures("proxy")
def test_a_cache_that_cannot_hold_what_a_window_needs_is_refused(tmp_path):
    config = DataConfig(
        shards="s3://bucket/set", engine="torchvision", cache=tmp_path, cache_gib=900_000 / GIB
    )
    with pytest.raises(InputError, match=r"raise --data\.cache-gib, or lower --data\.window"):
        PairLoader(config, global_batch=8, seed=1, device=torch.device("cpu"))


def test_closing_while_shards_are_being_fetched_ends_soon(proxy, tmp_path, monkeypatch):
    proxy.fault = lambda _, path: ("slow", 0.3) if path.endswith(".tar") else None
    monkeypatch.setattr(remote_folder, "PART_BYTES", 10_000)  # more parts than threads
    for attempt in range(5):
        store = ShardStore("s3://bucket/set", CacheConfig(folder=tmp_path / str(attempt)), QUICK)
        store.prefetch(range(SHARDS))
        time.sleep(0.15)
        closing = threading.Thread(target=store.close, daemon=True)
        closing.start()
        closing.join(60)
        assert not closing.is_alive() and not list((tmp_path / str(attempt)).glob("*.part"))


def index_urls(output, *urls):
    console = Console(file=io.StringIO(), width=200)
    config = IndexConfig(shards=urls, output=output, workers=1)
    return check_shards.index(config, console), console.file.getvalue()


@pytest.fixture
def foreign_urls(shard_set, s3):
    """The tars of ``shard_set`` in a bucket, without their manifest and indexes."""
    host, port = s3
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys
    )
    for path in shard_set.glob("*.tar"):
        client.put_object(Bucket="bucket", Key=f"foreign/{path.name}", Body=path.read_bytes())
    client.close()
    return "s3://bucket/foreign"


def test_tars_behind_a_url_are_indexed_and_read(proxy, foreign_urls, shard_set, tmp_path):
    proxy.fault = lambda number, _: {1: ("status", 503), 3: ("cut", 700)}.get(number)
    index = tmp_path / "index"
    manifest, _ = index_urls(index, foreign_urls)
    ours = ShardStore(shard_set).manifest
    assert manifest.tars == foreign_urls
    assert [(s.name, s.samples, s.sha256) for s in manifest.shards] == [
        (s.name, s.samples, s.sha256) for s in ours.shards
    ]
    assert sorted(path.name for path in index.iterdir()) == [
        *("indexed.jsonl", "manifest.json"),
        *(f"shard-{number:06d}.index" for number in range(3)),
    ]
    with opened(tmp_path / "cache", url=index) as store:
        local = ShardStore(shard_set)
        for shard, size in enumerate((9, 20, 11)):
            for place in range(size):
                assert np.array_equal(store.picture(shard, place), local.picture(shard, place))
    braces = f"{foreign_urls}/shard-{{000000..000002}}.tar"
    again, said = index_urls(index, braces)
    assert again == manifest and "3 of them unchanged" in said


@pytest.mark.usefixtures("proxy")
def test_what_cannot_be_listed_or_is_not_there_is_one_line(
    foreign_urls, web, tmp_path, monkeypatch
):
    monkeypatch.setattr(found_tars, "RetryPolicy", lambda: QUICK)
    for urls, message in (
        ((f"{foreign_urls}/none.tar",), "none.tar cannot be had"),
        (("s3://bucket/nothing",), r"holds no \*\.tar"),
        ((web,), "a web server lists no folder"),
    ):
        with pytest.raises(InputError, match=message):
            index_urls(tmp_path / "index", *urls)
    with pytest.raises(InputError, match="give a local folder for the index with --output"):
        index_urls(None, foreign_urls)
    assert list(tmp_path.iterdir()) == []
