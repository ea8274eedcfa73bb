"""LoRA-GA: LoRA with Gradient Approximation (Wang et al., 2024, arXiv:2407.05000), an
initialization of LoRA from data.

    dL/dW = U S V^T        W' = W - s B A

A takes R of the first 2R right singular vectors and B, times their singular values, R of the left ones: those from R to
2R with "ArB2r", so that the first steps go where full fine-tuning would go. B is then scaled: "stable" by O^(1/4) /
sqrt(gamma).

Shapes: W, dL/dW (O, I), A (R, I), B (O, R).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from siliang.language import Bilingual
from siliang.methods.fields import check_fields
from siliang.methods.initialization import InitializationData
from siliang.methods.lora_initialization import Factors, TunedLayers
from siliang.models.introspect import out_by_in
from siliang.models.quantized import float_weight
from siliang.types import ConfigError

ROWS = 128  # that `siliang train` takes the gradient of: 64 batches of 2, as in PEFT's example


@dataclass
class LoraGAConfig:
    """LoRA-GA's settings, with PEFT's names and defaults.

    Attributes:
        direction: Which singular vectors A and B take. "ArB2r": A the first r, B the next; "A2rBr": the other way
            round; "ArBr": interleaved; "random": both the same r, drawn at random.
        scale: "stable"; "weight_svd": B as large as the weight; "gd_scale": A and B divided by the scaling; "unit":
            as they are.
        stable_gamma: Of "stable".
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        check_fields(self)
        if self.stable_gamma < 1:
            raise ConfigError(
                Bilingual(
                    f"stable_gamma = {self.stable_gamma}: must be at least 1.",
                    f"stable_gamma = {self.stable_gamma}：至少为 1。",
                )
            )


def learn(model: nn.Module, tuned: TunedLayers, settings: LoraGAConfig, data: InitializationData) -> dict[str, Factors]:
    """A and B of each layer, from the gradient of training rows."""

    def step() -> int:
        return len([batch.backward() for batch in data.batches(rows=ROWS)])

    return factors_of_layers(tuned, settings, mean_gradients(model, tuned.layers, step))


def factors_of_layers(
    tuned: TunedLayers, settings: LoraGAConfig, gradients: Mapping[str, Tensor]
) -> dict[str, Factors]:
    """A and B of each layer, from the mean gradient of its weight as that is stored."""
    found: dict[str, Factors] = {}
    for path, layer in tuned.layers.items():
        G_OI = out_by_in(layer, gradients[path])
        A, B = factors(float_weight(layer), G_OI, tuned.ranks[path], tuned.scalings[path], settings)
        found[path] = Factors(A, B)
    return found


def learning_bytes(tuned: TunedLayers) -> int:
    """Of the gradients."""
    return sum(layer.get_parameter("weight").nbytes for layer in tuned.layers.values())


def mean_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], int | None]
) -> dict[str, Tensor]:
    """The mean gradient of each layer's weight, as that is stored.

    Args:
        model: Trains nothing but these weights within `run`; in training mode, as PEFT has it.
        layers: The layers of the base model by path.
        run: Adds gradients up, and returns how many of a loss; None for as many as a layer had backward passes.

    Raises:
        ConfigError: No gradient reaches a layer.
    """
    passes = dict.fromkeys(layers, 0)

    def hook(path: str) -> Callable[..., None]:
        def count(*_: object) -> None:
            passes[path] += 1

        return count

    trained = {p: p.requires_grad for p in model.parameters()}
    was_training, weights = model.training, {path: layer.get_parameter("weight") for path, layer in layers.items()}
    handles: list[RemovableHandle] = []
    try:
        model.train()
        for p in trained:
            p.requires_grad_(False)
        for path, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(hook(path)))
        with torch.enable_grad():
            made = run()
        if unread := [path for path, weight in weights.items() if weight.grad is None]:
            raise ConfigError(
                Bilingual(
                    f"LoRA-GA: no gradient reaches {unread[0]}: leave it out of target_modules.",
                    f"LoRA-GA：梯度不经过 {unread[0]}：请从 target_modules 中去掉它。",
                )
            )
        total = {path: weight.grad for path, weight in weights.items() if weight.grad is not None}
        return {path: gradient / (made or passes[path]) for path, gradient in total.items()}
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.grad = None
        for p, wanted in trained.items():
            p.requires_grad_(wanted)
        model.train(was_training)


@torch.no_grad()
def factors(W_OI: Tensor, G_OI: Tensor, r: int, scaling: float, settings: LoraGAConfig) -> tuple[Tensor, Tensor]:
    """A and B, in fp32.

    Args:
        G_OI: The weight's gradient.

    Raises:
        ConfigError: The weight has fewer than 2R directions.
    """
    out_features, directions = len(W_OI), min(W_OI.shape)
    if 2 * r > directions:
        raise ConfigError(
            Bilingual(
                f"init_lora_weights = 'lora_ga': r = {r}, and a layer has {directions} rows or columns: it must have "
                "2 r. Use a smaller r.",
                f"init_lora_weights = 'lora_ga'：r = {r}，而有一层只有 {directions} 行或列：须至少为 2 r。"
                "请用更小的 r。",
            )
        )
    U, S, V = torch.svd_lowrank(G_OI.float(), q=min(4 * r, directions), niter=4)
    first, second = slice(0, r), slice(r, 2 * r)
    match settings.direction:
        case "ArBr":
            of_A, of_B = slice(1, 2 * r, 2), slice(0, 2 * r, 2)
        case "A2rBr":
            of_A, of_B = second, first
        case "ArB2r":
            of_A, of_B = first, second
        case "random":
            of_A = of_B = torch.randperm(2 * r)[:r]
    A, B = V.T[of_A], U[:, of_B] * S[of_B]
    match settings.scale:
        case "stable":
            B = B * out_features**0.25 / settings.stable_gamma**0.5
        case "weight_svd":
            _, of_W, _ = torch.svd_lowrank(W_OI.float(), q=r, niter=4)
            B = B * of_W[0] / S[of_B][0] if S[of_B][0] > 0 else B
        case "gd_scale":
            A, B = A / scaling, B / scaling
        case "unit":
            pass
    return A.contiguous(), B.contiguous()
