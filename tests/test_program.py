import errno
import os
import re
import signal

import pytest

from pipeline.program import WAYS_OUT, DataError, InputError, explain, run_program


@pytest.fixture(autouse=True)
def own_signals():
    """Put back what a program does when it is terminated."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class CheckpointError(Exception):
    """Stands for an exception that another package counts as wrong input."""


def ending(raised, capsys, *input_errors):
    """The exit code and what stands on standard error when the program raises this."""

    def main():
        raise raised

    with pytest.raises(SystemExit) as leaving:
        run_program(main, input_errors)
    return leaving.value.code, capsys.readouterr().err


def test_a_program_that_ends_well_does_not_leave_early():
    done = []
    run_program(lambda: done.append(1))
    assert done == [1]


def test_a_wrong_input_is_one_line_and_code_2(capsys):
    message = "--batch 7: give [an even] number :cat: " + "long " * 60
    code, text = ending(InputError(message), capsys)
    assert code == 2
    assert re.sub(r"\x1b\[[0-9;]*m", "", text) == f"error: {message}\n"


@pytest.mark.parametrize("number", sorted(WAYS_OUT), ids=lambda n: errno.errorcode[n])
def test_an_error_of_the_disk_is_one_line_with_a_way_out_and_code_2(number, capsys):
    code, text = ending(OSError(number, os.strerror(number), "/data/x"), capsys)
    assert code == 2 and text.count("\n") == 1
    assert "/data/x" in text and WAYS_OUT[number] in text


def test_an_existing_file_in_the_way_has_a_way_out():
    assert explain(FileExistsError(errno.EEXIST, "File exists", "/data/x"))


def test_an_interrupted_program_says_so_with_code_130(capsys):
    assert ending(KeyboardInterrupt(), capsys) == (130, "interrupted\n")


def test_a_terminated_program_unwinds_with_code_143():
    unwound = []

    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            unwound.append(1)

    with pytest.raises(SystemExit) as leaving:
        run_program(main)
    assert leaving.value.code == 143 and unwound == [1]


def test_further_errors_can_count_as_wrong_input(capsys):
    code, text = ending(CheckpointError("damaged"), capsys, CheckpointError)
    assert (code, text) == (2, "error: damaged\n")


@pytest.mark.parametrize("defect", [ZeroDivisionError("x"), CheckpointError("x"), OSError("x")])
def test_a_defect_keeps_its_traceback(defect):
    def main():
        raise defect

    with pytest.raises(type(defect)):
        run_program(main)


def test_a_traceback_of_wrong_input_can_be_had(monkeypatch):
    monkeypatch.setenv("MOCOSTREAM_TRACEBACK", "1")

    def main():
        raise InputError("wrong")

    with pytest.raises(InputError):
        run_program(main)


def test_of_many_processes_the_first_speaks_of_a_wrong_input(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert ending(InputError("wrong"), capsys) == (2, "")


def test_every_process_speaks_of_its_own_data(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    code, text = ending(DataError("100 bad samples"), capsys)
    assert code == 2 and text == "[rank 3] error: 100 bad samples\n"
