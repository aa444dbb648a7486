"""The loader's threads: they stand still when nobody takes, and nothing ends in a hang."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline.data_config import DataConfig
from pipeline.loader import READ_AHEAD_BATCHES, PairLoader
from pipeline.local_tar import MappedTar
from pipeline.torch_views import on_device
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
SOON_S = 60.0  # a machine may be busy; a hang is for ever

PROGRAM = """
import os, sys, threading
sys.path[:0] = [{root!r}]
import torch
from pipeline import loader as module, local_tar
from pipeline.data_config import DataConfig
from pipeline.loader import PairLoader
from pipeline.program import run_program

def loader():
    config = DataConfig(shards=sys.argv[1], image_px=24, window=16, threads=1, lanes=4,
                        engine=sys.argv[2], max_bad_share=1.0)
    return PairLoader(config, global_batch=8, seed=1, device=torch.device("cpu"))

def main():
{body}

run_program(main)
"""
FOR_EVER = """
    with loader() as batches:
        for batch in batches:
            print(batch.step, flush=True)
"""
STUCK_READER = """
    read, count = local_tar.MappedTar.read, iter(range(1000))
    def stuck(tar, start, size):  # as from a dead mount, after some batches
        if next(count) == 100:
            os.write(1, b"\\nstuck\\n")  # a line of its own, also amid one of the other thread
            threading.Event().wait()
        return read(tar, start, size)
    local_tar.MappedTar.read = stuck
    module.READER_END_S = 1.0
"""
FAILS_WITHOUT_CLOSING = """
    batches = loader()
    print(next(batches).step, flush=True)
    raise ZeroDivisionError
"""


@pytest.fixture(params=["dali", "kernels", "torchvision"])
def engine(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
    return request.param


@pytest.fixture
def start(shard_set, engine):
    """``start(python, body)`` gives a running program; it is killed if it hangs, and at the end."""
    started = []

    def start_it(python, body):
        code = PROGRAM.format(root=str(ROOT), body=body)
        command = [*python, "-c", code, str(shard_set), engine]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes, text=True, cwd=ROOT)
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        started.append((process, watchdog))
        return process

    yield start_it
    for process, watchdog in started:
        watchdog.cancel()
        process.kill()
        process.communicate()


def loader_of(folder, engine="torchvision"):
    config = DataConfig(
        shards=str(folder), image_px=24, window=16, threads=1, lanes=4, engine=engine
    )
    return PairLoader(config, global_batch=8, seed=1, device=torch.device("cpu"))


def ended(process):
    """Exit code, standard error; fails where the process goes on."""
    _, errors = process.communicate(timeout=SOON_S)
    return process.returncode, errors


def test_ctrl_c_ends_a_loop_over_batches(start):
    process = start(warm_python(), FOR_EVER)
    assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGINT)
    code, errors = ended(process)
    assert code == 130 and errors.strip() == "interrupted"


def test_ctrl_c_ends_a_loop_whose_reader_never_returns(start):
    process = start(warm_python(), STUCK_READER + FOR_EVER)
    assert "stuck\n" in process.stdout
    time.sleep(0.5)  # the consumer takes what is ready and waits
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "interrupted\n")


def test_an_exception_of_a_consumer_that_closes_nothing_ends_the_program(start):
    process = start([sys.executable], FAILS_WITHOUT_CLOSING)  # takes its modules down too
    assert process.stdout.readline() == "0\n"  # starting may take long
    code, errors = ended(process)
    assert code == 1 and errors.rstrip().endswith("ZeroDivisionError")


def in_thread(function):
    """What a call raised, in a thread that a hang cannot stop us from leaving."""
    met = []

    def call():
        try:
            function()
        except Exception as error:
            met.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(SOON_S)
    assert not thread.is_alive()
    return met


def test_a_producer_that_dies_is_an_error_at_every_next(shard_set, engine, monkeypatch):
    read, count = MappedTar.read, iter(range(1000))

    def dying(tar, start, size):
        if next(count) > 60:
            raise MemoryError("no memory for the reader")
        return read(tar, start, size)

    monkeypatch.setattr(MappedTar, "read", dying)
    with loader_of(shard_set, engine) as loader:
        for _ in range(3):
            (error,) = in_thread(lambda: [next(loader) for _ in range(50)])
            assert "no memory for the reader" in str(error)


def test_next_on_a_closed_loader_is_an_error_and_no_wait(shard_set, engine):
    loader = loader_of(shard_set, engine)
    next(loader)
    loader.close()
    (error,) = in_thread(lambda: next(loader))
    assert str(error) == "this loader is closed"


def test_a_consumer_that_waits_is_woken_when_another_thread_closes(shard_set, monkeypatch):
    is_open = threading.Event()
    read = MappedTar.read

    def waiting(*given):
        is_open.wait(SOON_S)
        return read(*given)

    monkeypatch.setattr(MappedTar, "read", waiting)
    loader = loader_of(shard_set)
    threading.Timer(0.5, lambda: (loader._stopping.set(), is_open.set())).start()
    (error,) = in_thread(lambda: next(loader))
    assert str(error) == "this loader is closed"
    loader.close()


def test_a_consumer_that_takes_nothing_stops_the_reader_soon(shard_set, engine):
    with loader_of(shard_set, engine) as loader:
        next(loader)
        # A busy machine may stand still for a while too.
        seen = [-1, loader.figures().read_images]
        while seen[-1] != seen[-2] and len(seen) < 20:
            time.sleep(0.5)
            seen.append(loader.figures().read_images)
        # Given, in the engine, in the queue, and one in the reader's hands.
        assert seen[-1] // 8 <= 1 + 4 + READ_AHEAD_BATCHES + 1
        before = loader.figures()
        time.sleep(1)
        standing = loader.figures().since(before)
        assert standing.read_images == 0 and standing.blocked_s > 0.5 * standing.seconds


def test_batches_keep_their_values_while_later_ones_are_made(shard_set, engine):
    with loader_of(shard_set, engine) as loader:
        kept = [next(loader) for _ in range(3)]
        copies = [batch.query_N3HW.clone() for batch in kept]
        [next(loader) for _ in range(8)]
        for batch, copy in zip(kept, copies, strict=True):
            assert torch.equal(batch.query_N3HW, copy)


def test_what_leaves_dali_is_not_copied(shard_set, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
    from pipeline import dali_views

    addresses = []
    to_torch = dali_views.to_torch

    def noting(output):
        addresses.append(output.as_tensor().data_ptr())
        return to_torch(output)

    monkeypatch.setattr(dali_views, "to_torch", noting)
    with loader_of(shard_set, "dali") as loader:
        batch = next(loader)
        assert [batch.query_N3HW.data_ptr(), batch.key_N3HW.data_ptr()] == addresses


def test_views_of_the_host_are_not_copied_on_their_way_to_a_cpu():
    view = torch.rand(2, 3, 8, 8)
    assert on_device(view, torch.device("cpu"), torch.float32) is view
    assert torch.equal(on_device(view, torch.device("cpu"), torch.float16), view.half())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_of_the_host_go_to_a_gpu_by_way_of_pinned_memory(monkeypatch):
    pinned, pin = [], torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(pin(t)) or pinned[-1])
    views = [torch.rand(64, 3, 224, 224) for _ in range(4)]
    moved = [on_device(view, torch.device("cuda", 0), torch.float16) for view in views]
    assert all(view.is_pinned() and view.dtype == torch.float16 for view in pinned)
    assert len(pinned) == 4
    for view, copy in zip(views, moved, strict=True):
        assert torch.equal(view.half(), copy.cpu())
