import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import entry_list
from pipeline.entry_list import Entry, EntryList, Ignored, write_list

ROOT = Path(__file__).resolve().parents[1]

ODD_NAMES = [
    "plain/one.jpg",
    "with space/a b.jpg",
    "dots/v1.2.final.jpg",
    "фото/кошка.jpg",
    "фото/собак.jpg",
    "写真写真/猫.png",
    "case/Cat.jpg",
    "case/cat.jpg",
    "twice/x.jpg",
    "twice/x.png",
    "-rf.jpg",
    ".hidden.jpg",
    "deep/" * 30 + "end.jpg",
    "under_score/a_b.jpg",
    "under_score/a b.jpg",
    "\udcff\udcfe/not_utf8.jpg",
]


def read_all(folder, count, seed=0):
    entries = EntryList(folder, count, seed)
    found = list(entries.read(0, count))
    entries.close()
    return found


def numbered(count):
    return (Entry(f"{n:05}.jpg", f"/p/{n}", n, n % 3, metadata={"n": n}) for n in range(count))


def test_entries_come_back_as_they_were(tmp_path):
    given = [
        Entry("a/1.jpg", "/somewhere/a/1.jpg", 10, "a"),
        Entry("2.png", "/archive.tar", 7, 3, 512, {"tags": ["é", 1.5, None]}),
        Entry("\udcff.jpg", "\udcff.jpg", 0, None, metadata="/side/car.json"),
    ]
    listed = write_list(tmp_path, [*given, Ignored("notes.txt", "ending .txt")])
    assert sorted(entry for _, entry in read_all(tmp_path, 3)) == sorted(given)
    assert (listed.count, listed.total_bytes, listed.classes) == (3, 17, ["a"])
    assert (listed.unlabelled, listed.ignored) == ("\udcff.jpg", 1)
    row = json.loads((tmp_path / "ignored.jsonl").read_text())
    assert row == {"file": "notes.txt", "reason": "ending .txt"}


def test_the_shuffle_keeps_every_entry_and_hangs_on_the_seed_alone(tmp_path):
    write_list(tmp_path, numbered(200))
    names = [entry.name for _, entry in read_all(tmp_path, 200, seed=1)]
    assert sorted(names) == [f"{n:05}.jpg" for n in range(200)] != names
    assert names == [entry.name for _, entry in read_all(tmp_path, 200, seed=1)]
    assert names != [entry.name for _, entry in read_all(tmp_path, 200, seed=2)]
    # Neighbours of the list are as far apart as chance puts them: 67 places on average.
    place = {name: number for number, name in enumerate(names)}
    apart = [abs(place[f"{n:05}.jpg"] - place[f"{n + 1:05}.jpg"]) for n in range(199)]
    assert 50 < np.mean(apart) < 85


def test_a_part_of_the_list_is_that_part_of_the_whole(tmp_path):
    write_list(tmp_path, numbered(50))
    entries = EntryList(tmp_path, 50, seed=3)
    whole = read_all(tmp_path, 50, seed=3)
    assert [*entries.read(0, 20), *entries.read(20, 21), *entries.read(21, 50)] == whole
    entries.close()


def test_the_digest_tells_lists_apart(tmp_path):
    digests = []
    for number, entries in enumerate((numbered(9), numbered(9), numbered(8))):
        (tmp_path / str(number)).mkdir()
        digests.append(write_list(tmp_path / str(number), entries).sha256)
    assert digests[0] == digests[1] != digests[2]


def test_odd_names_give_unique_keys_of_plain_ascii(keys_of):
    keys = keys_of(ODD_NAMES)
    assert all(re.fullmatch(r"[A-Za-z0-9_/-]+", key) and len(key) <= 89 for key in keys)
    assert len({key.lower() for key in keys}) == len(ODD_NAMES)
    assert keys[0] == "plain/one" and keys[1].startswith("with_space/a_b-")


def test_webdataset_skips_none_of_the_keys(keys_of):
    # It takes members below a folder such as "__meta__" for notes of its own, and "кошка" is
    # five characters that a key cannot have.
    keys = keys_of(["кошка/1.jpg", "写真写真/2.jpg", "__pycache__/3.jpg", "((x))/4.jpg"])
    assert [key for key in keys if re.match(r"__[^/]*__($|/)", key)] == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20, unique=True))
def test_any_names_give_unique_keys_of_plain_ascii(keys_of, names):
    keys = keys_of([f"{name}.jpg" for name in names])
    assert all(re.fullmatch(r"[A-Za-z0-9_/-]+", key) for key in keys)
    assert len({key.lower() for key in keys}) == len(names)


def test_a_key_does_not_depend_on_other_names_unless_they_share_it(keys_of):
    assert keys_of(["a b.jpg"]) == keys_of(["a b.jpg", "c.jpg"])[:1]
    assert keys_of(["a.jpg"]) == ["a"] and keys_of(["a.jpg", "a.png"])[0] != "a"


def test_shared_stems_are_found_in_any_number_of_passes(tmp_path, monkeypatch):
    names = [f"{n % 90:03}.{ending}" for n, ending in enumerate(["jpg"] * 90 + ["png"] * 40)]
    keys = []
    for at_once in (1 << 20, 16):
        monkeypatch.setattr(entry_list, "STEMS_AT_ONCE", at_once)
        folder = tmp_path / str(at_once)
        folder.mkdir()
        write_list(folder, (Entry(name, "", 0) for name in names))
        keys.append(read_all(folder, len(names)))
    assert keys[0] == keys[1]
    assert sum("-" in key for key, _ in keys[0]) == 80


def peak_growth_mib(folder, count):
    """Memory that listing and planning ``count`` entries needs, in a process of its own."""
    program = f"""
import resource, sys
from pathlib import Path
from pipeline.entry_list import Entry, EntryList, write_list
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
folder = Path({str(folder)!r}); folder.mkdir()
before = peak()
names = (f"c{{n % 1000}}/{{n}}.jpg" for n in range({count}))
write_list(folder, (Entry(name, "", 9, name[:4]) for name in names))
entries = EntryList(folder, {count}, 0)
assert sum(1 for _ in entries.read({count} // 2, {count} // 2 + 10_000)) == 10_000
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_list(tmp_path):
    growth = peak_growth_mib(tmp_path / "long", 2_000_000)
    assert growth < 1.5 * peak_growth_mib(tmp_path / "short", 200_000) + 16 < 100


def test_what_is_too_large_to_be_packed_adds_nothing_to_the_bytes_of_a_list(tmp_path):
    # A sparse file of 1 TiB would else ask for thousands of shards.
    entries = [Entry("a.jpg", "a.jpg", 70), Entry("b.jpg", "b.jpg", 1 << 40)]
    listed = write_list(tmp_path, entries, max_bytes=100)
    assert (listed.count, listed.total_bytes) == (2, 70)
