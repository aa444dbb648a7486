"""Members of tars: sound, odd, damaged and hostile ones."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from pipeline.program import InputError
from pipeline.tar_members import HEADER_LIMIT_BYTES, TarMembers, split_name


def tar_of(files, file_format=tarfile.USTAR_FORMAT, **changes):
    """A tar of ``{name: data}``; ``changes`` are set on every header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=file_format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in changes.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def header(name, **fields):
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def members_of(data):
    walk = TarMembers(io.BytesIO(data), len(data), "x.tar")
    return list(walk), walk.ending


FILES = {"a/0.jpg": b"first", "a/0.cls": b"3", "b.jpg": bytes(range(256)) * 5}
LONG = {"d" * 90 + f"/{n}-" + "ü" * 60 + ".jpg": b"x" * n for n in (0, 511, 512, 513)}


@pytest.mark.parametrize(
    ("files", "file_format"),
    [
        (FILES, tarfile.USTAR_FORMAT),
        (FILES, tarfile.PAX_FORMAT),
        (FILES, tarfile.GNU_FORMAT),
        (LONG, tarfile.PAX_FORMAT),
        (LONG, tarfile.GNU_FORMAT),
    ],
)
def test_every_member_has_its_whole_name_and_its_bytes(files, file_format):
    data = tar_of(files, file_format, mtime=1.5 if file_format == tarfile.PAX_FORMAT else 1)
    members, ending = members_of(data)
    assert {m.name: data[m.start : m.start + m.size] for m in members} == files
    assert ending == "" and all(m.start % 512 == 0 and not m.reason for m in members)


def test_folders_and_the_notes_of_webdataset_are_passed_over():
    files = {"__meta__/info.json": b"{}", "__notes__": b"", "a__b__/0.jpg": b"1"}
    data = header("a", type=tarfile.DIRTYPE) + tar_of(files)
    assert [m.name for m in members_of(data)[0]] == ["a__b__/0.jpg"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.FIFOTYPE, "no regular file"),
        (tarfile.CHRTYPE, "no regular file"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
    ],
)
def test_what_is_no_plain_file_is_skipped_with_a_reason(kind, reason):
    data = header("x.jpg", type=kind, linkname="/etc/passwd") + tar_of({"y.jpg": b"1"})
    assert [(m.name, m.reason) for m in members_of(data)[0]] == [("x.jpg", reason), ("y.jpg", "")]


@pytest.mark.parametrize("name", ["/x.jpg", "../x.jpg", "a/../../x.jpg", "a/.."])
def test_a_name_that_leads_out_of_the_archive_is_skipped(name):
    (found,), _ = members_of(tar_of({name: b"1"}))
    assert found.reason == "its name leads out of the archive"


def test_a_sparse_file_in_pax_records_is_skipped():
    records = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,5"}
    data = tar_of({"x.jpg": b"12345"}, tarfile.PAX_FORMAT, pax_headers=records)
    assert members_of(data)[0][0].reason == "a sparse file"


def test_a_size_above_that_of_the_file_is_a_cut_member_and_the_end():
    data = tar_of({"a.jpg": b"1"})[:1024] + header("b.jpg", size=2**50) + b"2" * 512
    members, ending = members_of(data)
    assert [(m.name, m.reason) for m in members] == [
        *(("a.jpg", ""), ("b.jpg", "cut off by the end of the tar"))
    ]
    assert ending == f"cut off in its last member, at byte {len(data)}"


def test_a_negative_size_ends_the_walk():
    sound = tar_of({"a.jpg": b"1"})[:1024]
    bad = bytearray(header("b.jpg"))
    bad[124:136] = b"\xff" * 11 + b"\x00"  # base 256, negative
    bad[148:156] = b" " * 8
    bad[148:156] = b"%06o\0 " % sum(bad)
    members, ending = members_of(sound + bytes(bad) + bytes(1024))
    assert [m.name for m in members] == ["a.jpg"] and ending.startswith("damaged at byte 1024")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_header_that_claims_gigabytes_is_not_read(kind):
    sound = tar_of({"a.jpg": b"1"})[:1024]
    claim = header("x", type=kind, size=3 * 2**30)
    members, ending = members_of(sound + claim + bytes(4096))
    assert [m.name for m in members] == ["a.jpg"]
    assert ending == f"damaged at byte 1024 (headers of more than {HEADER_LIMIT_BYTES} bytes)"


def test_a_chain_of_headers_without_a_member_ends_the_walk():
    chain = (header("x", type=tarfile.XHDTYPE, size=12) + b"12 path=abc\n".ljust(512, b"\0")) * 3000
    members, ending = members_of(tar_of({"a.jpg": b"1"})[:1024] + chain)
    assert [m.name for m in members] == ["a.jpg"] and ending.startswith("damaged at byte 1024")


def test_records_for_all_members_do_not_pile_up():
    walk = b""
    for number in range(50):
        body = b"900 comment%02d=%s\n" % (number, b"x" * 885)
        walk += header("g", type=tarfile.XGLTYPE, size=len(body)) + body.ljust(1024, b"\0")
        assert len(body) == 900
        walk += tar_of({f"{number}.jpg": b"1"})[:1024]
    members = TarMembers(io.BytesIO(walk), len(walk), "x.tar")
    names = [(m.name, len(members._tar.pax_headers), len(members._tar.members)) for m in members]
    assert names == [(f"{number}.jpg", 1, 1) for number in range(50)]


@pytest.mark.parametrize(
    ("cut", "names", "ending"),
    [
        (2048, ["a.jpg", "b.jpg"], "without its end mark"),
        (2040, ["a.jpg", "b.jpg"], "cut off in its last member, at byte 2040"),
        (2000, ["a.jpg"], "cut off in its last member, at byte 2000"),
        (1300, ["a.jpg"], "cut off in a header, at byte 1300"),
        (1024, ["a.jpg"], "without its end mark"),
    ],
)
def test_a_cut_tar_gives_what_is_whole_and_says_where_it_ends(cut, names, ending):
    data = tar_of({"a.jpg": b"1", "b.jpg": b"2" * 500})[:cut]
    members, said = members_of(data)
    assert [m.name for m in members if not m.reason] == names
    assert said.startswith(ending)


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end():
    data = bytearray(tar_of({"a.jpg": b"1", "b.jpg": b"2"}))
    data[1024 + 10] ^= 1
    members, ending = members_of(bytes(data))
    assert [m.name for m in members] == ["a.jpg"]
    assert ending == "damaged at byte 1024 (no tar header)"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x.tar is empty"),
        (b"\x1f\x8b" + bytes(600), "x.tar is compressed .gzip"),
        (b"<html>not found</html>" * 100, "x.tar is not a tar"),
        (b"short", "x.tar is not a tar"),
    ],
)
def test_what_is_no_tar_is_one_clear_line(data, message):
    with pytest.raises(InputError, match=message):
        members_of(data)


def test_an_archive_without_members_is_a_tar():
    assert members_of(bytes(10240)) == ([], "")


@given(st.data())
def test_damaged_bytes_never_crash_the_walk_nor_reach_past_the_file(data):
    sound = bytearray(tar_of(LONG | FILES, tarfile.PAX_FORMAT)[: 20 * 512])
    for _ in range(data.draw(st.integers(1, 8))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(sound[: data.draw(st.integers(1, len(sound)))])
    try:
        members, _ = members_of(damaged)
    except InputError:
        return
    assert all(m.reason or m.start + m.size <= len(damaged) for m in members)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "a.jpg",
            "a/b.seg.PNG",
            "./a.jpg",
            "a.b/c.jpg",
            "a..jpg",
            "a.",
            "a.b/c",
            ".a.jpg",
            "x y.jpg",
        )
    ],
)
def test_a_name_is_split_as_webdataset_does(name):
    prefix, suffix = base_plus_ext(name)
    assert split_name(name) == (None if prefix is None else (prefix, suffix.lower()))


@pytest.mark.parametrize("name", ["a/._photo.jpg", "a/.hidden.jpg", ".jpg", "a/.jpg"])
def test_a_hidden_file_has_no_key(name):
    assert split_name(name) is None
