import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline import curation, duplicate_search
from pipeline.curation import CurationConfig
from pipeline.duplicate_search import DECODED, PRINT, UNREAD, find_duplicates
from pipeline.make_shards import pack
from pipeline.pack_config import OtherPartsError, PackConfig
from pipeline.program import InputError
from pipeline.shard_format import read_manifest


def prints_of(rows):
    """Fingerprints of (number of the bytes, hash) pairs; None for what could not be read."""
    prints = np.zeros(len(rows), PRINT)
    for place, row in enumerate(rows):
        if row is None:
            prints[place]["state"] = UNREAD
        else:
            prints[place] = ((row[0], 7 * row[0]), row[1], DECODED)
    return prints


def found_in(rows, ours, distance):
    prints = prints_of(rows)
    stretches = (prints[start : start + 5] for start in range(0, len(prints), 5))
    with tempfile.TemporaryDirectory() as folder:
        found = find_duplicates(stretches, len(rows), ours, distance, Path(folder))
        return {late: early for late, early, _ in found}


def plain_duplicates(rows, ours, distance):
    """By the definition, one picture after the other against all kept ones before it."""
    gone, originals = set(), {}
    for late in range(len(rows)):
        for early in range(late):
            if early in gone or late < ours or rows[late] is None or rows[early] is None:
                continue
            same = rows[late][0] == rows[early][0]
            bits = (rows[late][1] ^ rows[early][1]).bit_count()
            if same or 0 <= bits <= distance:
                gone.add(late)
                originals.setdefault(late, early)
    return originals


def hashes_near_each_other():
    """Hashes in clusters, so that chains of near ones occur."""
    flips = st.lists(st.integers(0, 63), max_size=6)
    base = st.sampled_from([0, 0x123456789ABCDEF0, 2**64 - 1])
    return st.builds(lambda b, f: b ^ sum(1 << i for i in set(f)), base, flips)


@given(
    st.lists(st.none() | st.tuples(st.integers(0, 6), hashes_near_each_other()), max_size=14),
    st.integers(0, 4),
    st.sampled_from([-1, 0, 1, 3, 8]),
    st.sampled_from([3, 1000]),
)
def test_duplicates_are_those_of_the_definition(rows, ours, distance, rows_at_once):
    # Equal bytes have equal looks.
    looks = {row[0]: row[1] for row in rows if row}
    rows = [row and (row[0], looks[row[0]]) for row in rows]
    with (
        patch.object(duplicate_search, "ROWS_AT_ONCE", rows_at_once),
        patch.object(duplicate_search, "PAIRS_AT_ONCE", rows_at_once),
    ):
        assert found_in(rows, ours, distance) == plain_duplicates(rows, ours, distance)


def test_a_chain_of_near_pictures_is_not_drawn_together():
    # 0 and 2 differ in two bits, so with 1 gone 2 is nobody's duplicate.
    assert found_in([(0, 0b00), (1, 0b01), (2, 0b11)], 0, 1) == {1: 0}


def test_many_random_hashes_have_no_near_ones():
    rng = np.random.default_rng(0)
    rows = [(n, int(h)) for n, h in enumerate(rng.integers(0, 2**63, 3000))]
    rows.append((3000, rows[17][1] ^ 0b101))
    assert found_in(rows, 0, 3) == {3000: 17}


@pytest.fixture
def twice(tmp_path, draw_photo, encode):
    """Twelve pictures, of which one has the bytes and one the looks of another."""
    folder = tmp_path / "twice"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.jpg").write_bytes(encode(draw_photo(number, 300, 200), quality=90))
    (folder / "a copy of 3.jpg").write_bytes((folder / "3.jpg").read_bytes())
    smaller = draw_photo(5, 300, 200).resize((200, 133))
    (folder / "smaller than 5.jpg").write_bytes(encode(smaller, quality=60))
    return folder


def rows_of(folder):
    path = folder / "duplicates.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_nothing_is_looked_for_unless_asked(twice, pack_source):
    output = pack_source(twice)
    assert read_manifest(output).samples == 12 and rows_of(output) == []


@pytest.mark.parametrize("what", ["report", "drop"])
def test_equal_bytes_are_reported_or_dropped(twice, pack_source, what):
    output = pack_source(twice, curation=CurationConfig(duplicates=what))
    (row,) = rows_of(output)
    # The earlier one of the list stays.
    assert row == {"file": "a copy of 3.jpg", "duplicate_of": "3.jpg", "how": "same bytes"}
    assert read_manifest(output).samples == (11 if what == "drop" else 12)
    assert read_manifest(output).made_by["duplicates"] == what


def test_equal_looks_are_dropped(twice, pack_source, samples_in):
    output = pack_source(twice, curation=CurationConfig(duplicates="drop", near_duplicates=4))
    rows = {row["file"]: row["how"].partition(":")[0] for row in rows_of(output)}
    assert rows == {"a copy of 3.jpg": "same bytes", "smaller than 5.jpg": "looks the same"}
    assert sorted(samples_in(output)) == [str(number) for number in range(10)]


def test_pictures_of_another_set_are_kept_out(twice, tmp_path, pack_source, draw_photo, encode):
    test = tmp_path / "test"
    test.mkdir()
    (test / "7.jpg").write_bytes((twice / "7.jpg").read_bytes())
    (test / "8.png").write_bytes(encode(draw_photo(8, 300, 200), "PNG"))
    shards = pack_source(test)
    curation = CurationConfig(duplicates="drop", near_duplicates=4, against=(str(shards),))
    rows = {row["file"]: row for row in rows_of(pack_source(twice, curation=curation))}
    assert sorted(rows) == ["7.jpg", "8.jpg", "a copy of 3.jpg", "smaller than 5.jpg"]
    assert rows["8.jpg"]["in"] == str(shards) and "in" not in rows["a copy of 3.jpg"]
    assert rows["7.jpg"]["duplicate_of"] == "7.jpg" and rows["7.jpg"]["how"] == "same bytes"


def test_parts_look_at_their_pictures_first_and_drop_what_one_machine_drops(
    twice, tmp_path, pack_source, monkeypatch
):
    monkeypatch.setattr(curation, "ENTRIES_A_JOB", 5)  # three stretches of the list
    others = tmp_path / "others"
    others.mkdir()
    for number in range(6):
        (others / f"{number}.jpg").write_bytes((twice / "7.jpg").read_bytes())
    kept_out = CurationConfig(duplicates="drop", near_duplicates=4, against=(str(others),))
    settings = {"curation": kept_out, "shard_samples": 4}
    alone = pack_source(twice, **settings)

    def pack_part(part):
        config = PackConfig(
            source=str(twice), output=tmp_path / "parts", workers=1, part=part, **settings
        )
        return pack(config, Console(quiet=True))

    for part in ("2/2", "2/2"):
        with pytest.raises(OtherPartsError, match=r"part 2/2 .* 3 stretches of other parts"):
            pack_part(part)
    assert OtherPartsError.exit_code == 75
    for part in ("1/2", "2/2"):
        assert pack_part(part) is None
    assert pack_part("") is not None
    names = sorted(path.name for path in alone.iterdir())
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == names
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (alone / name).read_bytes(), name
    assert "duplicates.jsonl" in names


def test_what_cannot_be_decoded_is_nobodys_duplicate(twice, pack_source):
    for name in ("x.jpg", "y.jpg"):
        (twice / name).write_bytes(b"<html>" + name.encode())
    output = pack_source(twice, curation=CurationConfig(duplicates="drop", near_duplicates=8))
    assert not {"x.jpg", "y.jpg"} & {row["file"] for row in rows_of(output)}
    assert (output / "refused.jsonl").read_text().count("not a picture") == 2


def test_the_messy_packs_pairs_are_found(test_data, tmp_path, pack_source):
    import tarfile

    with tarfile.open(test_data / "messy.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    curation = CurationConfig(duplicates="report", near_duplicates=4)
    rows = rows_of(pack_source(tmp_path / "messy" / "made_here", curation=curation))
    pairs = {frozenset((row["file"], row["duplicate_of"])): row["how"] for row in rows}
    assert pairs[frozenset(("duplicate_a.jpg", "sub/duplicate_b.jpg"))] == "same bytes"
    assert "looks the same" in pairs[frozenset(("near_dup_q40.jpg", "near_dup_q85.jpg"))]


def test_real_photos_are_not_taken_for_each_other(test_data, pack_source):
    curation = CurationConfig(duplicates="report", near_duplicates=8)
    assert rows_of(pack_source(test_data / "imagenet_samples.tar", curation=curation)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"duplicates": "drop", "near_duplicates": 9}, "--near-duplicates 9: give 0 to 8"),
        ({"near_duplicates": 2}, "--duplicates report or"),
        ({"against": ("x",)}, "--duplicates report or"),
    ],
)
def test_a_setting_that_makes_no_sense_is_an_input_error(settings, message):
    with pytest.raises(InputError, match=message):
        CurationConfig(**settings)
