import json
import os
from pathlib import Path

import pytest

from pipeline.entry_list import Entry, Ignored
from pipeline.program import InputError
from pipeline.sources import image_folder


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def found_in(root):
    """The label of each picture of a folder."""
    return {e.name: e.label for e in image_folder(root).entries if isinstance(e, Entry)}


def ignored_in(root):
    """Why each other file is none."""
    return {e.name: e.reason for e in image_folder(root).entries if isinstance(e, Ignored)}


def test_sub_folders_are_the_classes(tmp_path):
    touch(tmp_path, "bee/1.jpg", "ant/2.png", "ant/deep/er/3.webp")
    assert found_in(tmp_path) == {
        "ant/2.png": "ant",
        "ant/deep/er/3.webp": "ant",
        "bee/1.jpg": "bee",
    }


def test_a_picture_outside_of_the_folders_has_no_label(tmp_path):
    assert found_in(touch(tmp_path, "ant/1.jpg", "2.jpg")) == {"ant/1.jpg": "ant", "2.jpg": None}


def test_a_class_without_a_picture_is_none(tmp_path):
    touch(tmp_path, "ant/1.jpg", "empty/readme.txt")
    assert set(found_in(tmp_path).values()) == {"ant"}


def test_files_that_are_no_pictures_by_name_are_listed_with_the_reason(tmp_path):
    touch(tmp_path, "a/1.JPG", "a/notes.txt", "a/Thumbs.db", "a/.jpg")
    assert list(found_in(tmp_path)) == ["a/1.JPG"]
    assert ignored_in(tmp_path) == {
        "a/notes.txt": "ending .txt",
        "a/Thumbs.db": "ending .db",
        "a/.jpg": "no ending, and does not begin like a picture",
    }


def test_a_file_without_an_ending_is_a_picture_if_it_begins_like_one(tmp_path, draw_photo, encode):
    touch(tmp_path, "README", "1.jpg")
    (tmp_path / "0b5ac2").write_bytes(encode(draw_photo(1)))
    (tmp_path / "damaged").write_bytes(encode(draw_photo(1), "PNG")[:20])
    assert list(found_in(tmp_path)) == ["0b5ac2", "1.jpg", "damaged"]


def test_the_order_depends_on_the_names_alone(tmp_path):
    names = [f"{folder}/{number}.jpg" for folder in ("a", "b", "b/c") for number in range(5)]
    one, two = touch(tmp_path / "one", *names), touch(tmp_path / "two", *reversed(names))
    assert list(found_in(one)) == list(found_in(two))
    assert sorted(found_in(one)) == sorted(names)


def test_a_json_file_beside_a_picture_is_its_metadata(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/1.json", "a/2.jpg", "a/2.jpg.json", "a/3.json", "a/4.png")
    (tmp_path / "a/1.json").write_text(json.dumps({"tags": ["cat"]}))
    entries = [e for e in image_folder(tmp_path).entries if isinstance(e, Entry)]
    side_cars = {e.name: e.metadata and Path(e.metadata).name for e in entries}
    assert side_cars == {"a/1.jpg": "1.json", "a/2.jpg": "2.jpg.json", "a/4.png": None}
    assert ignored_in(tmp_path) == {"a/3.json": "ending .json"}


def test_a_loop_of_links_ends_and_is_listed(tmp_path):
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "self").symlink_to("self")
    assert list(found_in(tmp_path)) == ["a/1.jpg"]
    assert ignored_in(tmp_path) == {
        "a/loop": "link to a folder that is walked by another way",
        "a/self": "link to nothing",
    }


def test_a_link_to_a_folder_elsewhere_is_followed_once(tmp_path):
    touch(tmp_path, "elsewhere/1.jpg", "set/ant/2.jpg")
    for name in ("bee", "cat"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "set" / "aaa").symlink_to("ant", target_is_directory=True)
    assert sorted(found_in(tmp_path / "set")) == ["ant/2.jpg", "cat/1.jpg"]
    # "ant" itself goes before the link to it.
    assert sorted(ignored_in(tmp_path / "set")) == ["aaa", "bee"]


def test_a_link_to_nothing_and_a_folder_named_like_a_picture_are_no_pictures(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/folder.jpg/2.jpg")
    (tmp_path / "a" / "dangling.jpg").symlink_to("nowhere.jpg")
    assert list(found_in(tmp_path)) == ["a/1.jpg", "a/folder.jpg/2.jpg"]
    assert ignored_in(tmp_path) == {"a/dangling.jpg": "link to nothing"}


def test_a_pipe_named_like_a_picture_is_no_picture(tmp_path):
    touch(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "2.jpg")  # to open it would wait for ever
    assert list(found_in(tmp_path)) == ["1.jpg"]
    assert ignored_in(tmp_path) == {"2.jpg": "not a file"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", r"absent does not exist: give a folder of pictures"),
        ("file", r"file is a file, not a folder"),
    ],
)
def test_a_source_that_is_no_folder_is_an_input_error(tmp_path, name, message):
    touch(tmp_path, "file")
    with pytest.raises(InputError, match=message):
        image_folder(tmp_path / name)
