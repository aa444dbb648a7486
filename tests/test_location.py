from pathlib import Path

import pytest

from pipeline.location import as_location, http_form, tars_location
from pipeline.program import InputError


@pytest.mark.parametrize(
    "text", ["pipe:touch pwned", "PIPE:x", "file:///etc", "ftp://h/x", "s3:/b/x", "hf://o/n/x"]
)
def test_other_schemes_and_half_urls_are_refused_in_one_line(text):
    with pytest.raises(InputError, match=r"\A[^\n]+\Z"):
        as_location(text)


@pytest.mark.parametrize("text", ["https://me:secret@h/x", "https://h/x?token=secret"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(text):
    with pytest.raises(InputError, match="credentials belong") as caught:
        as_location(text)
    assert "secret" not in str(caught.value)


def test_folders_stay_paths_and_urls_lose_their_last_slash():
    assert as_location("/a/b:c") == Path("/a/b:c")
    assert as_location("./pipe:x") == Path("pipe:x")
    assert as_location("s3://bucket/set/") == "s3://bucket/set"


def test_a_set_on_the_hub_has_an_address_with_its_revision():
    assert http_form("hf://datasets/me/set@v1/a/b").endswith("/datasets/me/set/resolve/v1/a/b")
    assert http_form("hf://datasets/me/set").endswith("/datasets/me/set/resolve/main")


def test_a_remote_manifest_may_not_point_to_a_local_folder():
    assert tars_location("s3://b/set", "") == "s3://b/set"
    assert tars_location("s3://b/set", "tars") == "s3://b/set/tars"
    assert tars_location(Path("/set"), "https://h/tars") == "https://h/tars"
    for tars in ("/etc", "../x", "pipe:x"):
        with pytest.raises(InputError):
            tars_location("s3://b/set", tars)
