"""Call a function in several processes that talk over gloo, and get what each of them returned.

The processes are started at the first call and serve the whole session.
"""

import atexit
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from tests.warm_python import warm_python

PATIENCE_S = 300.0  # for a machine that does other work too

_connections: list[Connection] = []


def run_in_processes(world, function, *arguments):
    """The results of ``function(*arguments)``, by rank; ``function`` is a module's own."""
    while len(_connections) < world:
        _connections.append(_start())
    with tempfile.TemporaryDirectory() as folder:
        task = (function.__code__.co_filename, function.__name__, arguments)
        for rank, connection in enumerate(_connections[:world]):
            connection.send_bytes(pickle.dumps((task, rank, world, f"file://{folder}/ranks")))
        answers = [_answer(connection) for connection in _connections[:world]]
    if not all(is_good for is_good, _ in answers):
        _connections.clear()  # they may wait for each other for long: others for the next test
    for rank, (is_good, result) in enumerate(answers):
        assert is_good, f"rank {rank}: {result}"
    return [result for _, result in answers]


def _start():
    ours, theirs = Pipe()
    process = subprocess.Popen([*warm_python(), __file__], stdin=theirs.fileno())
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # the last that is registered is the first to be called
    return ours


def _answer(connection):
    if not connection.poll(PATIENCE_S):
        return False, f"no answer within {PATIENCE_S:.0f} s"
    return pickle.loads(connection.recv_bytes())


def _serve(connection):
    torch.set_num_threads(1)
    while True:
        try:
            (path, name, arguments), rank, world, meeting = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            function = getattr(_module(path), name)
            dist.init_process_group(
                "gloo", meeting, timedelta(seconds=PATIENCE_S / 2), world_size=world, rank=rank
            )
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.send_bytes(pickle.dumps(answer))


@cache
def _module(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _serve(Connection(os.dup(0)))
