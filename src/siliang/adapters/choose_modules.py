"""Which modules of a base model are trained and saved whole: `modules_to_save`, the task's head, and what the model's
files lack."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from torch import nn

from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.methods.tied_ends import tied_for
from siliang.models.invented import invented_modules
from siliang.module_paths import inside, matching_paths, outermost, plain_modules
from siliang.types import OTHER_HEADS, TASK_HEADS, KindError, TargetError, TaskType, nearest


def find_saved_modules(model: nn.Module, names: list[str], *, required: list[str], nested: bool = True) -> list[str]:
    """The outermost modules whose path ends in one of `names`, PEFT's rule: `head` means lm_head too.

    Args:
        nested: Matches within a match are left to the outer one. PEFT trains that one, and writes the inner one.

    Raises:
        TargetError: One of `required` matches nothing; a match, unless `nested`, lies within another.
        KindError: A match is a list of modules, which does not compute.
    """
    modules = {p: m for p, m in plain_modules(model) if p}
    paths = list(modules)
    for name in required:
        if not any(_ends_in(p, name) for p in paths):
            hint = nearest(name, {p.rpartition(".")[2] for p in paths})
            raise TargetError(
                Bilingual(
                    f"modules_to_save: {name!r} matches no module of {type(model).__name__}.{hint}",
                    f"modules_to_save：{name!r} 与 {type(model).__name__} 的任何模块都不匹配。{hint.zh}",
                )
            )
    matches = [p for p in paths if any(_ends_in(p, name) for name in names)]
    found = outermost(matches)
    if not nested and (within := [p for p in matches if p not in found]):
        raise TargetError(
            Bilingual(
                f"modules_to_save means {within[0]} and a module around it: PEFT trains the outer one and "
                "writes the inner "
                "one, so the file lacks what was trained.",
                f"modules_to_save 同时指向 {within[0]} 和包含它的模块：PEFT 训练外层却只写出内层，"
                "文件里就缺了训练过的部分。",
            )
        )
    for path in found:
        if isinstance(modules[path], nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise KindError(
                Bilingual(
                    f"modules_to_save: {path} is a list of modules, which does not compute: name what is in it.",
                    f"modules_to_save：{path} 是模块列表，本身不参与计算：请写出其中的模块名。",
                )
            )
    return found


def names_of_saved(config: PeftConfig, names: Iterable[str], saved: list[str], paths: list[str]) -> list[str]:
    """The names of modules_to_save to write, so that PEFT finds the modules `saved` by them, and no target in these.

    Where names match within a match, PEFT puts one wrapper into another, and cannot read the file that it writes then:
    such names are left out. PEFT tunes no targets in a module that a whole part of its path names, and in no others:
    where a target is in another module, the path of that module is named too.
    """
    found = [n for n in names if not (hits := [p for p in paths if _ends_in(p, n)]) or any(p in saved for p in hits)]
    wanted = getattr(config, "target_modules", None) or []
    for path in saved:
        if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in found):
            continue
        if matching_paths("target_modules", [p for p in paths if inside(p, [path])], wanted):
            found.append(path)
    return sorted(found)


def _ends_in(path: str, name: str) -> bool:
    """Whether `name` of modules_to_save means `path` in PEFT."""
    return ("base_model.model." + path).endswith(name)


def choose_saved_modules(model: nn.Module, config: PeftConfig, *, lenient: bool) -> list[str]:
    """The paths of the modules that an adapter trains and saves whole; their names go into the config.

    Args:
        lenient: The config is a file's, which names what the file holds.

    Raises:
        TargetError: As `find_saved_modules`.
    """
    heads = TASK_HEADS.get(config.task_type, ()) if config.task_type else ()
    wanted = list(config.modules_to_save or ())
    if lenient and config.modules_to_save is not None:  # an empty list: the file holds no head
        heads = ()
    if config.task_type is TaskType.SEQ_CLS and heads:
        heads = (*heads, *(name for name in OTHER_HEADS if find_saved_modules(model, [name], required=[])))
    invented = invented_modules(model)
    if not lenient:
        heads = (*heads, *invented)
    if heads:
        config.modules_to_save = sorted({*wanted, *heads})
    required = [] if lenient else [name for name in wanted if name not in heads]  # of which a model has one or another
    found = find_saved_modules(model, [*wanted, *heads], required=required, nested=not lenient)
    if getattr(config, "ensure_weight_tying", False):
        _, tied = tied_for(model, None, config.modules_to_save)
        if tied is not None:
            found = [*found, *(path for path in tied if path not in found)]
            config.modules_to_save = tied.names(config.modules_to_save or ())
    if lenient and (lacking := [path for path in invented if not inside(path, found)]):
        warnings.warn(
            Bilingual(
                f"The base model's files lack {', '.join(lacking)}, and the adapter's do not hold it either: it is new "
                "and random here, so the adapter does not compute what it did where it was trained.",
                f"基座模型的文件中没有 {'、'.join(lacking)}，适配器的文件中也没有：它在这里是新的随机权重，"
                "因此适配器的计算结果与训练时不同。",
            ),
            stacklevel=5,
        )
    return found
