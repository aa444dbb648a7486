import multiprocessing
import os
import queue
import time

import pytest

from pipeline import packing
from pipeline.entry_list import Entry
from pipeline.packing import IN_HAND, read_picture
from pipeline.validate import Limits, RefusedError


def decode_as_if(number, data, folder, log):
    """Hold the place of a large picture for a while and log when."""
    in_hand = packing._InHand(folder / f"note{number}")
    with packing._alone_if_large(data, folder, in_hand, 0):
        started = time.monotonic()
        time.sleep(0.3)
        log.put((started, time.monotonic()))


def lying_png(width, height):
    """A header alone."""
    return (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
        + width.to_bytes(4, "big")
        + height.to_bytes(4, "big")
        + b"\x08\x02\0\0\0"
    )


def test_large_pictures_are_decoded_one_at_a_time(tmp_path):
    (tmp_path / ".packing").mkdir()
    context = multiprocessing.get_context("spawn")
    log = context.Queue()
    arguments = (lying_png(6000, 6000), tmp_path, log)
    workers = [context.Process(target=decode_as_if, args=(n, *arguments)) for n in range(2)]
    for worker in workers:
        worker.start()
    (_, end), (start, _) = sorted(log.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert start >= end


def test_small_pictures_wait_for_nobody(tmp_path):
    decode_as_if(0, lying_png(600, 600), tmp_path, queue.SimpleQueue())  # no folder for a lock


def test_who_waits_for_a_large_picture_does_not_count_as_slow(tmp_path):
    in_hand = packing._InHand(tmp_path / "note")
    in_hand.note(7, float("inf"))
    assert IN_HAND.unpack((tmp_path / "note").read_bytes()) == (7, os.getpid(), float("inf"))
    in_hand.close()
    assert not (tmp_path / "note").exists()


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # a folder's are passed over, but a table can name anything
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(RefusedError, match="not a file"):
            read_picture(Entry("x.jpg", str(path), 0), Limits())
