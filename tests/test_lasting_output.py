"""Output whose reader is gone."""

import os

import pytest
from rich.console import Console

from eval.lasting_output import lasting


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_a_run_outlives_whoever_reads_it(reader):
    if reader == "gone":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    with os.fdopen(write, "w") as stream:
        console = Console(file=lasting(stream), force_terminal=True)
        for line in range(3):
            console.print(line)
        assert os.path.sameopenfile(stream.fileno(), os.open(os.devnull, os.O_WRONLY))


def test_what_can_be_read_is_written():
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream, os.fdopen(read) as other:
        Console(file=lasting(stream)).print("hello")
        assert other.readline() == "hello\n"
