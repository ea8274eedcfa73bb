"""The initializations of LoRA: one file each, and this one table of them, by the value of `init_lora_weights`.

A row says what A, B and the base weight begin with, whether that is learned from data, and what follows for files,
quantized base models and other settings (`Initialization`). Everything else asks the row.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from siliang.language import Bilingual
from siliang.methods import corda, eva, loftq, lora_ga
from siliang.methods.lora_initialization import (
    ANY_VARIANT,
    USUAL,
    FromData,
    Initialization,
    InitializationSettings,
    normal,
    of_a_lower_rank,
    of_its_rank,
    uniform,
)
from siliang.methods.mica import mica, mica_of_table
from siliang.methods.olora import olora
from siliang.methods.orthogonal import check_even, orthogonal
from siliang.methods.pissa import pissa, pissa_niter
from siliang.secrets import short_repr
from siliang.types import ConfigError, nearest

MOST_ROUNDS = 100  # of PiSSA's iterations; the paper has 16

TWO_WEIGHTS = {
    "kasa_config": Bilingual("both change the base weight", "两者都会改动基座权重"),
    "alora_invocation_tokens": Bilingual(
        "before the invocation the base model computes, whose weight this initialization changes",
        "触发序列之前由基座模型计算，而这种初始化会改动它的权重",
    ),
}
LOST = {ANY_VARIANT: Bilingual("the weight that is left could not be saved", "剩余的权重无法保存")}
A_ALONE = Bilingual("MiCA trains A alone", "MiCA 只训练 A")

INITIALIZATIONS: dict[bool | str, Initialization] = {
    row.name: row
    for row in (
        USUAL,
        Initialization(False, draw_b=uniform),
        Initialization("gaussian", draw_a=normal),
        Initialization("pissa", of_weight=pissa, rank=of_a_lower_rank, changes_weight=True, apart=TWO_WEIGHTS),
        Initialization(
            "pissa_niter",
            numbered=True,
            of_weight=pissa_niter,
            rank=of_its_rank,
            changes_weight=True,
            apart=TWO_WEIGHTS,
        ),
        Initialization("olora", of_weight=olora, rank=of_a_lower_rank, changes_weight=True, apart=TWO_WEIGHTS),
        Initialization(
            "loftq",
            of_weight=loftq.loftq,
            of_table=loftq.loftq_of_table,
            settings=InitializationSettings("loftq_config", loftq.complete, loftq.options),
            rank=of_a_lower_rank,
            changes_weight=True,
            convertible=False,  # the quantization's error is of no low rank
            apart=TWO_WEIGHTS,
        ),
        Initialization("orthogonal", of_weight=orthogonal, check_ranks=check_even, in_file=True),
        Initialization(
            "mica",
            of_weight=mica,
            of_table=mica_of_table,
            rank=of_its_rank,
            frozen_b=True,
            in_file=True,
            apart={ANY_VARIANT: A_ALONE, "lora_bias": A_ALONE},
        ),
        Initialization(
            "eva",
            from_data=FromData(eva.learn, redistributes=lambda settings: settings.adjust_scaling_factors),
            settings=InitializationSettings("eva_config", lambda given: given or eva.EvaConfig()),
        ),
        Initialization(
            "corda",
            from_data=FromData(corda.learn, corda.learning_bytes, call="preprocess_corda"),
            settings=InitializationSettings("corda_config", lambda given: given or corda.CordaConfig()),
            changes_weight=True,
            apart=LOST,
        ),
        Initialization(
            "lora_ga",
            from_data=FromData(lora_ga.learn, lora_ga.learning_bytes, call="preprocess_loraga"),
            settings=InitializationSettings("lora_ga_config", lambda given: given or lora_ga.LoraGAConfig()),
            changes_weight=True,
            apart=LOST,
        ),
    )
}

# What a user may write, for errors.
NAMES = tuple(str(name) for name, row in INITIALIZATIONS.items() if isinstance(name, str) and not row.numbered)


def find_initialization(init: bool | str) -> Initialization:
    """The row of a value of `init_lora_weights`, with its number of iterations.

    Raises:
        ConfigError: There is none, or the number is too large.
    """
    row = INITIALIZATIONS.get(init)
    if row is not None and not row.numbered:
        return row
    base, _, number = str(init).rpartition("_")
    row = INITIALIZATIONS.get(base)
    if row is None or not row.numbered or re.fullmatch(r"\d{1,9}", number, re.ASCII) is None:
        raise ConfigError(
            Bilingual(
                f"init_lora_weights = {short_repr(init)}: must be true, false, {', '.join(map(repr, NAMES))} or "
                f"'pissa_niter_4'.{nearest(str(init), NAMES)}",
                f"init_lora_weights = {short_repr(init)}：只能是 true、false、{'、'.join(map(repr, NAMES))} 或 "
                f"'pissa_niter_4'。{nearest(str(init), NAMES).zh}",
            )
        )
    if int(number) > MOST_ROUNDS:
        raise ConfigError(
            Bilingual(
                f"init_lora_weights = {init!r}: must be at most {MOST_ROUNDS} iterations.",
                f"init_lora_weights = {init!r}：最多 {MOST_ROUNDS} 次迭代。",
            )
        )
    assert row.of_weight is not None
    return replace(row, name=init, of_weight=partial(row.of_weight, iterations=int(number)))


def with_settings(row: Initialization, settings: object) -> Initialization:
    """A row that computes with its settings."""
    if row.settings is None or not (options := row.settings.options(settings)):
        return row
    of_weight, of_table = (None if f is None else partial(f, **options) for f in (row.of_weight, row.of_table))
    return replace(row, of_weight=of_weight, of_table=of_table)
