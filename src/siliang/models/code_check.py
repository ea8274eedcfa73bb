"""Checks a model's custom Python code before the user can allow it by its hash.

The check makes sure that the hash covers all code; it is not a sandbox. Code that loads, downloads or starts other code
is refused, because the hash does not cover that code. Allowed code can do anything that this process can do.
"""

from __future__ import annotations

import ast
import re

from siliang.language import Bilingual, local
from siliang.secrets import shortened
from siliang.types import ModelError, first_line, message_of

# Modules that load, download or start other code.
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
# A text that is a path out of the folder, or the name of a code file.
ELSEWHERE = re.compile(
    r"/[\w.-]+(/[\w. -]*)*|~[\w.-]*/.*|\\\\.*|[a-z]:[/\\].*|([\w./\\ -]*[/\\])?\.\.([/\\].*)?|file:.*"
    r"|(.*[/\\])?\.(git|cache)([/\\].*)?|\S*\.(py[cdoiwx]?|so|dll|dylib|pkl|pickle|pth|zip|egg|whl)",
    re.ASCII | re.IGNORECASE,
)


def reachable(name: str, roots: set[str], modules: dict[str, bytes]) -> dict[str, bytes]:
    """The modules that `roots` import, directly or indirectly, after a check of each.

    Raises:
        ModelError: A module is missing, or its code does more than define a model.
    """
    found: dict[str, bytes] = {}
    waiting = sorted(roots)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        file = f"{module.replace('.', '/')}.py"
        if module not in modules:
            raise ModelError(
                Bilingual(
                    f"{name}: its code needs {file}, which is not in its folder.",
                    f"{name}：它的代码需要 {file}，而文件夹中没有。",
                )
            )
        found[module] = modules[module]
        try:
            waiting += sorted(_look_through(module, modules))
        except _RefusedError as error:
            raise ModelError(
                Bilingual(
                    f"{name}: its code {file} cannot be allowed: {error}. The hash covers only code in the "
                    "model's folder.\nUse a model that transformers supports, or remove that part of the code.",
                    f"{name}：它的代码 {file} 不能授权：{local(message_of(error), 'zh')}。哈希只覆盖"
                    "模型文件夹中的代码。\n"
                    "请改用 transformers 支持的模型，或去掉代码中的这一部分。",
                )
            ) from None
    return found


class _RefusedError(Exception):
    """The code loads, downloads or starts other code."""


def _look_through(module: str, modules: dict[str, bytes]) -> set[str]:
    """The modules of the folder that a module imports.

    Raises:
        _RefusedError: The module does more than define a model.
    """
    try:
        tree = ast.parse(modules[module])
        nodes = list(ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _RefusedError(
            Bilingual(
                f"it is not readable as Python ({first_line(error)})",
                f"不是可读的 Python（{local(first_line(error), 'zh')}）",
            )
        ) from None
    needed: set[str] = set()
    known: dict[str, str] = {}  # imported name to dotted name, in this file
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
    texts = {id(part.value) for part in nodes if isinstance(part, ast.Expr)}  # docstrings have no effect
    for node in nodes:
        if isinstance(node, ast.Name) and node.id not in known:
            if node.id in NAMES:
                raise _RefusedError(
                    Bilingual(f"line {node.lineno} says {node.id}", f"第 {node.lineno} 行用了 {node.id}")
                )
        elif isinstance(node, ast.Name | ast.Attribute):
            _check_name(node, _dotted(node, known))
        elif isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
            raise _RefusedError(
                Bilingual(f"line {node.value.lineno} says {node.arg}", f"第 {node.value.lineno} 行用了 {node.arg}")
            )
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            owner = _dotted(node.args[0], known).partition(".")[0] if node.args else ""
            if owner in ("os", "sys") or (len(node.args) > 1 and _says(node.args[1]) in NAMES | ATTRIBUTES):
                raise _RefusedError(
                    Bilingual(
                        f"line {node.lineno} takes a name out of {owner or 'an object'} by its text",
                        f"第 {node.lineno} 行用文本从{local(owner, 'zh') if owner else '对象'}中取名称",
                    )
                )
        elif isinstance(node, ast.Constant) and id(node) not in texts and _leads_elsewhere(_says(node)):
            raise _RefusedError(
                Bilingual(
                    f"line {node.lineno} names {shortened(_says(node), 100)!r}",
                    f"第 {node.lineno} 行写有 {shortened(_says(node), 100)!r}",
                )
            )
    return needed


def _imported(node: ast.ImportFrom, module: str, modules: dict[str, bytes]) -> set[str]:
    """The modules of the folder that `from .x import y` imports in `module`."""
    above = module.split(".")[: -node.level]
    if node.level > len(module.split(".")):
        raise _RefusedError(
            Bilingual(f"line {node.lineno} imports from outside of the folder", f"第 {node.lineno} 行从文件夹之外导入")
        )
    if node.module:
        return {".".join([*above, node.module])}
    return {".".join([*above, alias.name]) for alias in node.names}


def _check_name(node: ast.expr | ast.stmt, name: str) -> None:
    """Refuses a dotted name, or a last part, that loads, downloads or starts other code."""
    parts = name.split(".")
    refused = any(name == loader or name.startswith(f"{loader}.") for loader in LOADERS)
    if refused or not ATTRIBUTES.isdisjoint(parts) or parts[-1] == "*":
        raise _RefusedError(
            Bilingual(
                f"line {node.lineno} says {shortened(name, 100)}", f"第 {node.lineno} 行用了 {shortened(name, 100)}"
            )
        )


def _dotted(node: ast.expr, known: dict[str, str]) -> str:
    """The dotted name of an expression, as far as it is one; ".x" for an attribute of another expression."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if not isinstance(node, ast.Attribute):
        return ""
    if isinstance(node.value, ast.Name) and node.value.id not in known:
        return f".{node.attr}"  # an attribute of a variable, which may have the name of a module
    return f"{_dotted(node.value, known)}.{node.attr}"


def _leads_elsewhere(text: str) -> bool:
    return bool(ELSEWHERE.fullmatch(text)) or text in ARGUMENTS or (text[:2] == "__" and text in NAMES | ATTRIBUTES)


def _says(node: ast.expr) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str | bytes):
        return ""
    return node.value if isinstance(node.value, str) else node.value.decode("latin-1")
