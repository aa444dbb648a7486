"""The cache of whole files, without a server: its account, what it removes, what it refuses."""

import fcntl
import os
from pathlib import Path

import pytest

from pipeline import shard_cache
from pipeline.program import InputError
from pipeline.shard_cache import GIB, CacheConfig, NoRoomError, ShardCache


@pytest.fixture
def cache_of(tmp_path):
    """``cache_of(bytes)`` gives a cache of this limit in the test's folder."""

    def cache_of(limit_bytes=1000, **rest):
        return ShardCache(CacheConfig(folder=tmp_path, gib=limit_bytes / GIB), **rest)

    return cache_of


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def put(cache, key, content, **rest):
    """Fetch a file of this content, or of so many bytes."""
    content = bytes(content)
    return cache.fetch(
        key, len(content), lambda file: os.pwrite(file, content, 0), may_wait=False, **rest
    )


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_is_fetched_once_and_read_in_parts(cache_of):
    cache, before = cache_of(), open_files()
    assert not cache.holds("key") and cache.read("key", 0, 4) is None
    assert put(cache, "key", b"0123456789", read=(2, 4)) == b"2345"
    assert cache.holds("key")
    assert (cache.read("key", 3, 2), cache.read("key", 8, 5)) == (b"34", b"89")
    never = lambda _: pytest.fail("is there")  # noqa: E731
    assert cache.fetch("key", 10, never, may_wait=False, read=(0, 3)) == b"012"
    assert open_files() == before


@pytest.mark.parametrize("allocates", [True, False])  # as Linux does, and macOS
def test_a_file_has_its_full_size_and_its_holder_from_the_first_moment(
    cache_of, tmp_path, monkeypatch, allocates
):
    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate")
    cache, seen = cache_of(100), []

    def download(file):
        seen.append((names(tmp_path), os.fstat(file).st_size))
        with pytest.raises(NoRoomError):
            put(cache_of(100), "other", 41)  # which does not remove what is being fetched

    cache.fetch("key", 60, download, may_wait=False)
    assert seen == [(["key.part"], 60)] and names(tmp_path) == ["key"]


USES = {
    "asked for": lambda cache: cache.holds("a"),
    "read": lambda cache: cache.read("a", 0, 1),
}


@pytest.mark.parametrize("use", USES)
def test_the_limit_holds_to_the_byte_and_the_least_recently_used_go_first(cache_of, tmp_path, use):
    cache = cache_of(100)
    (tmp_path / "folder").mkdir()  # somebody else's
    for second, (key, size) in enumerate({"a": 50, "b": 30, "c": 20}.items()):
        put(cache, key, size)
        os.utime(tmp_path / key, (0, second))
    assert USES[use](cache_of(100))  # by another process
    put(cache, "d", 31)
    assert names(tmp_path) == ["a", "d", "folder"] and cache.evictions == 2
    put(cache, "e", 19)
    with pytest.raises(NoRoomError):
        put(cache, "f", 101)
    assert names(tmp_path) == ["a", "d", "e", "folder"]  # nothing goes for one that never fits
    put(cache, "g", 100)
    assert names(tmp_path) == ["folder", "g"] and (tmp_path / ".lock").exists()


def test_a_file_that_is_removed_while_it_is_opened_is_not_there(cache_of, tmp_path, monkeypatch):
    cache, lock = cache_of(), fcntl.flock
    put(cache, "key", 10)

    def removed_before(handle, how):
        (tmp_path / "key").unlink(missing_ok=True)
        lock(handle, how)

    before = open_files()
    monkeypatch.setattr(fcntl, "flock", removed_before)
    assert cache.read("key", 0, 4) is None and open_files() == before


def test_what_is_being_read_stays(cache_of, tmp_path):
    cache = cache_of(100)
    put(cache, "read", 60)
    handle = cache._open("read")
    with pytest.raises(NoRoomError):
        put(cache_of(100), "new", 50)
    os.close(handle)
    put(cache, "new", 50)
    assert names(tmp_path) == ["new"]


def test_what_a_dead_process_left_neither_counts_nor_stays(cache_of, tmp_path):
    cache = cache_of(100)
    (tmp_path / "dead.part").write_bytes(bytes(90))
    put(cache, "new", 50)
    assert names(tmp_path) == ["new"]
    (tmp_path / "dead.part").write_bytes(bytes(40))
    put(cache, "dead", 40)  # of the same file
    assert names(tmp_path) == ["dead", "new"] and cache.evictions == 0
    (tmp_path / "other.part").write_bytes(bytes(40))
    cache_of(100)
    assert names(tmp_path) == ["dead", "new"]


def test_a_limit_that_is_lowered_holds_from_the_start(cache_of, tmp_path):
    for key in "abc":
        put(cache_of(90), key, 30)
    assert cache_of(60).limit_bytes == 60
    assert len(names(tmp_path)) == 2


def test_a_failed_download_leaves_nothing_under_either_name(cache_of, tmp_path):
    cache, before = cache_of(), open_files()
    with pytest.raises(ZeroDivisionError):
        cache.fetch("key", 100, lambda _: 1 / 0, may_wait=True)
    assert names(tmp_path) == [] and open_files() == before


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(cache_of, tmp_path, monkeypatch):
    cache = cache_of()
    put(cache, "old", 100)
    before = open_files()
    with pytest.raises(InputError, match="the disk is full, 200 bytes are needed"):
        cache.fetch("new", 200, full, may_wait=True)
    assert names(tmp_path) == ["old"]
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="the disk is full, 500 bytes are needed"):
        cache.fetch("new", 500, lambda _: None, may_wait=True)
    assert cache.evictions == 1 and names(tmp_path) == [] and open_files() == before


def test_a_disk_that_stays_full_costs_no_more_files_than_ought_to_do(
    cache_of, tmp_path, monkeypatch
):
    cache = cache_of(2000)
    put(cache, "old", 600)
    put(cache, "new", 600)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="the disk is full"):
        put(cache, "key", 500)
    assert len(names(tmp_path)) == 1


def test_a_disk_that_is_full_of_old_files_takes_a_new_one(cache_of, tmp_path, monkeypatch):
    cache = cache_of()
    put(cache, "old", 300)
    allocate = os.posix_fallocate

    def once_there_is_room(*words):
        return full() if (tmp_path / "old").exists() else allocate(*words)

    monkeypatch.setattr(os, "posix_fallocate", once_there_is_room)
    put(cache, "new", 200)
    assert names(tmp_path) == ["new"]


def test_an_error_of_the_disk_that_is_none_of_room_is_that_error(cache_of, tmp_path, monkeypatch):
    cache = cache_of()

    def broken(*_):
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        cache.fetch("key", 100, broken, may_wait=True)
    monkeypatch.setattr(os, "posix_fallocate", broken)
    with pytest.raises(OSError, match="Input/output"):
        put(cache, "key", 100)
    assert names(tmp_path) == []


def test_who_waits_for_room_in_vain_says_so_in_the_end(cache_of):
    cache = cache_of(100, room_timeout_s=0.05)
    put(cache, "held", 60)
    handle = cache._open("held")
    with pytest.raises(InputError, match=r"no room for 41 bytes in 0 s.*raise --data.cache-gib"):
        cache.fetch("new", 41, lambda _: None, may_wait=True)
    os.close(handle)


def test_only_a_folder_on_a_local_disk_and_a_limit_above_nothing_will_do(tmp_path, monkeypatch):
    for gib in (0, -1):
        with pytest.raises(InputError, match=rf"--data.cache-gib {gib}: give a size above 0"):
            ShardCache(CacheConfig(folder=tmp_path, gib=gib))
    monkeypatch.setattr(shard_cache, "file_system", lambda _: "nfs4")
    with pytest.raises(InputError, match=r"is on a network mount \(nfs4\)"):
        ShardCache(CacheConfig(folder=tmp_path))
    monkeypatch.setattr(shard_cache, "file_system", lambda _: "fuse.overlayfs")
    assert ShardCache(CacheConfig(folder=tmp_path, gib=2)).limit_bytes == 2 * 2**30


def test_the_folder_is_the_users_own_for_caches_where_none_is_named(monkeypatch, tmp_path):
    assert CacheConfig(folder=tmp_path / "here").place == tmp_path / "here"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CacheConfig().place == tmp_path / "mocostream"
    assert ShardCache(CacheConfig()).folder.is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert CacheConfig().place == Path.home() / ".cache" / "mocostream"
