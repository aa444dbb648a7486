import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline import direct_file as direct
from pipeline.direct_file import BUFFER_BYTES, DirectFile, direct_file


def noise(count):
    return np.random.default_rng(count).bytes(count)


@pytest.mark.parametrize("pieces", [(), (1,), (BUFFER_BYTES,), (700, 3 * BUFFER_BYTES, 0, 513)])
def test_a_file_holds_the_bytes_that_were_written_in_their_order(tmp_path, pieces):
    content = [noise(count) for count in pieces]
    with direct_file(tmp_path / "x") as file:
        for piece in content:
            file.write(piece)
    assert (tmp_path / "x").read_bytes() == b"".join(content)


def test_full_buffers_go_past_the_page_cache_and_the_end_need_not_be_a_block(tmp_path):
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    file = DirectFile(tmp_path / "x")
    file.write(noise(BUFFER_BYTES + 100))
    file._wait()
    assert fcntl.fcntl(file._handle, fcntl.F_GETFL) & os.O_DIRECT
    assert (tmp_path / "x").stat().st_size == BUFFER_BYTES
    file.finish()
    file.close()
    assert (tmp_path / "x").read_bytes() == noise(BUFFER_BYTES + 100)


def test_where_the_disk_takes_no_direct_writes_they_go_through_the_cache(tmp_path, monkeypatch):
    pwrite = os.pwrite

    def choosy(handle, data, place):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & direct.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(handle, data[:1000], place)  # and it takes a part only

    monkeypatch.setattr(os, "pwrite", choosy)
    with direct_file(tmp_path / "x") as file:
        file.write(noise(2 * BUFFER_BYTES + 5))
    assert (tmp_path / "x").read_bytes() == noise(2 * BUFFER_BYTES + 5)


@pytest.mark.parametrize("count", [10, 3 * BUFFER_BYTES])
def test_a_full_disk_is_an_error(count):
    # A device that is no file cannot even be opened for direct writes.
    with pytest.raises(OSError, match="No space left"), direct_file(Path("/dev/full")) as file:
        file.write(noise(count))
        file.write(noise(BUFFER_BYTES))
