"""Python code that a model brings along: found, hashed, looked through, and run only where the user has allowed it.

The code is read once. What is hashed, what is looked through and what is run are the same bytes in memory: nothing is
imported from the model's folder, from transformers' own cache of such modules, or from any other file, so a change
after the check does not matter. transformers itself is never told to trust code.

The look through the code keeps the hash honest; it is no sandbox. Code that loads, fetches or starts other code would
not be what the user has allowed, so it is refused. Code that is allowed may do whatever this process may do.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import linecache
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from siliang.hub import cached_file, only_cached
from siliang.paths import check_links
from siliang.permissions import is_allowed
from siliang.safe_json import JsonError, parse_json, read_json
from siliang.secrets import short_repr, shortened
from siliang.types import ModelError, OwnCodeError, first_line

CONFIGS = ("config.json", "tokenizer_config.json")  # that name classes of a model's own
PACKAGE = "siliang_own_code_"  # and the hash
NOT_HASHED = ".safetensors"  # tensors, and nothing that could run
LEFT_OUT = (".git", ".cache")  # folders of other programs, which no code may name
# of the hub, beside the weights in safetensors: weights that are not loaded for a model with code of its own
NOT_FETCHED = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.ckpt")
MOST_BYTES = 2**24  # of a file of code, or a config

# Modules that load, fetch or start other code.
LOADERS = (
    *("importlib", "imp", "runpy", "pkgutil", "zipimport", "site", "builtins", "code", "codeop", "ensurepip", "pip"),
    *("ctypes", "cffi", "_ctypes", "subprocess", "multiprocessing", "pty", "concurrent.futures.process"),
    *("marshal", "pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"),
    *("socket", "ssl", "urllib", "urllib3", "http", "ftplib", "smtplib", "xmlrpc", "requests", "httpx", "aiohttp"),
    *("websockets", "paramiko", "fsspec", "huggingface_hub", "modelscope", "kernels", "datasets"),
    *("transformers.dynamic_module_utils", "transformers.utils.hub", "transformers.integrations.hub_kernels"),
    *(
        "torch.hub",
        "torch.package",
        "torch.load",
        "torch.jit.load",
        "torch.utils.cpp_extension",
        "torch.utils.model_zoo",
    ),
    *("torch.ops.load_library", "torch.classes.load_library", "torch.serialization", "numpy.ctypeslib", "numpy.load"),
    *("transformers.utils.cached_file", "transformers.utils.cached_files", "transformers.pipeline"),
    *("os.system", "os.popen", "os.fork", "os.forkpty", "os.startfile", "os.posix_spawn", "os.posix_spawnp"),
    *(f"os.{way}{end}" for way in ("exec", "spawn") for end in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
    *("sys.path", "sys.modules", "sys.meta_path", "sys.path_hooks", "sys.path_importer_cache", "sys.addaudithook"),
)
NAMES = {
    *("eval", "exec", "compile", "__import__", "globals", "breakpoint"),
    *("__file__", "__path__", "__loader__", "__spec__", "__builtins__"),
}
ATTRIBUTES = {
    *("__globals__", "__code__", "__subclasses__", "__builtins__", "__loader__", "__spec__", "__getattribute__"),
    *("load_library", "load_module", "exec_module", "import_module", "load_inline", "get_class_from_dynamic_module"),
    *("load_custom_generate", "load_url", "load_state_dict_from_url", "__import__", "__file__"),
}
ARGUMENTS = {"trust_remote_code", "allow_pickle", "custom_generate"}
# A text that is a path leading out of the folder, or the name of a file of code.
ELSEWHERE = re.compile(
    r"/[\w.-]+(/[\w. -]*)*|~[\w.-]*/.*|\\\\.*|[a-z]:[/\\].*|([\w./\\ -]*[/\\])?\.\.([/\\].*)?|file:.*"
    r"|(.*[/\\])?\.(git|cache)([/\\].*)?|\S*\.(py[cdoiwx]?|so|dll|dylib|pkl|pickle|pth|zip|egg|whl)",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class OwnCode:
    """The code of a model's folder, as it was read.

    Attributes:
        name: The model's name, as it was given.
        folder: Where its files lie; of a hub name, in the hub's cache.
        sha256: Over the names and bytes of all files but those of safetensors, and of `LEFT_OUT`.
        sources: The modules that can be imported, by their dotted names in the folder.
        classes: Of transformers' Auto classes by name: "module.Class".
    """

    name: str
    folder: Path
    sha256: str
    sources: dict[str, bytes]
    classes: dict[str, str]

    @property
    def files(self) -> list[str]:
        """The names of the files of code."""
        return sorted(f"{name.replace('.', '/')}.py" for name in self.sources)

    @property
    def package(self) -> str:
        return PACKAGE + self.sha256

    def find_class(self, auto: str) -> type[Any]:
        """The class for one of transformers' Auto classes, from code that the user has allowed.

        Raises:
            OwnCodeError: The user has not allowed it.
            ModelError: It names no such class, or cannot be imported.
        """
        self.check_allowed()
        if auto not in self.classes:
            raise ModelError(f"{self.name}: its code names no class for {auto}, but for {', '.join(self.classes)}.")
        module, _, name = self.classes[auto].rpartition(".")
        finder = _finder()
        finder.known[self.package] = self
        try:
            found = vars(importlib.import_module(f"{self.package}.{module}")).get(name)
        except Exception as error:  # a stranger's code raises whatever it likes
            raise ModelError(
                f"{self.name}: its code {module}.py cannot be imported: {first_line(error, kind=True)}"
            ) from error
        if not isinstance(found, type):
            raise ModelError(f"{self.name}: its code {module}.py holds no class {name}.")
        return add_generation_mixin_to_remote_model(found) if auto.startswith("AutoModel") else found

    def check_allowed(self) -> None:
        """The user has allowed this very code.

        Raises:
            OwnCodeError: The user has not.
        """
        if is_allowed(self.sha256):
            return
        more = f" and {len(self.files) - 3} more" if len(self.files) > 3 else ""
        error = OwnCodeError(
            f"{self.name} wants to run code of its own ({', '.join(self.files[:3])}{more}), which may do anything that "
            "you may do.\nUse a model that transformers knows; or, having read that code, add --allow-code "
            f"{self.sha256}"
        )
        error.model, error.folder, error.sha256 = self.name, str(self.folder), self.sha256
        error.files = tuple(self.files)
        raise error


def find_own_code(name: str, revision: str | None = None) -> OwnCode | None:
    """The code that a model asks to run, where transformers does not know the model itself; None where it asks for
    none.

    Raises:
        ModelError: It cannot be read, or it is not all in the model's folder.
    """
    folder = _folder(name, revision)
    if folder is None or not _is_unknown(_read(folder / CONFIGS[0])):
        return None
    return read_own_code(name, folder)


def find_tokenizer_code(name: str, revision: str | None = None) -> OwnCode | None:
    """The same for a tokenizer that transformers does not know, of whatever model."""
    folder = _folder(name, revision)
    if folder is None or not isinstance(_read(folder / CONFIGS[1]).get("auto_map"), dict | list):
        return None
    return read_own_code(name, folder)


def code_of(config: Any) -> OwnCode | None:
    """The code that a model's config is made with; None for one that transformers knows."""
    package = type(config).__module__.partition(".")[0]
    return _finder().known.get(package) if package.startswith(PACKAGE) else None


def write_own_code(config: Any, folder: Path) -> None:
    """Puts the code that a model was made with, if any, beside what is saved of it. To open that is to be allowed
    again: it is another folder.
    """
    if (code := code_of(config)) is not None:
        for name, source in code.sources.items():
            path = folder / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source)


def read_own_code(name: str, folder: Path) -> OwnCode:
    """Reads and hashes a model's folder, and looks through its code.

    Raises:
        ModelError: It cannot be read, or it is not all in the folder.
    """
    check_links(folder, ModelError)
    digest, code, configs = hashlib.sha256(), {}, {}
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    paths = {file: path for file, path in paths.items() if not set(LEFT_OUT) & set(file.split("/"))}
    for file in sorted(paths):
        if file.endswith(NOT_HASHED):
            continue
        with paths[file].open("rb") as opened:
            if file.endswith(".py") or file in CONFIGS:
                content = opened.read(MOST_BYTES + 1)
                if len(content) > MOST_BYTES:
                    raise ModelError(f"{name}: its {file} has more than {MOST_BYTES:,} bytes.")
                (configs if file in CONFIGS else code)[file] = content
                found = hashlib.sha256(content)
            else:
                found = hashlib.file_digest(opened, "sha256")
        digest.update(f"{file}\0".encode(errors="surrogateescape") + found.digest())
    classes = dict(_classes(name, configs))
    modules = {f[:-3].replace("/", "."): content for f, content in code.items() if re.fullmatch(r"(\w+/)*\w+\.py", f)}
    sources = _reachable(name, {c.rpartition(".")[0] for c in classes.values()}, modules)
    return OwnCode(name, folder, digest.hexdigest(), sources, classes)


def _folder(name: str, revision: str | None) -> Path | None:
    """Where a model's configs and code lie; a model of the hub is fetched for it, at one commit."""
    if Path(name).is_dir():
        return Path(name)
    found = cached_file(name, CONFIGS[0], revision=revision)  # load_config has fetched it
    if found is None or not any("auto_map" in _read(found.parent / config) for config in CONFIGS):
        return None
    from huggingface_hub import snapshot_download

    try:
        commit = found.parent.name
        fetched = snapshot_download(
            name, revision=commit, ignore_patterns=[*NOT_FETCHED], local_files_only=only_cached(name)
        )
        return Path(fetched)
    except Exception as error:  # of the hub's client, which raises many kinds
        raise ModelError(f"{name}: its code cannot be fetched: {first_line(error)}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path, foreign=True)
    except (OSError, JsonError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_unknown(config: dict[str, Any]) -> bool:
    code = config.get("auto_map")
    kind = config.get("model_type")
    return isinstance(code, dict) and bool(code) and not (isinstance(kind, str) and kind in CONFIG_MAPPING)


def _classes(name: str, configs: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    """The classes that a model's files name, each as "module.Class" of the folder.

    Raises:
        ModelError: One names something else.
    """
    for file, content in configs.items():
        try:
            said = parse_json(content.decode("utf-8"), foreign=True)["auto_map"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(said, list):  # of tokenizers of long ago
            said = {"AutoTokenizer": said}
        if not isinstance(said, dict):
            raise ModelError(f"{name}: auto_map in its {file} is no mapping.")
        for auto, named in said.items():
            for value in named if isinstance(named, list) else [named]:
                if value is None:
                    continue
                if not isinstance(value, str) or not re.fullmatch(r"[^\W\d]\w*\.[^\W\d]\w*", value):
                    raise ModelError(
                        f"{name}: auto_map in its {file} names {short_repr(value)}, which is no class of a file in its "
                        "own folder; code from elsewhere is never run."
                    )
                yield str(auto), value  # of a tokenizer's two, the fast one, which is the second


def _reachable(name: str, roots: set[str], modules: dict[str, bytes]) -> dict[str, bytes]:
    """The modules that `roots` import, directly or not, each looked through.

    Raises:
        ModelError: One is missing, or is code that does more than define a model.
    """
    found: dict[str, bytes] = {}
    waiting = sorted(roots)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        file = f"{module.replace('.', '/')}.py"
        if module not in modules:
            raise ModelError(f"{name}: its code needs {file}, which is not in its folder.")
        found[module] = modules[module]
        try:
            waiting += sorted(_look_through(module, modules))
        except _RefusedError as error:
            raise ModelError(
                f"{name}: its code {file} cannot be allowed: {error}. A hash stands for code that is all in the "
                "model's folder.\nUse a model that transformers knows, or take that part out of the code."
            ) from None
    return found


class _RefusedError(Exception):
    """Code that loads, fetches or starts other code."""


def _look_through(module: str, modules: dict[str, bytes]) -> set[str]:
    """The modules of the folder that a module imports.

    Raises:
        _RefusedError: It does more than define a model.
    """
    try:
        tree = ast.parse(modules[module])
        nodes = list(ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _RefusedError(f"it is not readable as Python ({first_line(error)})") from None
    needed: set[str] = set()
    known: dict[str, str] = {}  # what names of this file stand for
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                _check_name(node, alias.name)
                known[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                _check_name(node, f"{node.module}.{alias.name}")
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.ImportFrom):
            needed |= _imported(node, module, modules)
    texts = {id(part.value) for part in nodes if isinstance(part, ast.Expr)}  # docstrings, which nothing uses
    for node in nodes:
        if isinstance(node, ast.Name) and node.id not in known:
            if node.id in NAMES:
                raise _RefusedError(f"line {node.lineno} says {node.id}")
        elif isinstance(node, ast.Name | ast.Attribute):
            _check_name(node, _dotted(node, known))
        elif isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
            raise _RefusedError(f"line {node.value.lineno} says {node.arg}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            owner = _dotted(node.args[0], known).partition(".")[0] if node.args else ""
            if owner in ("os", "sys") or (len(node.args) > 1 and _says(node.args[1]) in NAMES | ATTRIBUTES):
                raise _RefusedError(f"line {node.lineno} takes a name out of {owner or 'an object'} by its text")
        elif isinstance(node, ast.Constant) and id(node) not in texts and _leads_elsewhere(_says(node)):
            raise _RefusedError(f"line {node.lineno} names {shortened(_says(node), 100)!r}")
    return needed


def _imported(node: ast.ImportFrom, module: str, modules: dict[str, bytes]) -> set[str]:
    """The modules of the folder that `from .x import y` means in `module`."""
    above = module.split(".")[: -node.level]
    if node.level > len(module.split(".")):
        raise _RefusedError(f"line {node.lineno} imports from outside of the folder")
    if node.module:
        return {".".join([*above, node.module])}
    return {".".join([*above, alias.name]) for alias in node.names}


def _check_name(node: ast.expr | ast.stmt, name: str) -> None:
    """A dotted name, or the last part of one, is none of those that load, fetch or start other code."""
    parts = name.split(".")
    refused = any(name == loader or name.startswith(f"{loader}.") for loader in LOADERS)
    if refused or not ATTRIBUTES.isdisjoint(parts) or parts[-1] == "*":
        raise _RefusedError(f"line {node.lineno} says {shortened(name, 100)}")


def _dotted(node: ast.expr, known: dict[str, str]) -> str:
    """The dotted name that an expression is, as far as it is one; ".x" for what is taken out of something else."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if not isinstance(node, ast.Attribute):
        return ""
    if isinstance(node.value, ast.Name) and node.value.id not in known:
        return f".{node.attr}"  # a variable's, which may be called as a module is
    return f"{_dotted(node.value, known)}.{node.attr}"


def _leads_elsewhere(text: str) -> bool:
    return bool(ELSEWHERE.fullmatch(text)) or text in ARGUMENTS or (text[:2] == "__" and text in NAMES | ATTRIBUTES)


def _says(node: ast.expr) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str | bytes):
        return ""
    return node.value if isinstance(node.value, str) else node.value.decode("latin-1")


class _Finder(MetaPathFinder, InspectLoader):
    """Imports the modules of code that was read, from memory.

    Attributes:
        known: The code by its package.
    """

    def __init__(self) -> None:
        self.known: dict[str, OwnCode] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's place, where it is one of ours."""
        package, _, module = fullname.partition(".")
        code = self.known.get(package)
        if code is None or not (module in code.sources or self.is_package(fullname)):
            return None
        return spec_from_loader(fullname, self, origin=_file(fullname), is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        """Whether other modules lie in it."""
        package, _, module = fullname.partition(".")
        return not module or any(name.startswith(f"{module}.") for name in self.known[package].sources)

    def get_source(self, fullname: str) -> str:
        """What was read of the module; nothing of a folder."""
        package, _, module = fullname.partition(".")
        return self.known[package].sources.get(module, b"").decode("utf-8")

    def get_code(self, fullname: str) -> CodeType:
        """The module, compiled, after one more look at the user's permission."""
        self.known[fullname.partition(".")[0]].check_allowed()
        source, file = self.get_source(fullname), _file(fullname)
        # tracebacks and torch.jit read the code that runs, and not what lies in the folder by then
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        return compile(source, file, "exec", dont_inherit=True)


def _file(fullname: str) -> str:
    """A name for tracebacks, of a file that cannot be."""
    return f"/dev/null/{fullname.replace('.', '/')}.py"


def _finder() -> _Finder:
    """The one among Python's finders; put there when it is first needed."""
    found = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if found is None:
        found = _Finder()
        sys.meta_path.insert(0, found)
    return found
