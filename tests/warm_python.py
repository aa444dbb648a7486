"""``python PROGRAM``, started from a process that has imported everything: 0.2 s, not five.

A server imports what the programs here import, and forks for each command. The fork is a process
like any other: it has the folder, the environment and the files of the command, runs the program
as ``__main__``, waits for its threads and calls what is registered for the end. Signals that stop a
program are handed on to it. What such a start does not show is that a program's imports work from
any folder, what memory it takes alone, and whether the modules can be taken down in the end, which
takes seconds: tests of these start ``sys.executable``.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOOK_S = 0.02


@cache
def warm_python():
    """What stands in a command where ``sys.executable`` would: ``[*warm_python(), program, ...]``.

    The first call starts the server; it lives as long as this process.
    """
    folder = tempfile.TemporaryDirectory()
    path = f"{folder.name}/warm"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()  # who comes while it is importing waits
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def end():
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return [sys.executable, "-IS", __file__, path]


def main():
    """Serve, or hand a command to the server."""
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        ask(sys.argv[1], sys.argv[2:])


def ask(path, words):
    """Have a command run, and end as it does."""
    task = json.dumps([words, str(Path.cwd()), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [len(task).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(task)
        pid = int.from_bytes(received(server, 8), "big")
        for number in HANDED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int.from_bytes(received(server, 8), "big", signed=True)
    if code < 0:  # killed by a signal
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def received(connection, count):
    """So many bytes."""
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError("the other side of tests/warm_python.py is gone")
        data += part
    return data


def serve(listener):
    """Import, then fork for each command, until whoever started this is gone."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import_everything()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who watch a command
    while 0 not in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            watch(connection)
            return
        connection.close()
    os._exit(0)


def import_everything():
    """What programs and tests start with; nothing of it may start a thread."""
    for name in (
        "torch.utils.tensorboard", "eval.report", "eval.throughput", "pipeline.show_order", "train"
    ):  # fmt: skip
        importlib.import_module(name)


def watch(connection):
    """Fork once more, for the command itself, and say how it ends; goes on in the new process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    words, folder, environment = json.loads(received(connection, int.from_bytes(head, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        run(words)
        return
    for file in files:
        os.close(file)
    connection.sendall(pid.to_bytes(8, "big"))
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if select.select([connection], [], [], LOOK_S)[0]:  # whoever asked was killed
            os.kill(pid, signal.SIGKILL)
            time.sleep(LOOK_S)
    with suppress(BrokenPipeError):
        connection.sendall(os.waitstatus_to_exitcode(ended[1]).to_bytes(8, "big", signed=True))
    os._exit(0)


def run(words):
    """A file or ``-c`` and code, with its words, as the main module; then the process ends."""
    code = 0
    try:
        if words[0] == "-c":
            sys.argv, sys.path[:2] = ["-c", *words[2:]], [""]
            sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
        else:
            sys.argv, sys.path[:2] = words, [str(Path(words[0]).resolve().parent)]
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
