"""A store that is away when a run starts costs a message where the run's folder suffices."""

import re

import pytest

from eval.mirror_at_start import CopiesSeen, copies_at_start
from model.stopping import RESTART_CODE
from pipeline.program import InputError
from pipeline.remote_folder import RetryPolicy

MIRROR = "s3://bucket/run"
AWAY = {
    "refused": "does not serve .*tried 2 times",
    "failing": "does not serve .*503",
    "not ours": "cannot be read .*403",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    policy = RetryPolicy(attempts=2, first_s=0.01, longest_s=0.02, connect_s=1, stalled_s=2)
    monkeypatch.setattr("eval.mirror_at_start.AT_START", policy)


@pytest.fixture
def start(tmp_path):
    """``start(**what)`` looks at the mirror; gives its copies and what was said."""

    def look(*, has_local, is_to_go_on, url=MIRROR):
        said = []
        copies = copies_at_start(
            url,
            tmp_path,
            lambda line, style: said.append((style, line)),
            has_local=has_local,
            is_to_go_on=is_to_go_on,
        )
        return copies, said

    return look


@pytest.fixture(params=AWAY)
def reason(request, store_proxy, monkeypatch):
    """What is said of a store that is away in one of several ways."""
    if request.param == "refused":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    status = 403 if request.param == "not ours" else 503
    store_proxy.fault = store_proxy.write_fault = lambda *_: ("status", status)
    return AWAY[request.param]


def test_a_folder_with_checkpoints_is_gone_on_from(start, reason, tmp_path):
    copies, [(style, line)] = start(has_local=True, is_to_go_on=True)
    assert copies.steps == () and copies.away is not None and style == "yellow"
    assert re.search(f"{reason}.*going on from the checkpoints in {tmp_path}", line)
    assert "\n" not in line


def test_without_one_the_run_is_not_begun_anew(start, reason):
    with pytest.raises(
        InputError, match=f"{reason}.*has no intact checkpoint.*leave out"
    ) as raised:
        start(has_local=False, is_to_go_on=True)
    assert raised.value.exit_code == (2 if "403" in str(raised.value) else RESTART_CODE)


@pytest.mark.usefixtures("reason")
def test_a_new_run_needs_its_store(start):
    for has_local in (False, True):
        with pytest.raises(InputError, match=r"--mirror .* cannot be written") as raised:
            start(has_local=has_local, is_to_go_on=False)
        assert raised.value.exit_code == 2


def test_a_new_run_needs_a_store_that_can_be_read(start, store_proxy):
    store_proxy.fault = lambda *_: ("status", 503)
    with pytest.raises(InputError, match="cannot be read"):
        start(has_local=True, is_to_go_on=False)


def test_a_store_that_cannot_be_written_is_read_all_the_same(start, bucket, store_proxy):
    store_proxy.write_fault = lambda *_: ("status", 403)
    with pytest.raises(InputError, match=r"--mirror .* cannot be written"):
        start(has_local=False, is_to_go_on=True)
    bucket.write("run/step-000000003/manifest.json", b"{}")
    copies, [(_, line)] = start(has_local=False, is_to_go_on=True)
    assert copies == CopiesSeen((3,)) and "cannot be written" in line and "goes on" in line


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_is_a_wrong_input(start):
    with pytest.raises(InputError, match="no such bucket"):
        start(has_local=True, is_to_go_on=True, url="s3://nowhere/run")
