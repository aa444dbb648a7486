import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.program import InputError
from pipeline.sources import image_folder, keys_of, shuffled, walk_files

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


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_sub_folders_are_the_classes_in_alphabetical_order(tmp_path):
    source = image_folder(touch(tmp_path, "bee/1.jpg", "ant/2.png", "ant/deep/er/3.webp"))
    assert source.classes == ["ant", "bee"]
    found = {picture.relative: picture.label for picture in source.pictures}
    assert found == {"ant/2.png": 0, "ant/deep/er/3.webp": 0, "bee/1.jpg": 1}


def test_a_flat_folder_has_no_classes(tmp_path):
    source = image_folder(touch(tmp_path, "1.jpg", "2.jpg"))
    assert source.classes == [] and {picture.label for picture in source.pictures} == {-1}


def test_a_folder_with_some_pictures_outside_of_classes_has_no_classes(tmp_path):
    source = image_folder(touch(tmp_path, "ant/1.jpg", "2.jpg"))
    assert source.classes == [] and {picture.label for picture in source.pictures} == {-1}


def test_a_class_without_a_picture_is_none(tmp_path):
    assert image_folder(touch(tmp_path, "ant/1.jpg", "empty/readme.txt")).classes == ["ant"]


def test_files_that_are_no_pictures_by_name_are_listed_with_the_reason(tmp_path):
    source = image_folder(touch(tmp_path, "a/1.JPG", "a/notes.txt", "a/Thumbs.db", "a/.jpg"))
    assert [picture.relative for picture in source.pictures] == ["a/1.JPG"]
    assert dict(source.ignored) == {
        "a/notes.txt": "ending .txt",
        "a/Thumbs.db": "ending .db",
        "a/.jpg": "no ending, and does not begin like a picture",
    }


def test_a_file_without_an_ending_is_a_picture_if_it_begins_like_one(tmp_path, draw_photo, encode):
    touch(tmp_path, "README", "1.jpg")
    (tmp_path / "0b5ac2").write_bytes(encode(draw_photo(1)))
    (tmp_path / "damaged").write_bytes(encode(draw_photo(1), "PNG")[:20])
    names = [picture.relative for picture in image_folder(tmp_path).pictures]
    assert names == ["0b5ac2", "1.jpg", "damaged"]


def test_the_order_depends_on_the_names_alone(tmp_path):
    names = [f"{folder}/{number}.jpg" for folder in "ab" for number in range(5)]
    one = image_folder(touch(tmp_path / "one", *names))
    two = image_folder(touch(tmp_path / "two", *reversed(names)))
    assert [p.relative for p in one.pictures] == [p.relative for p in two.pictures] == names


def test_a_loop_of_links_ends_and_is_listed(tmp_path):
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "self").symlink_to("self")
    assert {path.as_posix(): why for path, why in walk_files(tmp_path)} == {
        "a/1.jpg": "",
        "a/loop": "link to a folder that is walked by another way",
        "a/self": "link to nothing",
    }


def test_a_link_to_a_folder_elsewhere_is_followed_once(tmp_path):
    touch(tmp_path, "elsewhere/1.jpg", "set/ant/2.jpg")
    for name in ("bee", "cat"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "set" / "aaa").symlink_to("ant", target_is_directory=True)
    source = image_folder(tmp_path / "set")
    assert [picture.relative for picture in source.pictures] == ["ant/2.jpg", "bee/1.jpg"]
    assert [name for name, _ in source.ignored] == [
        "aaa",
        "cat",
    ]  # "ant" itself goes before its link


def test_a_link_to_nothing_and_a_folder_named_like_a_picture_are_no_pictures(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/folder.jpg/2.jpg")
    (tmp_path / "a" / "dangling.jpg").symlink_to("nowhere.jpg")
    source = image_folder(tmp_path)
    assert [picture.relative for picture in source.pictures] == ["a/1.jpg", "a/folder.jpg/2.jpg"]
    assert source.ignored == [("a/dangling.jpg", "link to nothing")]


def test_a_pipe_named_like_a_picture_is_no_picture(tmp_path):
    touch(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "2.jpg")  # to open it would wait for ever
    source = image_folder(tmp_path)
    assert [picture.relative for picture in source.pictures] == ["1.jpg"]
    assert source.ignored == [("2.jpg", "not a file")]


def test_odd_names_give_unique_keys_of_plain_ascii():
    keys = keys_of(ODD_NAMES)
    assert all(re.fullmatch(r"[A-Za-z0-9_/-]+", key) and len(key) <= 89 for key in keys)
    assert len({key.lower() for key in keys}) == len(ODD_NAMES)
    assert keys[0] == "plain/one" and keys[1].startswith("with_space/a_b-")


def test_webdataset_skips_none_of_the_keys():
    # It takes members below a folder such as "__meta__" for notes of its own, and "кошка" is
    # five characters that a key cannot have.
    keys = keys_of(["кошка/1.jpg", "写真写真/2.jpg", "__pycache__/3.jpg", "((x))/4.jpg"])
    assert [key for key in keys if re.match(r"__[^/]*__($|/)", key)] == []


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20, unique=True))
def test_any_names_give_unique_keys_of_plain_ascii(names):
    keys = keys_of([f"{name}.jpg" for name in names])
    assert all(re.fullmatch(r"[A-Za-z0-9_/-]+", key) for key in keys)
    assert len({key.lower() for key in keys}) == len(names)


def test_a_key_does_not_depend_on_other_names_unless_they_share_it():
    assert keys_of(["a b.jpg"]) == keys_of(["a b.jpg", "c.jpg"])[:1]
    assert keys_of(["a.jpg"]) == ["a"] and keys_of(["a.jpg", "a.png"])[0] != "a"


def test_the_shuffle_keeps_every_picture_and_hangs_on_the_seed_alone(tmp_path):
    pictures = image_folder(touch(tmp_path, *(f"{n:03}.jpg" for n in range(100)))).pictures
    names = [picture.relative for picture in shuffled(pictures, 1)]
    assert sorted(names) == [picture.relative for picture in pictures] != names
    assert names == [picture.relative for picture in shuffled(pictures, 1)]
    assert names != [picture.relative for picture in shuffled(pictures, 2)]
    assert shuffled([], 1) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", r"absent does not exist: give a folder of pictures"),
        ("file", r"file is a file, not a folder"),
        ("empty", r"empty holds no pictures \(1 other files\): .*\.jpg"),
    ],
)
def test_a_source_without_pictures_is_an_input_error(tmp_path, name, message):
    touch(tmp_path, "file", "empty/notes.txt")
    with pytest.raises(InputError, match=message):
        image_folder(tmp_path / name)
