"""Foreign tars become a set: samples, sizes, labels, findings; whole or not at all."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from rich.console import Console
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline import check_shards
from pipeline.check_shards import IndexConfig, VerifyConfig
from pipeline.foreign_shards import IndexJob, IndexRules, index_shard, is_number, parse_label
from pipeline.found_tars import find_tars
from pipeline.index_set import JOURNAL_NAME, agree_on_classes, being_indexed
from pipeline.program import InputError
from pipeline.shard_format import read_index
from pipeline.shard_store import ShardStore

PROGRAM = Path(check_shards.__file__)
INTERRUPTS = (signal.SIGTERM, signal.SIGINT)
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@pytest.fixture(scope="session")
def pictures(draw_photo, encode):
    """Twelve pictures in three formats by their suffixes, each of its own size."""
    found = []
    for number in range(12):
        suffix = list(FORMATS)[number % 3]
        picture = encode(draw_photo(number, 40 + number, 30 + number), FORMATS[suffix])
        found.append((suffix, picture))
    return found


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def plain_members(pictures, first=0, label=lambda n: str(n % 4)):
    for number, (suffix, picture) in enumerate(pictures, first):
        yield f"n{number:04d}.{suffix}", picture
        yield f"n{number:04d}.cls", label(number).encode()
        yield f"n{number:04d}.json", json.dumps({"name": f"class {number % 3}"}).encode()


def index_tar(tar, output=None, **rules):
    (found,) = find_tars([str(tar)])
    return index_shard(IndexJob(tar=found, output=output or tar.parent, rules=IndexRules(**rules)))


def run_index(*places, **settings):
    """The whole program, in this process; what it printed."""
    console = Console(file=io.StringIO(), width=200)
    settings = {"workers": 1} | settings
    manifest = check_shards.index(IndexConfig(shards=tuple(map(str, places)), **settings), console)
    return manifest, console.file.getvalue()


def records_of(folder, name="0"):
    return read_index(folder / f"{name}.index")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_by_webdataset(path):
    with path.open("rb") as file:
        return list(group_by_keys(tar_file_expander([{"url": path.name, "stream": file}])))


def test_what_webdataset_writes_is_indexed_as_it_reads_it(pictures, tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%d.tar"), maxcount=8, verbose=0) as writer:
        for number, (suffix, picture) in enumerate(pictures):
            writer.write({"__key__": f"a/{number:03d}", suffix: picture, "cls": number % 5})
    manifest, said = run_index(tmp_path)
    assert [shard.samples for shard in manifest.shards] == [8, 4]
    assert manifest.classes == ("0", "1", "2", "3", "4") and manifest.tars == ""
    store = ShardStore(tmp_path)
    places = [(0, i) for i in range(8)] + [(1, i) for i in range(4)]
    assert [store.picture(*place).tobytes() for place in places] == [data for _, data in pictures]
    theirs = [sample for name in "01" for sample in read_by_webdataset(tmp_path / f"{name}.tar")]
    assert [store.key(*place) for place in places] == [sample["__key__"] for sample in theirs]
    records = np.concatenate([store.records(0), store.records(1)])
    assert records["label"].tolist() == [n % 5 for n in range(12)]
    assert records["width"].tolist() == [40 + n for n in range(12)]
    assert records["height"].tolist() == [30 + n for n in range(12)]
    assert "4 jpeg" in said and "4 png" in said and "4 webp" in said
    assert not (tmp_path / "unusual.jsonl").exists()


def test_long_names_in_pax_headers_and_another_output_folder(pictures, tmp_path):
    members = [(f"ordner {'ü' * 70}/{n:0100d}.{p[0]}", p[1]) for n, p in enumerate(pictures)]
    for name, file_format in (("p", tarfile.PAX_FORMAT), ("g", tarfile.GNU_FORMAT)):
        write_tar(tmp_path / "tars" / f"{name}.tar", members, format=file_format)
    before = files_in(tmp_path / "tars")
    manifest, _ = run_index(tmp_path / "tars" / "{p,g}.tar", output=tmp_path / "index")
    assert [shard.name for shard in manifest.shards] == ["p.tar", "g.tar"]
    assert files_in(tmp_path / "tars") == before and manifest.classes == ()
    store = ShardStore(tmp_path / "index")
    for shard in (0, 1):
        found = [store.picture(shard, index).tobytes() for index in range(12)]
        assert found == [picture for _, picture in pictures]
        assert (store.records(shard)["label"] == -1).all()


def test_the_first_picture_of_a_group_counts_and_neighbours_alone_are_a_group(pictures, tmp_path):
    (_, one), (_, two), (_, three) = pictures[:3]
    tar = write_tar(
        tmp_path / "0.tar",
        [
            *(("a.txt", b"text first"), ("a.JPG", one), ("a.png", two), ("a.cls", b" 2\n")),
            *(("b.seg.png", two), ("c.txt", b"no picture"), ("a.webp", three)),
        ],
    )
    shard = index_tar(tar)
    records = records_of(tmp_path)
    assert records["size"].tolist() == [len(one), len(two), len(three)]
    assert records["label"].tolist() == [2, -1, -1] and shard.labelled == 1
    assert shard.unusual == [("a.png", "not the first picture of its sample", False)]


def test_pictures_that_no_header_explains_stay_samples_without_a_size(pictures, tmp_path):
    tar = write_tar(tmp_path / "0.tar", [("a.jpg", b"<html>"), ("b.png", pictures[1][1])])
    shard = index_tar(tar)
    sizes = [(int(r["width"]), int(r["height"])) for r in records_of(tmp_path)]
    assert sizes == [(0, 0), (41, 31)]
    assert shard.unusual == [("a.jpg", "not a picture in a known format", True)]
    assert shard.formats == {"unknown": 1, "png": 1}


def test_decoding_leaves_out_what_fails(pictures, with_size, tmp_path):
    jpeg = pictures[0][1]
    members = [
        *(("a.jpg", jpeg[:400]), ("b.jpg", jpeg), ("c.jpg", b"<html>")),
        ("d.jpg", with_size(jpeg, 60_000, 60_000)),
    ]
    tar = write_tar(tmp_path / "0.tar", members)
    assert index_tar(tar).info.samples == 4
    shard = index_tar(tar, decode=True)
    assert records_of(tmp_path)["size"].tolist() == [len(jpeg)]
    reasons = {name: reason for name, reason, is_sample in shard.unusual if not is_sample}
    assert reasons.keys() == {"a.jpg", "c.jpg", "d.jpg"}
    assert reasons["a.jpg"].startswith("cannot be decoded") and "60000" in reasons["d.jpg"]


def test_a_gif_is_refused_because_it_is_not_decoded_at_run_time(draw_photo, encode, tmp_path):
    tar = write_tar(tmp_path / "0.tar", [("a.gif", encode(draw_photo(0), "GIF"))])
    shard = index_tar(tar)
    assert shard.info.samples == 0 and not (tmp_path / "0.index").exists()
    assert shard.unusual == [("a.gif", "a GIF, which DALI does not decode", False)]


def test_labels_may_be_names_in_the_json_and_get_one_number_in_all_shards(pictures, tmp_path):
    write_tar(tmp_path / "0.tar", plain_members(pictures[:2]))
    write_tar(tmp_path / "1.tar", plain_members(pictures[2:6], first=2))
    manifest, _ = run_index(tmp_path, label_key="name")
    assert manifest.classes == ("class 0", "class 1", "class 2")
    assert records_of(tmp_path)["label"].tolist() == [0, 1]
    assert records_of(tmp_path, "1")["label"].tolist() == [2, 0, 1, 2]
    # Another shard with a class that comes first in the alphabet moves all the others.
    write_tar(tmp_path / "2.tar", [("x.jpg", pictures[0][1]), ("x.json", b'{"name": "ape"}')])
    manifest, said = run_index(tmp_path, label_key="name")
    assert manifest.classes == ("ape", "class 0", "class 1", "class 2")
    assert [records_of(tmp_path, n)["label"].tolist() for n in "012"] == [
        *([1, 2], [3, 1, 2, 3], [0])
    ]
    assert "2 of them unchanged" in said
    check_shards.verify(VerifyConfig(shards=tmp_path, workers=1), Console(file=io.StringIO()))


def test_numbers_in_one_shard_and_names_in_another_are_all_names(pictures, tmp_path):
    one = index_tar(write_tar(tmp_path / "0.tar", plain_members(pictures[:3])))
    two = index_tar(write_tar(tmp_path / "1.tar", plain_members(pictures[:2], label="dog".format)))
    assert agree_on_classes([one, two], tmp_path) == ("0", "1", "2", "dog")
    assert records_of(tmp_path, "1")["label"].tolist() == [3, 3]
    # Without the dogs the others are numbers again.
    assert agree_on_classes([one], tmp_path) == ("0", "1", "2")


@pytest.mark.parametrize(
    ("data", "key", "label"),
    [
        *((b"7\n", None, "7"), (b"dog", None, "dog"), (b'{"y": 3}', "y", "3")),
        *((b'{"y": "cat"}', "y", "cat"), (b"{}", "y", None)),
    ],
)
def test_a_label_is_a_number_or_a_name(data, key, label):
    assert parse_label(data, key) == label


@pytest.mark.parametrize(
    ("data", "key"),
    [
        *((b"\xff\xfe", None), (b"", None), (b"[1]", "y"), (b'{"y": [1]}', "y"), (b"{", "y")),
        *((b'{"y": true}', "y"), (b'{"y": 1.5}', "y"), (b"[" * 100_000, "y")),
    ],
)
def test_what_is_no_label_is_named(data, key):
    with pytest.raises(ValueError, match=r"."):
        parse_label(data, key)


def test_only_plain_numbers_are_numbers_of_classes():
    assert [is_number(text) for text in ("0", "17", "007", "-1", "1e3", "²", "1000000", "")] == [
        *(True, True, False, False, False, False, False, False)
    ]


def test_an_unreadable_label_is_found_and_its_picture_stays(pictures, tmp_path):
    tar = write_tar(tmp_path / "0.tar", [("a.jpg", pictures[0][1]), ("a.json", b"{broken")])
    shard = index_tar(tar, label_key="y")
    assert (shard.info.samples, shard.labelled) == (1, 0)
    assert shard.unusual[0][1].startswith("label unreadable: ")


def test_a_truncated_tar_is_indexed_as_far_as_it_is_whole(pictures, tmp_path):
    tar = write_tar(tmp_path / "0.tar", plain_members(pictures))
    whole = index_tar(tar)
    cut = int(records_of(tmp_path)["block"][7]) * 512 + 100
    tar.write_bytes(tar.read_bytes()[:cut])
    manifest, said = run_index(tmp_path)
    assert manifest.samples == 7 and whole.info.samples == 12
    assert f"0.tar: cut off in its last member, at byte {cut}" in said
    (row,) = map(json.loads, (tmp_path / "unusual.jsonl").read_text().splitlines())
    assert row == {
        "shard": "0.tar",
        "member": "n0007.png",
        "reason": "cut off by the end of the tar",
        "sample": False,
    }
    store = ShardStore(tmp_path)
    assert [store.picture(0, n).size for n in range(7)] == [len(p) for _, p in pictures[:7]]


def test_hostile_members_are_listed_and_nothing_is_written_by_their_names(pictures, tmp_path):
    tar = tmp_path / "tars" / "0.tar"
    write_tar(tar, [("../out.jpg", pictures[0][1]), ("/tmp/x.jpg", b"1"), *plain_members(pictures)])
    with tarfile.open(tar, "a") as file:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "n0000.jpg"
        file.addfile(link)
    shard = index_tar(tar)
    assert {name: reason for name, reason, _ in shard.unusual} == {
        "../out.jpg": "its name leads out of the archive",
        "/tmp/x.jpg": "its name leads out of the archive",
        "link.jpg": "a link",
    }
    assert shard.info.samples == 12
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.index", "0.tar", "tars"]


def test_unchanged_tars_are_kept_touched_ones_compared_and_changed_ones_read(pictures, tmp_path):
    for name in "012":
        write_tar(tmp_path / f"{name}.tar", plain_members(pictures[: 4 + int(name)]))
    first, _ = run_index(tmp_path)
    os.utime(tmp_path / "1.tar", (1, 1))
    again, said = run_index(tmp_path)
    assert again == first and "2 of them unchanged" in said
    write_tar(tmp_path / "2.tar", plain_members(pictures[6:12]))
    changed, said = run_index(tmp_path)
    assert changed.shards[:2] == first.shards[:2] and changed.shards[2] != first.shards[2]
    store = ShardStore(tmp_path)
    assert store.picture(2, 0).tobytes() == pictures[6][1]
    assert run_index(tmp_path, decode=True)[1].count("0 of them unchanged") == 1


@pytest.mark.parametrize("damage", ["missing", "flipped", "torn journal"])
def test_an_index_that_was_damaged_is_made_again(pictures, tmp_path, damage):
    write_tar(tmp_path / "0.tar", plain_members(pictures))
    first, _ = run_index(tmp_path)
    path = tmp_path / "0.index"
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        path.write_bytes(data)
    else:
        journal = tmp_path / "indexed.jsonl"
        journal.write_bytes(journal.read_bytes()[:-30])
    again, said = run_index(tmp_path)
    assert again == first and "0 of them unchanged" in said


def make_problem(folder, pictures, problem):
    folder.mkdir()
    if problem == "empty":
        (folder / "0.tar").write_bytes(b"")
    elif problem == "no tar":
        (folder / "0.tar").write_bytes(b"<html>" * 500)
    elif problem == "no pictures":
        write_tar(folder / "0.tar", [("a.txt", b"1")])
    elif problem == "no headers":
        write_tar(folder / "0.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    else:
        write_tar(folder / "0.tar", plain_members(pictures))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("empty", r"0\.tar is empty"),
        ("no tar", r"0\.tar is not a tar"),
        ("no pictures", "no usable picture in 1 tars"),
        ("no headers", r"the first of 2 findings: 'a\.jpg' in 0\.tar: not a picture"),
    ],
)
def test_a_tar_without_pictures_is_one_line_and_leaves_no_manifest(
    pictures, tmp_path, problem, message
):
    make_problem(tmp_path / "tars", pictures, problem)
    with pytest.raises(InputError, match=message):
        run_index(tmp_path / "tars", output=tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert problem in ("no pictures", "no headers") or not (tmp_path / "out").exists()


def test_names_that_cannot_be_told_apart_are_refused(tmp_path, pictures):
    one = write_tar(tmp_path / "a" / "0.tar", plain_members(pictures))
    two = write_tar(tmp_path / "b" / "0.tar", plain_members(pictures))
    three = write_tar(tmp_path / "b" / "1.tar", plain_members(pictures))
    (tmp_path / "c").mkdir()
    for places, message in (
        ([one, two], "have the same name"),
        ([one, one], "is given twice"),
        ([one, three], "lie in 2 folders"),
        ([tmp_path / "c"], r"holds no \*\.tar"),
        ([tmp_path / "{0..2"], "a brace is not closed"),
        ([tmp_path / "x.tar"], "does not exist"),
        ([f"{tmp_path}/{{0..99999999999}}"], "more than 1,000,000 tars"),
        ([], "no tars"),
        (["pipe:cat x.tar"], "pipe: is not served"),
    ):
        with pytest.raises(InputError, match=message):
            find_tars(map(str, places))


def test_a_set_that_make_shards_packed_is_left_alone(shard_set):
    before = files_in(shard_set)
    with pytest.raises(InputError, match="already holds a finished set, made by tests"):
        run_index(shard_set)
    assert files_in(shard_set) == before


def test_two_runs_do_not_index_into_one_folder(tmp_path):
    with being_indexed(tmp_path):
        another = being_indexed(tmp_path)
        with pytest.raises(InputError, match="is being indexed by another run"):
            another.__enter__()
    assert list(tmp_path.iterdir()) == []


def start(folder, *flags):
    command = [sys.executable, PROGRAM, "index", folder, "--workers", "2", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **pipes)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in INTERRUPTS)]
)
def test_a_killed_run_leaves_whole_files_and_the_next_one_goes_on(pictures, tmp_path, number):
    tars, reference = tmp_path / "tars", tmp_path / "reference"
    for name in range(24):
        write_tar(tars / f"{name:02d}.tar", plain_members(pictures * 25))
    expected, _ = run_index(tars, output=reference, decode=True)
    output = tmp_path / "out"
    process = start(tars, "--output", output, "--decode")
    deadline = time.monotonic() + 60
    journal = output / JOURNAL_NAME  # gets its line when an index is written already
    while not (journal.exists() and journal.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    assert process.returncode != 0 and not (output / "manifest.json").exists()
    for path in output.glob("*.index"):
        assert path.read_bytes() == (reference / path.name).read_bytes()
    manifest, said = run_index(tars, output=output, decode=True)
    assert manifest.sha256 == expected.sha256
    assert " 0 of them unchanged" not in said


def test_a_wrong_command_line_is_one_line_and_exit_code_2(tmp_path, pictures):
    write_tar(tmp_path / "0.tar", plain_members(pictures))
    for flags in ([tmp_path / "nothing"], [tmp_path, "--workers", "-1"], [tmp_path, "--wrong"]):
        done = subprocess.run(
            [sys.executable, PROGRAM, "index", *flags], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_verifying_names_the_pictures_that_changed(own_set, flip_bit):
    console = Console(file=io.StringIO(), width=200)
    check_shards.verify(VerifyConfig(shards=own_set, workers=1), console)
    flip_bit(own_set, 1, 4)
    (own_set / "shard-000000.tar").unlink()
    (own_set / "shard-000002.index").write_bytes(b"")
    with pytest.raises(InputError, match="3 of 3 shards differ"):
        check_shards.verify(VerifyConfig(shards=own_set, workers=1), console)
    said = console.file.getvalue()
    assert "shard-000000.tar: cannot be read: No such file" in said
    assert "shard-000001.tar: picture 4 bee/picture013: crc32 " in said
    assert "shard-000002.tar: its index is not the one of the manifest" in said


def test_every_file_of_the_messy_pack_is_indexed_in_bounded_memory(test_data, tmp_path):
    with tarfile.open(test_data / "messy.tar") as messy:
        members = [
            (f"{number:04d}.jpg", messy.extractfile(member).read())
            for number, member in enumerate(messy)
            if member.isreg()
        ]
    assert len(members) > 150
    tar = write_tar(tmp_path / "0.tar", members)
    shard = index_tar(tar)
    gifs = sum("GIF" in reason for _, reason, _ in shard.unusual)
    assert shard.info.samples == len(members) - gifs and gifs >= 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded = index_tar(tar, decode=True)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert 90 < decoded.info.samples < len(members) - gifs - 20
    # The largest that is allowed, 128 million pixels as RGB beside what it was decoded from.
    assert grown_mib < 1200
