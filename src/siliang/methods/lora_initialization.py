"""What an initialization of LoRA is: a row of the table in lora_initializations.py.

    y = W x + s B A x        at the start y is the base model's: B A = 0, or W' = W - s B A replaces W

Shapes: W (O, I), A (R, I), B (O, R).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import kaiming
from siliang.types import ConfigError


@dataclass(frozen=True)
class Factors:
    """The factors that an adapter on a layer begins with.

    Attributes:
        A: (R, I).
        B: (O, R); None for 0.
        W: W', the weight that replaces the layer's own; None where it stays, or follows from A and B.
    """

    A: Tensor
    B: Tensor | None = None
    W: Tensor | None = None


@dataclass(frozen=True)
class TunedLayers:
    """The linear layers that an adapter will be on.

    Attributes:
        layers: The base model's, by path.
        ranks, scalings: R and s of each.
    """

    layers: dict[str, nn.Module]
    ranks: dict[str, int]
    scalings: dict[str, float]


@dataclass(frozen=True)
class InitializationSettings:
    """The settings of an initialization.

    Attributes:
        field: The field of LoraConfig that holds them.
        complete: Checks them, and fills in PEFT's defaults. From what was given, which may be empty.
        options: What `of_weight` is called with of them.
    """

    field: str
    complete: Callable[..., object]
    options: Callable[..., dict[str, int]] = lambda settings: {}


@dataclass(frozen=True)
class FromData:
    """How an initialization is learned from data.

    Attributes:
        learn: A and B of each layer by path, from (model, tuned layers, settings, data).
        bytes: Memory that this takes beside the model and a batch.
        call: The function of PEFT's API by which a script does it before the adapter is attached; None where it is
            done afterwards.
        redistributes: The ranks follow from it too. From the settings: whether alpha changes with them.
    """

    learn: Callable[..., Mapping[str, Factors]]
    bytes: Callable[[TunedLayers], int] = lambda tuned: 0
    call: str | None = None
    redistributes: Callable[..., bool] | None = None


def uniform(weight: Tensor, r: int) -> None:
    """Kaiming uniform, as nn.Linear draws its weight."""
    kaiming(weight)


def normal(weight: Tensor, r: int) -> None:
    """Normal, with the deviation 1 / R."""
    nn.init.normal_(weight, std=1 / r)


def of_any_rank(r: int, directions: int, init: str) -> int:
    """R."""
    return r


def of_a_lower_rank(r: int, directions: int, init: str) -> int:
    """R, or all directions that the weight has."""
    return min(r, directions)


def of_its_rank(r: int, directions: int, init: str) -> int:
    """R.

    Raises:
        ConfigError: The weight has fewer directions.
    """
    check_rank(init, r, directions)
    return r


@dataclass(frozen=True)
class Initialization:
    """An initialization of LoRA.

    Attributes:
        name: The value of `init_lora_weights`.
        draw_a: Draws A of any kind of layer but an embedding, in place, from R.
        draw_b: The same of B; None: B = 0.

        of_weight: A, B and W' of a linear layer, from W in floating point, R and s; they replace what was drawn.
        of_table: The same of an embedding, from its table (V, D), for A (R, V) and B (D, R). None: as in PEFT, an
            embedding has the usual initialization.
        from_data: How A and B are learned from data; None where it needs none.
        settings: Its settings.
        numbered: A number of iterations follows the name: `pissa_niter_4`.
        rank: The rank on a linear layer, from R, how many directions its weight has, and the name for an error.
        check_ranks: Refuses ranks.

        changes_weight: W' replaces the base weight, which must not be quantized.
        frozen_b: B is not trained.
        in_file: A file of the adapter holds all of it, so that it is not computed for one that will be filled.
        convertible: The trained update W' + s B A - W is a product of two factors, and so can be saved as LoRA on W.
        apart: The settings it does not go together with, and why; `any variant` for all variants.
    """

    name: bool | str
    draw_a: Callable[[Tensor, int], object] = uniform
    draw_b: Callable[[Tensor, int], object] | None = None

    of_weight: Callable[..., Factors] | None = None
    of_table: Callable[..., Factors] | None = None
    from_data: FromData | None = None
    settings: InitializationSettings | None = None
    numbered: bool = False
    rank: Callable[[int, int, str], int] = of_any_rank
    check_ranks: Callable[[Iterable[int]], None] | None = None

    changes_weight: bool = False
    frozen_b: bool = False
    in_file: bool = False
    convertible: bool = True
    apart: Mapping[str, Bilingual] = field(default_factory=dict[str, Bilingual])

    @property
    def on_any_layer(self) -> bool:
        """A and B are drawn, whatever the layer is: the others need a linear layer's weight, or its inputs."""
        return self.of_weight is None and self.from_data is None

    @property
    def state_needed(self) -> bool:
        """W' does not follow from the base model: A and B as they began are kept with a checkpoint's adapter."""
        return self.changes_weight and self.from_data is not None


USUAL = Initialization(True)

ANY_VARIANT = "any variant"


def not_quantized(init: str) -> Bilingual:
    """Why an initialization that changes the base weight needs all of its bits."""
    return Bilingual(
        f"init_lora_weights = {init!r} starts from a base model in 16 or 32 bits, not a quantized one.",
        f"init_lora_weights = {init!r} 须从 16 位或 32 位的基座模型开始，不能是量化模型。",
    )


def check_rank(init: str, r: int, most: int) -> None:
    """
    Raises:
        ConfigError: A weight has fewer directions than such an initialization needs.
    """
    if r > most:
        raise ConfigError(
            Bilingual(
                f"init_lora_weights = {init!r}: r = {r}, and a layer has {most} rows or columns. Use a smaller r.",
                f"init_lora_weights = {init!r}：r = {r}，而有一层只有 {most} 行或列。请用更小的 r。",
            )
        )
