"""The layers that methods tune where the user names none: PEFT's for the model types that it lists, and for every other
type of transformers a choice, or an error that proposes all-linear.
"""

import re
from typing import Any

import peft.utils.constants as of_peft
import pytest
from model_types import ALL_TYPES, NOT_BUILT, automatic_classes, build
from transformers.models.auto import modeling_auto

import siliang
from siliang.methods import METHODS
from siliang.methods.find_targets import find_targets
from siliang.methods.targets import (
    ADALORA_TARGETS,
    BEFT_TARGETS,
    FOURIERFT_TARGETS,
    IA3_FEEDFORWARD,
    IA3_TARGETS,
    LN_TARGETS,
    LORA_TARGETS,
    OSF_TARGETS,
    VBLORA_TARGETS,
    VERA_TARGETS,
    DefaultTargets,
)
from siliang.models.introspect import is_linear
from siliang.module_paths import ends_with
from siliang.types import TargetError

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PyTorch, about default configs

PEFTS: dict[str, DefaultTargets] = {
    "ADALORA": ADALORA_TARGETS,
    "BEFT": BEFT_TARGETS,
    "FOURIERFT": FOURIERFT_TARGETS,
    "IA3": IA3_TARGETS,
    "LNTUNING": LN_TARGETS,
    "LORA": LORA_TARGETS,
    "OSF": OSF_TARGETS,
    "VBLORA": VBLORA_TARGETS,
    "VERA": VERA_TARGETS,
}
# PEFT lists them, and transformers 5 has no such type
NOT_IN_TRANSFORMERS = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}
# LN tuning of PEFT copies embeddings and linear layers of LLaVA too, siliang's norms alone
OTHER_THAN_PEFT = {("LNTUNING", "llava")}


def listed(method: str) -> dict[str, list[str] | str]:
    return getattr(of_peft, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")


TYPES_OF_PEFT = sorted({model_type for method in PEFTS for model_type in listed(method)} - NOT_IN_TRANSFORMERS)


def matched(model: Any, names: list[str] | str) -> list[str]:
    paths = [path for path, _ in model.named_modules()]
    if isinstance(names, str):
        return [path for path in paths if re.fullmatch(names, path)]
    return [path for path in paths if any(ends_with(path, name) for name in names)]


@pytest.mark.parametrize("model_type", TYPES_OF_PEFT)
def test_the_layers_of_peft(model_type: str) -> None:
    model = build(model_type)
    for method, ours in PEFTS.items():
        if (wanted := listed(method).get(model_type)) is None or (method, model_type) in OTHER_THAN_PEFT:
            continue
        found = ours.find(model)
        assert sorted(found.paths) == sorted(matched(model, wanted)), method
    feedforward = of_peft.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type)
    if feedforward is not None:
        assert sorted(IA3_FEEDFORWARD.find(model).paths) == sorted(matched(model, feedforward))


def test_methods_have_the_table_that_peft_has_for_them() -> None:
    names = {"ln_tuning": "LNTUNING"}
    ours = {id(targets): method for method, targets in PEFTS.items()}
    for name, method in METHODS.items():
        theirs = f"TRANSFORMERS_MODELS_TO_{names.get(name, name.upper())}_TARGET_MODULES_MAPPING"
        if id(method.default_targets) in ours and hasattr(of_peft, theirs):
            table = listed(ours[id(method.default_targets)])
            assert all(table[t] == wanted for t, wanted in getattr(of_peft, theirs).items()), name


# ---- every type of transformers ----

# without attention, with one that is no linear layer, or with layers of other names
NO_DEFAULTS = {
    "axk2",
    "fnet",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "ibert",
    "squeezebert",
    "xlnet",
    "zaya",
}
RWKVS = ("rwkv", IA3_TARGETS)  # for LoRA PEFT lists it
NO_NORMS = {"dory", "hrm_text", "nanochat", "olmo"}  # or one without parameters
TEXT_HEADS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION")
SOME = {"albert", "deepseek_v3", "fnet", "llava", "longt5", "mamba", "modernbert", "moshi", "qwen3_next", "xlnet"}


def reads_text(model_type: str) -> bool:
    """Whether transformers has a model for texts of this type."""
    return any(model_type in getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in TEXT_HEADS)


def why_not_built(model_type: str) -> str | None:
    """Why the test cannot have a model of this type; None where it can."""
    return "no automatic class makes it" if not automatic_classes(model_type) else NOT_BUILT.get(model_type)


BUILT = [model_type for model_type in ALL_TYPES if why_not_built(model_type) is None]


@pytest.mark.parametrize("model_type", [t if t in SOME else pytest.param(t, marks=pytest.mark.long) for t in BUILT])
def test_every_type_has_default_targets_or_an_error_that_names_all_linear(model_type: str) -> None:
    try:
        model = build(model_type)
    except ImportError as error:
        pytest.skip(str(error).strip().partition("\n")[0])
    there = [m for m in model.modules() if is_linear(m)]
    for config, targets in ((siliang.LoraConfig(), LORA_TARGETS), (siliang.IA3Config(), IA3_TARGETS)):
        try:
            found = find_targets(model, config, is_linear, defaults=targets, outside=(), lenient=False)
        except TargetError as error:
            way = "set target_modules: all-linear, or name some" if there else "name them in target_modules"
            assert way in str(error)
            assert model_type in NO_DEFAULTS or not reads_text(model_type) or (model_type, targets) == RWKVS
            continue
        assert model_type not in NO_DEFAULTS
        # the config means these layers and no others, also when it is read from a file
        again = type(config)(target_modules=config.target_modules)
        assert find_targets(model, again, is_linear, defaults=targets, outside=(), lenient=False) == found
    if reads_text(model_type):
        assert bool(LN_TARGETS.find(model).paths) == (model_type not in NO_NORMS)


@pytest.mark.long
@pytest.mark.parametrize("model_type", NOT_BUILT)
def test_what_cannot_be_built_is_listed_rightly(model_type: str) -> None:
    with pytest.raises((AttributeError, TypeError, ValueError)):
        build(model_type)


def test_every_type_is_there() -> None:
    assert set(TYPES_OF_PEFT) <= set(BUILT)
    assert set(ALL_TYPES) >= set(NOT_BUILT)
    assert sum(reads_text(t) for t in BUILT) > 240
