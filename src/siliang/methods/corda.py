"""CorDA: Context-Oriented Decomposition Adaptation (Yang et al., 2024, arXiv:2406.05223), an
initialization of LoRA from data.

    W C = U S V^T        C: the covariance of the layer's input
    A = sqrt(S_R / s) V_R^T C^-1,  B = U_R sqrt(S_R / s),  W' = W - s B A

With "ipm" the R largest singular values are taken, so that what the data uses most is trained; with "kpm" the R
smallest, so that it is kept. C is the mean of X^T X over the texts, where each text's X is divided by its largest
value, as PEFT has it; a part of its mean diagonal is added to it until it can be inverted.

Shapes: W (O, I), C (I, I), X (T, I), A (R, I), B (O, R).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.fields import check_fields
from siliang.methods.initialization import InitializationData
from siliang.methods.initialization_cache import read_cache, write_cache
from siliang.methods.lora_initialization import Factors, TunedLayers
from siliang.models.introspect import features
from siliang.models.quantized import float_weight
from siliang.types import ConfigError

DAMPING = 0.01  # of C's mean diagonal; doubled until the inverse is right to within MOST_ERROR
MOST_ERROR = 0.05
TOKENS_PER_INPUT = 128  # that PEFT's documentation advises: 256 texts of 2,048 tokens for 4,096 inputs


@dataclass
class CordaConfig:
    """CorDA's settings, with PEFT's names and defaults.

    Attributes:
        cache_file: Where the parts of U, S and V are kept, in safetensors, and read from where it is there.
        covariance_file: The same for C.
        corda_method: "ipm": train what the data uses most. "kpm": keep it.
        verbose: Without effect.
        use_float16_for_covariance: Leave C in the format of the layer's input.
        prune_temporary_fields: Without effect: nothing is left in the model.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        check_fields(self)


def learn(model: nn.Module, tuned: TunedLayers, settings: CordaConfig, data: InitializationData) -> dict[str, Factors]:
    """A and B of each layer, from texts of the training data."""

    def run() -> None:
        for text in data.singles(tokens=most_tokens(tuned.layers)):
            text.forward()

    return factors_of_layers(tuned, settings, run)


def factors_of_layers(
    tuned: TunedLayers,
    settings: CordaConfig,
    run: Callable[[], object],
    read: Mapping[str, nn.Module] | None = None,
) -> dict[str, Factors]:
    """A and B of each layer.

    Args:
        run: Runs the model, one text at a time.
        read: The layers whose inputs are read; None for those that are tuned.
    """
    layers = tuned.layers
    parts = read_cache(settings.cache_file, [f"{path}.{part}" for path in layers for part in "USV"], layers)
    if not parts:
        found = read_cache(settings.covariance_file, layers, layers)
        if not found:
            found = covariances(read or layers, run, wide=not settings.use_float16_for_covariance)
            write_cache(settings.covariance_file, found)
        for path, layer in layers.items():
            made = decompose(float_weight(layer), found.pop(path), tuned.ranks[path], settings.corda_method)
            parts |= {f"{path}.{part}": t for part, t in zip("USV", made, strict=True)}
        write_cache(settings.cache_file, parts)
    of_layer = {path: (parts[f"{path}.U"], parts[f"{path}.S"], parts[f"{path}.V"]) for path in layers}
    return {path: Factors(*factors(*USV, tuned.scalings[path])) for path, USV in of_layer.items()}


def learning_bytes(tuned: TunedLayers) -> int:
    """Of C of each layer, and the decomposition of the largest weight."""
    inputs = [features(layer)[0] for layer in tuned.layers.values()]
    largest = max((layer.get_parameter("weight").numel() for layer in tuned.layers.values()), default=0)
    return 4 * (sum(n * n for n in inputs) + 3 * largest)


@torch.no_grad()
def covariances(layers: Mapping[str, nn.Module], run: Callable[[], object], *, wide: bool = True) -> dict[str, Tensor]:
    """C of each layer, (I, I).

    Args:
        layers: The layers of the base model by path.
        run: Runs the model, one text at a time.
        wide: In fp32.

    Raises:
        ConfigError: The data does not reach a layer, or has values there that are no numbers.
    """
    total: dict[str, Tensor] = {}
    texts = dict.fromkeys(layers, 0)

    def hook(path: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            X = args[0].detach().flatten(0, -2)
            X = X.float() if wide else X
            X = X / X.max().abs()
            C = X.T @ X
            if not C.isfinite().all():
                raise ConfigError(
                    Bilingual(
                        f"CorDA: the input of {path} holds values that are no finite numbers.",
                        f"CorDA：{path} 的输入含有非有限值。",
                    )
                )
            total[path] = total[path] + C if path in total else C
            texts[path] += 1

        return add

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if unread := [path for path, n in texts.items() if not n]:
        raise ConfigError(
            Bilingual(
                f"CorDA: the data does not reach {unread[0]}: leave it out of target_modules.",
                f"CorDA：数据不经过 {unread[0]}：请从 target_modules 中去掉它。",
            )
        )
    return {path: C / texts[path] for path, C in total.items()}


@torch.no_grad()
def decompose(W_OI: Tensor, C_II: Tensor, r: int, method: Literal["ipm", "kpm"]) -> tuple[Tensor, Tensor, Tensor]:
    """U_R (O, R), S_R (R,) and V_R^T C^-1 (R, I), in fp32."""
    C, inverse = _invertible(C_II.float())
    U, S, Vh = torch.linalg.svd(W_OI.float() @ C, full_matrices=False)
    chosen = slice(None, r) if method == "ipm" else slice(-r, None)
    return U[:, chosen], S[chosen], (Vh @ inverse)[chosen]


def factors(U: Tensor, S: Tensor, V: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B of what `decompose` gives."""
    root = (S / scaling).sqrt()
    return (root[:, None] * V).contiguous(), (U * root).contiguous()


def _invertible(C: Tensor) -> tuple[Tensor, Tensor]:
    """C with a larger diagonal, and its inverse."""
    one, diagonal, damping = torch.eye(len(C), device=C.device), C.diagonal().mean(), DAMPING
    while damping < 1e6:
        found = C + damping * diagonal * one
        inverse = torch.linalg.inv(found)
        if torch.dist(found @ inverse, one) < MOST_ERROR:
            return found, inverse
        damping *= 2
    raise ConfigError(
        Bilingual(
            "CorDA: a layer's covariance cannot be inverted: give more, and more varied, texts.",
            "CorDA：某层的协方差矩阵无法求逆：请给出更多、更多样的文本。",
        )
    )


def most_tokens(layers: Mapping[str, nn.Module]) -> int:
    """How many tokens the widest layer's covariance takes."""
    return TOKENS_PER_INPUT * max(features(layer)[0] for layer in layers.values())
