"""Custom Python code of a model: found, hashed, checked, and run only if the user has allowed it.

The code is read once. The same bytes in memory are hashed, checked (code_check.py) and run: nothing is imported from
the model's folder, from transformers' cache of such modules, or from any other file, so a change after the check has no
effect. transformers is never called with `trust_remote_code=True`.
"""

from __future__ import annotations

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

from transformers import PreTrainedConfig
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from siliang.hub import cached_file, only_cached
from siliang.language import Bilingual, local
from siliang.models.code_check import reachable
from siliang.models.extra import EXTRA
from siliang.paths import check_links
from siliang.safety.permissions import is_allowed
from siliang.safety.safe_json import JsonError, parse_json, read_json
from siliang.secrets import short_repr
from siliang.types import ModelError, OwnCodeError, first_line

CONFIGS = ("config.json", "tokenizer_config.json")  # files that name custom classes
PACKAGE = "siliang_own_code_"  # and the hash
NOT_HASHED = ".safetensors"  # they hold only tensors, and no code
LEFT_OUT = (".git", ".cache")  # folders of other programs; code may not name them
# files on the Hub, besides safetensors: weights that are not loaded for a model with custom code
NOT_FETCHED = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.ckpt")
MOST_BYTES = 2**24  # limit for a code file or a config


@dataclass(frozen=True)
class OwnCode:
    """The code of a model's folder, as it was read.

    Attributes:
        name: The model's name, as given.
        folder: The folder of its files; for a name on the Hub, in the Hub's cache.
        sha256: The hash of the names and bytes of all files, except safetensors and `LEFT_OUT`.
        sources: The modules that can be imported, by their dotted names in the folder.
        classes: The classes for transformers' Auto classes, by name: "module.Class".
    """

    name: str
    folder: Path
    sha256: str
    sources: dict[str, bytes]
    classes: dict[str, str]

    @property
    def files(self) -> list[str]:
        """The names of the code files."""
        return sorted(f"{name.replace('.', '/')}.py" for name in self.sources)

    @property
    def package(self) -> str:
        return PACKAGE + self.sha256

    def find_class(self, auto: str) -> type[Any]:
        """The class for one of transformers' Auto classes, from code that the user has allowed.

        Raises:
            OwnCodeError: The user has not allowed the code.
            ModelError: The model names no such class, or the code cannot be imported.
        """
        self.check_allowed()
        if auto not in self.classes:
            raise ModelError(
                Bilingual(
                    f"{self.name}: its code names no class for {auto}, but for {', '.join(self.classes)}.",
                    f"{self.name}：它的代码没有给出 {auto} 的类，只有 {'、'.join(self.classes)} 的。",
                )
            )
        module, _, name = self.classes[auto].rpartition(".")
        finder = _finder()
        finder.known[self.package] = self
        try:
            found = vars(importlib.import_module(f"{self.package}.{module}")).get(name)
        except Exception as error:  # custom code may raise any exception
            raise ModelError(
                Bilingual(
                    f"{self.name}: its code {module}.py cannot be imported: {first_line(error, kind=True)}",
                    f"{self.name}：它的代码 {module}.py 无法导入：{local(first_line(error, kind=True), 'zh')}",
                )
            ) from error
        if not isinstance(found, type):
            raise ModelError(
                Bilingual(
                    f"{self.name}: its code {module}.py holds no class {name}.",
                    f"{self.name}：它的代码 {module}.py 中没有类 {name}。",
                )
            )
        return add_generation_mixin_to_remote_model(found) if auto.startswith("AutoModel") else found

    def check_allowed(self) -> None:
        """Checks that the user has allowed this code.

        Raises:
            OwnCodeError: The user has not allowed it.
        """
        if is_allowed(self.sha256):
            return
        more, more_zh = "", ""
        if (left := len(self.files) - 3) > 0:
            more, more_zh = f" and {left} more", f" 等 {len(self.files)} 个文件"
        error = OwnCodeError(
            Bilingual(
                f"{self.name} has custom code ({', '.join(self.files[:3])}{more}), which can do anything that you can "
                "do.\nUse a model that transformers supports, or read the code and then add --allow-code "
                f"{self.sha256}",
                f"{self.name} 自带代码（{'、'.join(self.files[:3])}{more_zh}），运行后能做你能做的一切。"
                "\n请改用 transformers 支持的模型；或阅读代码之后加上 --allow-code "
                f"{self.sha256}",
            )
        )
        error.model, error.folder, error.sha256 = self.name, str(self.folder), self.sha256
        error.files = tuple(self.files)
        raise error


def find_own_code(name: str, revision: str | None = None) -> OwnCode | None:
    """The custom code of a model that transformers does not have; None if it has no code.

    Raises:
        ModelError: The code cannot be read, or is not completely in the model's folder.
    """
    folder = _folder(name, revision)
    if folder is None or not _is_unknown(_read(folder / CONFIGS[0])):
        return None
    return read_own_code(name, folder)


def find_tokenizer_code(name: str, revision: str | None = None) -> OwnCode | None:
    """The same for a tokenizer that transformers does not have, of any model."""
    folder = _folder(name, revision)
    if folder is None or not isinstance(_read(folder / CONFIGS[1]).get("auto_map"), dict | list):
        return None
    return read_own_code(name, folder)


def code_of(config: object) -> OwnCode | None:
    """The code with the config class of a model; None for a class of transformers."""
    package = type(config).__module__.partition(".")[0]
    return _finder().known.get(package) if package.startswith(PACKAGE) else None


def write_own_code(config: PreTrainedConfig, folder: Path) -> None:
    """Copies the custom code of a model, if any, into the folder of the saved model. The user has to allow it again for
    the new folder.
    """
    if (code := code_of(config)) is not None:
        for name, source in code.sources.items():
            path = folder / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source)


def read_own_code(name: str, folder: Path) -> OwnCode:
    """Reads and hashes a model's folder, and checks its code.

    Raises:
        ModelError: The code cannot be read, or is not completely in the folder.
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
                    raise ModelError(
                        Bilingual(
                            f"{name}: its {file} has more than {MOST_BYTES:,} bytes.",
                            f"{name}：它的 {file} 超过 {MOST_BYTES:,} 字节。",
                        )
                    )
                (configs if file in CONFIGS else code)[file] = content
                found = hashlib.sha256(content)
            else:
                found = hashlib.file_digest(opened, "sha256")
        digest.update(f"{file}\0".encode(errors="surrogateescape") + found.digest())
    classes = dict(_classes(name, configs))
    modules = {f[:-3].replace("/", "."): content for f, content in code.items() if re.fullmatch(r"(\w+/)*\w+\.py", f)}
    sources = reachable(name, {c.rpartition(".")[0] for c in classes.values()}, modules)
    return OwnCode(name, folder, digest.hexdigest(), sources, classes)


def _folder(name: str, revision: str | None) -> Path | None:
    """The folder of a model's configs and code. A model on the Hub is downloaded, at one commit."""
    if Path(name).is_dir():
        return Path(name)
    found = cached_file(name, CONFIGS[0], revision=revision)  # downloaded by load_config
    if found is None or not any("auto_map" in _read(found.parent / config) for config in CONFIGS):
        return None
    from huggingface_hub import snapshot_download

    try:
        commit = found.parent.name
        fetched = snapshot_download(
            name, revision=commit, ignore_patterns=[*NOT_FETCHED], local_files_only=only_cached(name)
        )
        return Path(fetched)
    except Exception as error:  # the Hub client has many exception classes
        raise ModelError(
            Bilingual(
                f"{name}: its code cannot be fetched: {first_line(error)}",
                f"{name}：无法取得它的代码：{local(first_line(error), 'zh')}",
            )
        ) from None


def _read(path: Path) -> dict[str, object]:
    try:
        values = read_json(path, foreign=True)
    except (OSError, JsonError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_unknown(config: dict[str, object]) -> bool:
    code = config.get("auto_map")
    kind = config.get("model_type")
    return (
        isinstance(code, dict)
        and bool(code)
        and not (isinstance(kind, str) and (kind in CONFIG_MAPPING or kind in EXTRA))
    )


def _classes(name: str, configs: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    """The classes that a model's files name, each as "module.Class" of the folder.

    Raises:
        ModelError: A file names something else.
    """
    for file, content in configs.items():
        try:
            auto_map = parse_json(content.decode("utf-8"), foreign=True)["auto_map"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(auto_map, list):  # the format of old tokenizers
            auto_map = {"AutoTokenizer": auto_map}
        if not isinstance(auto_map, dict):
            raise ModelError(
                Bilingual(
                    f"{name}: auto_map in its {file} is not a mapping.", f"{name}：{file} 中的 auto_map 不是映射。"
                )
            )
        for auto, names in auto_map.items():
            for value in names if isinstance(names, list) else [names]:
                if value is None:
                    continue
                if not isinstance(value, str) or not re.fullmatch(r"[^\W\d]\w*\.[^\W\d]\w*", value):
                    raise ModelError(
                        Bilingual(
                            f"{name}: auto_map in its {file} names {short_repr(value)}, which is not a class "
                            "in the model's folder; code from elsewhere is never run.",
                            f"{name}：{file} 的 auto_map 中写有 {short_repr(value)}，它不是自己文件夹中的类；"
                            "来自别处的代码一律不运行。",
                        )
                    )
                yield str(auto), value  # a tokenizer has two classes: the second one is the fast one


class _Finder(MetaPathFinder, InspectLoader):
    """Imports the modules of custom code from memory.

    Attributes:
        known: The code, by package.
    """

    def __init__(self) -> None:
        self.known: dict[str, OwnCode] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module, if it is custom code."""
        package, _, module = fullname.partition(".")
        code = self.known.get(package)
        if code is None or not (module in code.sources or self.is_package(fullname)):
            return None
        return spec_from_loader(fullname, self, origin=_file(fullname), is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        """Whether the module is a package."""
        package, _, module = fullname.partition(".")
        return not module or any(name.startswith(f"{module}.") for name in self.known[package].sources)

    def get_source(self, fullname: str) -> str:
        """The source of the module; None for a folder."""
        package, _, module = fullname.partition(".")
        return self.known[package].sources.get(module, b"").decode("utf-8")

    def get_code(self, fullname: str) -> CodeType:
        """Compiles the module, after another check of the user's permission."""
        self.known[fullname.partition(".")[0]].check_allowed()
        source, file = self.get_source(fullname), _file(fullname)
        # tracebacks and torch.jit read the code that runs, not the files, which may have changed
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        return compile(source, file, "exec", dont_inherit=True)


def _file(fullname: str) -> str:
    """A file name for tracebacks that cannot exist."""
    return f"/dev/null/{fullname.replace('.', '/')}.py"


def _finder() -> _Finder:
    """The importer in `sys.meta_path`; it is added on first use."""
    found = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if found is None:
        found = _Finder()
        sys.meta_path.insert(0, found)
    return found
