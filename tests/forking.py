"""A stand-in for the python program: `python -m siliang ...` and `python -c ...` begin where the slow imports are done.

A process that imports torch, transformers and datasets needs 5 to 10 s for that alone. Here one server imports them
once. The stand-in, a small program that tests run in python's place, hands the server its arguments, environment,
folder, streams and open files, and the server forks. The forked process is the command in every other respect: its own
memory, signals and exit code. Commands that the server cannot serve faithfully (other modules, other settings that are
read at import) are run by the real python.

    PYTHON                 the real one, for tests of importing itself and of the memory of a process
    stand_in(folder)       starts a server, and returns the path of its stand-in
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

PYTHON = sys.executable
MODULES = ("siliang", "siliang.compare.worker", "bench", "torch.distributed.run", "accelerate.commands.launch")
_KEPT: list[socket.socket] = []
PRELOADED = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "rouge_score.rouge_scorer",
    "seqeval.metrics",
    "sklearn.metrics",
    "torch.distributed.run",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bloom.modeling_bloom",
    "transformers.models.llama.modeling_llama",
    "siliang.compare.worker",
    "siliang.train.run",
    "siliang.use.evaluate",
    "siliang.use.merge",
    "siliang.use.predict",
)
# Read when a module is imported: with another value the real python is needed. Four are not: one for NCCL, which
# torch's elastic agent sets and which is not here; one for downloads, which lm_eval sets when it is imported; and two
# that the forked process applies itself.
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "MKL_", "OMP_", "ONEDNN_", "ATEN_", "PYTHON", "TORCH_", "LRU_CACHE", "LD_")
NOT_READ = ("OMP_NUM_THREADS", "PYTHONIOENCODING", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "HF_XET_HIGH_PERFORMANCE")
MOST_FILES = 250  # that a message of a socket carries: 253

_CLIENT = """#!{python} -IS
import json, os, select, signal, socket, sys
arguments = [a for a in sys.argv[1:] if a not in ("-u", "-P")]
own = {defaults} | {{k: v for k, v in os.environ.items() if k.startswith({read_at_import}) and k not in {not_read}}}
match arguments:
    case ["-m", module, *_]:
        served = module in {modules}
    case ["-c", code, *_]:
        served = "multiprocessing.resource_tracker" not in code  # which imports nothing that is slow
    case _:
        served = False
files = [int(name) for name in os.listdir("/proc/self/fd")]
files = sorted(number for number in files if os.path.exists(f"/proc/self/fd/{{number}}"))  # not that of the list itself
if not served or len(files) > {most_files} or own != {own}:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([files, arguments, dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], files)
server.sendall(request)
pid = int.from_bytes(server.recv(8), "big")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda n, _: os.kill(pid, n))
for number in files:
    os.close(number)
status = int.from_bytes(server.recv(8), "big")
if os.WIFSIGNALED(status):
    signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) != signal.SIGKILL else None
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
"""


def stand_in(folder: Path) -> str:
    """Starts a server, which ends with this process, and returns the path of the program to run in python's place.

    Where processes cannot be forked and waited for in this way it is python itself.
    """
    if not hasattr(os, "pidfd_open"):
        return PYTHON
    address, client = folder / "server", folder / "python"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(address))
    listening.listen(64)
    defaults = _defaults()  # that a command sets, and hands to its own processes
    own = defaults | {k: v for k, v in os.environ.items() if k.startswith(READ_AT_IMPORT) and k not in NOT_READ}
    client.write_text(
        _CLIENT.format(
            python=PYTHON,
            read_at_import=READ_AT_IMPORT,
            not_read=NOT_READ,
            defaults=defaults,
            modules=MODULES,
            most_files=MOST_FILES,
            own=own,
            address=str(address),
        )
    )
    client.chmod(0o755)
    alive, ours = socket.socketpair()  # the server ends when ours is closed, however this process ends
    subprocess.run(
        [PYTHON, __file__, str(listening.fileno()), str(alive.fileno()), str(client)],
        pass_fds=(listening.fileno(), alive.fileno()),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )
    listening.close()
    alive.close()
    _KEPT.append(ours)
    return str(client)


def _defaults() -> dict[str, str]:
    """The variables that a command sets before its imports, where they are not set."""
    from siliang.environment import bound_kernel_caches, quieten_libraries

    with mock.patch.dict(os.environ, clear=True):
        quieten_libraries()
        bound_kernel_caches()
        return {k: v for k, v in os.environ.items() if k.startswith(READ_AT_IMPORT)}


def _serve(listening: socket.socket, alive: socket.socket) -> list[str]:
    """Forks for each request. Returns in the forked process, which has become what was asked for but for its module:
    the arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        ready, _, _ = select.select([listening, alive], [], [])
        if alive in ready:
            os._exit(0)
        asking, _ = listening.accept()
        if os.fork():
            asking.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listening.close()
        alive.close()
        return _fork_and_wait(asking)


def _fork_and_wait(asking: socket.socket) -> list[str]:
    """Returns in the process that becomes the command. The other one waits for it, and says how it ended."""
    head, received, _, _ = socket.recv_fds(asking, 8, MOST_FILES)
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size and (part := asking.recv(size - len(request))):
        request += part
    pid = os.fork()
    if not pid:
        asking.close()
        return _become(received, *json.loads(request))
    for number in received:
        os.close(number)
    ended = os.pidfd_open(pid)
    try:
        asking.sendall(pid.to_bytes(8, "big"))
        ready, _, _ = select.select([ended, asking], [], [])
        if ended not in ready:  # who asked is gone
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        asking.sendall(status.to_bytes(8, "big"))
    except OSError:
        os.kill(pid, signal.SIGKILL)
    finally:
        os._exit(0)


def _become(
    received: list[int], files: list[int], arguments: list[str], environment: dict[str, str], folder: str
) -> list[str]:
    # above all numbers that are wanted, so that none is taken by another on its way
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, max(files) + 1) for number in received]
    for number in received:
        os.close(number)
    for number, wanted in zip(moved, files, strict=True):
        os.dup2(number, wanted)
        os.close(number)
    if environment.get("OMP_NUM_THREADS") != os.environ.get("OMP_NUM_THREADS"):
        import psutil
        import torch

        threads = environment.get("OMP_NUM_THREADS") or psutil.cpu_count(logical=False) or 1
        torch.set_num_threads(int(threads))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder if arguments[0] == "-m" else ""
    return arguments


def main() -> None:
    """The server: called with the numbers of its sockets and the path of its stand-in."""
    import gc
    import importlib
    import runpy
    import types
    import warnings

    from siliang.cli.main import _quieten_libraries
    from siliang.environment import bound_kernel_caches

    if os.fork():  # no child of the tests' process: some tests kill all of these
        return
    listening, alive = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    _quieten_libraries()  # as each command does before its imports
    bound_kernel_caches()
    sys.executable = sys.argv[3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PRELOADED:
            importlib.import_module(name)
    gc.freeze()
    kind, what, *rest = _serve(listening, alive)
    # a new process has these streams with the encoding of its own environment
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        number = getattr(sys, name).fileno()
        encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
        stream = open(number, mode, encoding=encoding, errors=errors or None, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if kind == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *rest]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))


if __name__ == "__main__":
    main()
