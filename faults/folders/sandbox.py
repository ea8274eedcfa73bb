"""One case in a forked process: what it may open, write, start and take, and the result.

An audit hook of Python's hears of every file that is opened, removed, renamed or made, of code that is run, of
processes and of connections. What a library opens in C it does not hear of: for that the files that must stay as they
are lie in a folder which the kernel watches (inotify), and whose contents are compared.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import resource
import signal
import struct
import sys
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from faults.commands import run
from siliang.cli.main import _as_siliang_error
from siliang.types import SiliangError

LOOK_S = 0.02
PROJECT = Path(__file__).resolve().parents[2]

Step = tuple[object, ...] | Callable[[], Any]  # a command line, or a call of the library
Expected = Literal["refused", "works", "either"]


@dataclass(frozen=True)
class Most:
    """What a case may take.

    Attributes:
        seconds: Of the processor's time, of its process and of those that it has started.
        idle_s: Without computing anything, as one that waits at a pipe for ever.
        wall_s: In all, which is much: this machine may have other work.
        memory_bytes: Above what the process has before the case.
    """

    seconds: float = 10.0
    idle_s: float = 12.0
    wall_s: float = 120.0
    memory_bytes: int = 10**9


MOST = Most()


@dataclass
class Site:
    """Where a case happens.

    Attributes:
        work: The current folder of the command, in which alone it may write.
        outside: What must not be opened, changed or removed.
        temporary: For temporary files.
        shared: Good folders, which may be read.
        mine: Further folders that may be read, such as what the command line names.
    """

    root: Path
    shared: Path
    mine: list[Path] = field(default_factory=list)

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    @property
    def evil(self) -> Path:
        """The stranger's folder."""
        return self.work / "evil"

    @property
    def mark(self) -> Path:
        """A file that a stranger's code makes when it runs."""
        return self.outside / "ran"


@dataclass(frozen=True)
class Case:
    """A stranger's folder and what is done with it.

    Attributes:
        kind: One of KINDS.
        build: Makes the folder and says what to run.
        expected: How the last step ends.
        shows: What has to be in what is printed.
        hides: What must not be printed, nor be in a file that was written.
        look: Says what is wrong with what was printed or written; None for nothing.
    """

    kind: str
    name: str
    build: Callable[[Site], Sequence[Step]]
    expected: Expected = "refused"
    shows: tuple[str, ...] = ()
    hides: tuple[str, ...] = ()
    look: Callable[[Site, str], str | None] = lambda site, text: None


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        ending: refused, works, or how it failed to end.
        faults: What it did that it may not; empty for a case that passed.
        text: What was printed.
        above_bytes: The most memory above what was there before.
    """

    ending: str
    faults: list[str] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    above_bytes: int = 0

    @property
    def passed(self) -> bool:
        return not self.faults


# ---- what may be read and written ----

READ_EVENTS = {"os.listdir": 0, "os.scandir": 0}
# the place of the path, and of the descriptor of the folder that it is seen from, in the event's arguments
WRITE_EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "shutil.rmtree": ((0, 1),),
}
FOLLOWING_EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
    "os.setxattr": ((0, None),),
    "os.removexattr": ((0, None),),
    "os.chflags": ((0, None),),
}
STARTING_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn", "webbrowser.open")
NETWORK_EVENTS = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
NAME_EVENTS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "urllib.Request")
PICKLED_MODULES = ("os", "posix", "nt", "subprocess", "sys", "shutil", "pty", "socket", "importlib", "runpy", "evil")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
    "/opt",
    "/sys",
    "/run",
    "/etc/ssl",
    "/etc/localtime",
    "/etc/mime.types",
)
SYSTEM_FILES = (
    "/etc/apache2",
    "/etc/httpd",
    "/etc/timezone",
    "/etc/os-release",
    "/etc/lsb-release",
    "/etc/ld.so.cache",
)
DEVICES = ("/dev/null", "/dev/urandom", "/dev/shm", "/dev/tty")
PROCESS = re.compile(
    r"/proc/(self|\d+)/(statm|maps|status|stat|cgroup|mounts|mountinfo|task|limits|smaps|smaps_rollup)(/|$)"
)


class Audit:
    """Hears of what this process does between `begin` and `end`. It cannot be taken off again: for forked processes.

    Args:
        report: Where it writes what should not be: a file that is open for appending.
    """

    def __init__(self, report: int) -> None:
        self._report = report
        self._on = False
        self._folder: int | None = None  # of the os.open that is under way
        self._open = os.open
        self._readable: list[str] = []
        self._writable: list[str] = []
        self._code: list[str] = []
        self._work = self._outside = ""
        sys.addaudithook(self._hear)

    def begin(self, site: Site) -> None:
        """From here on, for a case in that place."""
        real = os.path.realpath
        self._work = real(site.root)
        self._outside = real(site.outside)
        self._writable = [real(p) for p in (site.work, site.temporary, site.root / "cache")] + list(DEVICES)
        self._readable = [
            *self._writable,
            *(real(p) for p in (site.shared, *site.mine, PROJECT, sys.prefix, sys.base_prefix, *sys.path) if str(p)),
            *SYSTEM,
            *SYSTEM_FILES,
        ]
        self._code = [self._work, real(site.shared / "modules")]
        os.open = self._opened  # the event does not say which folder the name is seen from
        self._on = True

    def end(self) -> None:
        """What comes now is the harness's own."""
        self._on = False
        os.open = self._open

    def _opened(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        self._folder = dir_fd
        try:
            return self._open(path, flags, mode, dir_fd=dir_fd)
        finally:
            self._folder = None

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if not self._on:
            return
        what = self._wrong(event, given)
        if what is not None:
            if os.environ.get("FAULTS_TRACE"):
                self._on = False
                what += "\n" + "".join(traceback.format_stack(limit=14)[:-2])
                self._on = True
            os.write(self._report, (what[:4000] + "\0").encode("utf-8", "replace"))
            raise PermissionError(1, f"not in a stranger's folder: {what}")

    def _wrong(self, event: str, given: Any) -> str | None:
        if event == "open":
            return self._of_open(*given)
        if event in WRITE_EVENTS:
            return self._of_change(event, given, WRITE_EVENTS[event], follow=False)
        if event in FOLLOWING_EVENTS:
            return self._of_change(event, given, FOLLOWING_EVENTS[event], follow=True)
        if event in READ_EVENTS:
            where = self._place(given[0] if given else ".", None, follow=True)
            hidden = self._outside not in self._readable
            return f"lists {where}" if where is not None and hidden and _within(where, [self._outside]) else None
        if event == "exec":
            name = str(given[0].co_filename)
            return f"runs code of {self._shown(name)}" if _within(name, self._code) else None
        if event in ("import", "ctypes.dlopen"):
            name = given[1] if event == "import" else given[0]
            return f"loads {self._shown(str(name))}" if isinstance(name, str) and _within(name, self._code) else None
        if event == "pickle.find_class":
            return f"unpickles {given[0]}.{given[1]}" if str(given[0]).partition(".")[0] in PICKLED_MODULES else None
        if event == "subprocess.Popen":
            return None if _is_our_worker(given) else f"starts {given[0]!r} {str(given[1])[:200]}"
        if event in STARTING_EVENTS:
            return f"{event} {str(given[0])[:200]}"
        if event in NETWORK_EVENTS:
            import socket

            return None if given[0].family == socket.AF_UNIX else f"{event} {given[1:]}"
        if event in NAME_EVENTS:
            return f"{event} {str(given)[:200]}"
        return None

    def _of_open(self, path: Any, mode: str | None, flags: int) -> str | None:
        if isinstance(path, int):
            return None
        where = self._place(path, self._folder, follow=not flags & os.O_NOFOLLOW)
        if where is None:
            return None
        writes = bool(flags & WRITING) or (mode is not None and any(c in mode for c in "wax+"))
        if writes:
            return None if _within(where, self._writable) else f"opens for writing: {self._shown(where)}"
        if _within(where, [self._outside]) and self._outside not in self._readable:
            return f"reads {self._shown(where)}"
        if _within(where, self._readable) or PROCESS.match(where) or re.fullmatch(r"/proc/\w+(/\w+)?", where):
            return None
        return f"reads {self._shown(where)}"

    def _of_change(
        self, event: str, given: tuple[Any, ...], places: Sequence[tuple[int, int | None]], *, follow: bool
    ) -> str | None:
        for at, folder in places:
            descriptor = given[folder] if folder is not None and len(given) > folder else None
            where = self._place(given[at], descriptor, follow=follow)
            if where is not None and not _within(where, self._writable):
                return f"{event} {self._shown(where)}"
        return None

    def _place(self, path: Any, folder: int | None, *, follow: bool) -> str | None:
        """The file that a name leads to."""
        if isinstance(path, int) or path is None:
            return None
        name = os.fsdecode(path)
        if folder is not None and folder >= 0 and not name.startswith("/"):
            name = f"/proc/self/fd/{folder}/{name}"
        if follow:
            return os.path.realpath(name)
        parent, _, last = name.rpartition("/")
        return f"{os.path.realpath(parent or ('/' if name.startswith('/') else '.'))}/{last}"

    def _shown(self, where: str) -> str:
        return where.replace(self._work, "").lstrip("/") if where.startswith(self._work) else where


def _within(where: str, places: Sequence[str]) -> bool:
    return any(where == place or where.startswith(place.rstrip("/") + "/") for place in places)


def _is_our_worker(given: tuple[Any, ...]) -> bool:
    """A process of siliang's own: this Python, without modules of the current folder."""
    program, arguments = str(given[0]), list(map(str, given[1]))
    if program not in (sys.executable, os.path.realpath(sys.executable)) or len(arguments) < 2:
        return False
    modules = [a for a in arguments if a.startswith("siliang")]
    return bool(modules) or any("siliang" in a for a in arguments[1:3])


# ---- the kernel's own watch ----

IN_OPEN, IN_CREATE, IN_DELETE, IN_MODIFY, IN_MOVED, IN_ATTRIB = 0x20, 0x100, 0x200, 0x2, 0xC0, 0x4
EVENTS = {IN_OPEN: "opened", IN_CREATE: "made", IN_DELETE: "removed", IN_MODIFY: "changed", IN_ATTRIB: "changed"}


class Watch:
    """What happens in a folder, by whichever code."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._folders: dict[int, str] = {}
        mask = IN_OPEN | IN_CREATE | IN_DELETE | IN_MODIFY | IN_MOVED | IN_ATTRIB
        for parent in [folder, *(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())]:
            number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(parent), mask)
            self._folders[number] = str(parent.relative_to(folder.parent))

    def seen(self) -> list[str]:
        """The events, each once."""
        found: list[str] = []
        with suppress(BlockingIOError):
            while content := os.read(self._descriptor, 65536):
                at = 0
                while at < len(content):
                    number, mask, _, size = struct.unpack_from("iIII", content, at)
                    name = content[at + 16 : at + 16 + size].rstrip(b"\0").decode(errors="replace")
                    at += 16 + size
                    event = next((word for bit, word in EVENTS.items() if mask & bit), "moved")
                    found.append(f"{event}: {self._folders.get(number, '?')}/{name}")
        os.close(self._descriptor)
        return list(dict.fromkeys(found))


def contents(folder: Path) -> dict[str, str]:
    """The contents of a folder: a hash of each file, the target of each link."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file() and path.stat().st_size < 2**26:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


# ---- a case ----


def try_case(case: Case, site: Site, audit: Audit, report: int, most: Most = MOST) -> Outcome:
    """Builds a case and runs it, in this process, which is of no other use afterwards.

    Args:
        report: Where what is heard is written: a file that is open for appending.
    """
    import tempfile

    for folder in (site.work, site.outside, site.temporary, site.root / "cache"):
        folder.mkdir(parents=True)
    os.chdir(site.work)
    tempfile.tempdir = str(site.temporary)
    os.environ["SILIANG_CACHE"] = os.environ["XDG_CONFIG_HOME"] = str(site.root / "cache")
    if "datasets.config" in sys.modules:  # read from the environment when it was imported
        sys.modules["datasets.config"].HF_DATASETS_CACHE = site.root / "cache" / "datasets"  # type: ignore[attr-defined]
    steps = case.build(site)
    started = os.fstat(report).st_size
    before, inputs = contents(site.outside), contents(site.work) if case.hides else {}
    watch = Watch(site.outside)
    reset_peak()
    base, spent = resident_bytes(), _spent_s()
    ending, text, printed, faults = "works", "", "", []
    audit.begin(site)
    for step in steps:
        ending, output, wrong = _step(step)
        text += output
        printed += "" if callable(step) else output  # an error of the library's is printed by nobody yet
        faults += wrong
        if ending != "works":
            break
    audit.end()
    above, seconds = max(0, peak_bytes() - base), _spent_s() - spent
    heard = os.pread(report, 10**6, started).decode(errors="replace")
    faults += [line for line in dict.fromkeys(heard.split("\0")) if line]
    seen = [line for line in watch.seen() if site.outside not in site.mine or not line.startswith("opened")]
    faults += [f"outside: {line}" for line in seen]
    if (after := contents(site.outside)) != before:
        names = sorted({*before, *after} - {n for n in before if before[n] == after.get(n)})
        faults.append(f"outside: what is there has changed: {', '.join(names[:5])}")
    faults += _of_text(case, text, printed, site, inputs)
    if above > most.memory_bytes:
        faults.append(f"memory: {above / 1e6:,.0f} MB above the base")
    if seconds > most.seconds:
        faults.append(f"time: {seconds:.1f} s of the processor")
    if case.expected not in ("either", ending) and ending in ("works", "refused"):
        faults.append(f"{ending}, and not {case.expected}: {' '.join(text.split())[-300:]}")
    if not faults and (wrong := case.look(site, text)) is not None:
        faults.append(wrong)
    return Outcome(ending, faults, text[-4000:], seconds, above)


def _step(step: Step) -> tuple[str, str, list[str]]:
    """How a step ended, what it printed, and what is wrong with that."""
    if callable(step):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = step()
        except SiliangError as error:
            text = f"error[{error.code}]: {error}"
            return "refused", text + "\n", _of_error(text)
        except BaseException as error:
            known = _as_siliang_error(error, []) if isinstance(error, Exception) else None
            if known is not None:  # as the command would say it
                text = f"error[{known.code}]: {known}"
                return "refused", text + "\n", _of_error(text)
            where = traceback.extract_tb(error.__traceback__)
            place = next((f for f in reversed(where) if "/siliang/" in f.filename), where[-1])
            line = f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
            return "crashed", "".join(traceback.format_exc()[-3000:]), [f"no error of ours: {line}"]
        return "works", f"{result}\n" if isinstance(result, str) else "", []
    ended = run(*step, stdin=b"w1\n")
    text = ended.out + ended.err
    if ended.code == 2 or (
        ended.code == 1 and step[0] in ("check", "plan", "compare") and "internal error" not in ended.err
    ):
        return "refused", text, _of_error(ended.err[max(0, ended.err.find("error[")) :])
    if ended.code == 0:
        return "works", text, ["a traceback is printed"] if "Traceback (most recent" in text else []
    return "crashed", text, [f"ended with {ended.code}: {' '.join(ended.err.split())[-400:]}"]


def _of_error(text: str) -> list[str]:
    lines = text.strip().splitlines()
    if "Traceback (most recent" in text:
        return ["a traceback is printed"]
    if len(lines) > 4:
        return [f"an error of {len(lines)} lines: {' '.join(text.split())[:200]}"]
    return [f"an error of {len(text):,} characters: {text[:200]}"] if len(text) > 4500 else []


MARKS = "\n\t\u200b\u200c\u200d\ufeff\u00ad"


def controls(text: str) -> list[str]:
    """The characters of a text that a terminal obeys; joiners and the like are parts of words."""
    odd = [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in MARKS]
    return [f"U+{ord(c):04X}" for c in dict.fromkeys(odd)]


def _of_text(case: Case, text: str, printed: str, site: Site, inputs: dict[str, str]) -> list[str]:
    faults = []
    if found := controls(printed):
        faults.append(f"control characters are printed: {', '.join(found)}")
    faults += [
        f"not in the output: {word!r}; it is: {' '.join(text.split())[-300:]}"
        for word in case.shows
        if word not in text
    ]
    if case.hides:
        fresh = {n for n, h in contents(site.work).items() if inputs.get(n) != h}
        files = {
            n: (site.work / n).read_bytes()
            for n in fresh
            if (site.work / n).is_file() and not (site.work / n).is_symlink()
        }
        for word in case.hides:
            if word in text:
                faults.append(f"printed: {word!r}")
            faults += [f"written to {name}: {word!r}" for name, found in files.items() if word.encode() in found]
            faults += [f"in the name {name}: {word!r}" for name in fresh if word in name and name not in inputs]
    return faults


def reset_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def resident_bytes(pid: int | str = "self") -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def _spent_s() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


# ---- processes ----


@dataclass
class _Lane:
    """A forked process and the cases that it goes through."""

    pid: int
    pipe: int
    cases: list[tuple[int, Case]]
    base_bytes: int
    text: bytes = b""
    at: int = -1  # the case that is under way, by its place in `cases`
    since: float = 0.0
    spent: float = 0.0
    last: tuple[float, float] = (0.0, 0.0)  # when it was last seen to compute, and what it had spent by then
    report: Path = Path()


Found = Callable[[int, Case, Outcome], None]


def try_cases(
    cases: Sequence[Case],
    folder: Path,
    shared: Path,
    found: Found,
    *,
    lanes: int = 1,
    batch: int = 1,
    most: Most = MOST,
) -> None:
    """All cases, each in a forked process, so many processes at a time.

    Args:
        folder: An empty one.
        found: Hears what came of each.
        batch: Cases that one process goes through. One that has to be ended takes none of the others with it.
        most: What each may take.
    """
    waiting = [list(enumerate(cases))[i : i + batch] for i in range(0, len(cases), batch)]
    waiting.reverse()
    going: list[_Lane] = []
    while waiting or going:
        while waiting and len(going) < lanes:
            going.append(_begin(waiting.pop(), folder, shared, most))
        time.sleep(LOOK_S)
        for lane in list(going):
            over = _hear(lane, found)
            why = None if over else _too_much(lane, most)
            if why is None and not over:
                continue
            _kill(lane)
            going.remove(lane)
            _hear(lane, found)
            rest = lane.cases[max(lane.at, 0) :]
            if rest and (why is not None or over):
                number, case = rest[0]
                if lane.at >= 0:
                    found(number, case, Outcome("ended", [why or "its process is gone"]))
                    rest = rest[1:]
                elif why is None and over:
                    found(number, case, Outcome("ended", ["its process did not begin"]))
                    rest = rest[1:]
                if rest:
                    waiting.append(rest)
            os.close(lane.pipe)
            _remove(folder, [n for n, _ in lane.cases])
            lane.report.unlink(missing_ok=True)


def _begin(cases: list[tuple[int, Case]], folder: Path, shared: Path, most: Most) -> _Lane:
    read, write = os.pipe()
    report = folder / f"heard-{cases[0][0]}-{time.monotonic_ns()}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which the child does not use
        pid = os.fork()
    if pid:
        os.close(write)
        os.set_blocking(read, False)
        return _Lane(pid, read, cases, resident_bytes(), report=report, since=time.monotonic())
    code = 1
    try:
        os.setsid()
        os.close(read)
        _alone(report)
        heard = os.open(report, os.O_CREAT | os.O_RDWR | os.O_APPEND)
        audit = Audit(heard)
        for number, case in cases:
            site = Site(folder / f"case-{number}", shared)
            _tell(write, {"begin": number, "base": resident_bytes()})
            try:
                outcome = try_case(case, site, audit, heard, most)
            except Exception:
                outcome = Outcome("broken", [f"the case itself: {traceback.format_exc()[-3000:]}"])
                audit.end()
            _tell(write, {"end": number, **vars(outcome)})
            os.chdir(folder)
            _remove(folder, [number])
        code = 0
    finally:
        os._exit(code)


def _alone(report: Path) -> None:
    """Settings of a forked process."""
    import faulthandler

    import torch

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with the process that asks
    faulthandler.disable()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _tell(pipe: int, message: dict[str, Any]) -> None:
    content = json.dumps(message).encode() + b"\n"
    while content:
        content = content[os.write(pipe, content) :]


def _hear(lane: _Lane, found: Found) -> bool:
    """Reads the output of the process; returns whether it has ended."""
    over = False
    while True:
        try:
            content = os.read(lane.pipe, 65536)
        except BlockingIOError:
            break
        if not content:
            over = True
            break
        lane.text += content
    *lines, lane.text = lane.text.split(b"\n")
    places = {number: i for i, (number, _) in enumerate(lane.cases)}
    for line in lines:
        message = json.loads(line)
        if "begin" in message:
            lane.at, lane.since, lane.spent = places[message["begin"]], time.monotonic(), _tree_s(lane.pid)
            lane.base_bytes = message["base"]
            lane.last = (lane.since, lane.spent)
        else:
            number = message.pop("end")
            case = lane.cases[places[number]][1]
            found(number, case, Outcome(**message))
            del lane.cases[: places[number] + 1]
            places = {n: i for i, (n, _) in enumerate(lane.cases)}
            lane.at = -1
    return over


def _too_much(lane: _Lane, most: Most) -> str | None:
    now = time.monotonic()
    if lane.at < 0:
        return "its process does not begin" if now - lane.since > most.wall_s else None
    for pid in _family(lane.pid):
        if (above := resident_bytes(pid) - lane.base_bytes) > most.memory_bytes:
            return f"memory: more than {above / 1e6:,.0f} MB above the base"
    spent = _tree_s(lane.pid)
    if spent > lane.last[1] + 0.02:
        lane.last = (now, spent)
    if spent - lane.spent > most.seconds + 1:
        return f"time: ended after {spent - lane.spent:.0f} s of the processor"
    if now - lane.last[0] > most.idle_s:
        return f"time: it waits, and computes nothing for {most.idle_s:.0f} s"
    if now - lane.since > most.wall_s:
        return f"time: ended after {now - lane.since:.0f} s, of which it computed {spent - lane.spent:.1f} s"
    return None


def _family(pid: int) -> list[int]:
    """A process and those that it has started."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        for task in Path(f"/proc/{one}/task").glob("*"):
            with suppress(OSError):
                waiting += map(int, (task / "children").read_text().split())
    return found


def _tree_s(pid: int) -> float:
    ticks = 0
    for one in _family(pid):
        with suppress(OSError, IndexError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _kill(lane: _Lane) -> None:
    for pid in reversed(_family(lane.pid)):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with suppress(OSError):
        os.killpg(lane.pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(lane.pid, 0)


def _remove(folder: Path, numbers: list[int]) -> None:
    import shutil

    for number in numbers:
        shutil.rmtree(folder / f"case-{number}", ignore_errors=True)
