"""A stand-in for the python program: `python -m siliang ...` begins where the slow imports are done already.

A process that imports torch, transformers and datasets needs 5 to 10 s for that alone. Here one server imports them
once. The stand-in, a small program that tests run in python's place, hands the server its arguments, environment,
folder and streams, and the server forks. The forked process is the command in every other respect: its own memory,
signals and exit code. Commands that the server cannot serve faithfully (other modules, other settings that are read at
import) are run by the real python.

    PYTHON                 the real one, for tests of importing itself
    stand_in(folder)       starts a server, and returns the path of its stand-in
"""

from __future__ import annotations

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
    "transformers.trainer",
    "siliang.compare.worker",
    "siliang.train.run",
    "siliang.use",
)
# Read when a module is imported: with another value the real python is needed. Launchers set two that are not: torch's
# elastic agent one for NCCL, which is not here; and OMP_NUM_THREADS, which the forked process applies itself.
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "MKL_", "OMP_", "ONEDNN_", "ATEN_", "PYTHON", "TORCH_", "LRU_CACHE", "LD_")
NOT_READ = ("OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING")

_CLIENT = """#!{python} -IS
import json, os, select, signal, socket, sys
arguments = [a for a in sys.argv[1:] if a not in ("-u", "-P")]
own = {defaults} | {{k: v for k, v in os.environ.items() if k.startswith({read_at_import}) and k not in {not_read}}}
if len(arguments) < 2 or arguments[0] != "-m" or arguments[1] not in {modules} or own != {own}:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([arguments[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
pid = int.from_bytes(server.recv(8), "big")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda n, _: os.kill(pid, n))
for number in (0, 1, 2):
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


def _serve(listening: socket.socket, alive: socket.socket) -> None:
    """Forks for each request. Returns, in the forked process, when it has become what was asked for."""
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
        if _fork_and_wait(asking):
            alive.close()
            return


def _fork_and_wait(asking: socket.socket) -> bool:
    """In the process that becomes the command: True. The other one waits for it, and says how it ended."""
    head, streams, _, _ = socket.recv_fds(asking, 8, 3)
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size and (part := asking.recv(size - len(request))):
        request += part
    pid = os.fork()
    if not pid:
        asking.close()
        _become(streams, *json.loads(request))
        return True
    for stream in streams:
        os.close(stream)
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


def _become(streams: list[int], arguments: list[str], environment: dict[str, str], folder: str) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if environment.get("OMP_NUM_THREADS") != os.environ.get("OMP_NUM_THREADS"):
        import psutil
        import torch

        threads = environment.get("OMP_NUM_THREADS") or psutil.cpu_count(logical=False) or 1
        torch.set_num_threads(int(threads))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = arguments
    sys.path[0] = folder


def main() -> None:
    """The server: called with the numbers of its sockets and the path of its stand-in."""
    import gc
    import importlib
    import runpy
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
    _serve(listening, alive)
    # a new process has these streams with the encoding of its own environment
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        number = getattr(sys, name).fileno()
        encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
        stream = open(number, mode, encoding=encoding, errors=errors or None, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
