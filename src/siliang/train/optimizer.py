"""The optimizer of a training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from siliang.config import TrainConfig
from siliang.language import Bilingual
from siliang.models.introspect import output_layer, transformer_layers, unwrapped
from siliang.peft_api.model import PeftModel
from siliang.types import OTHER_HEADS, ConfigError

BETAS = (0.9, 0.999)  # of Adam's moments, torch's own
LION_BETAS = (0.9, 0.99)  # of the paper
# biases and the weights of norms are not decayed; the patterns are those of transformers' Trainer
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")

Groups = list[dict[str, Any]]
# an optimizer of (the model, its groups, the names of the task's heads, the peak learning rate, Adam's eps)
Make = Callable[[nn.Module, Groups, Sequence[str], float, float], Optimizer]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer: a row of `OPTIMIZERS`.

    Attributes:
        name: The value of train.optimizer.
        make: Makes it.
        state_share: Bytes of state for each byte of a trained fp32 weight, for messages: a plan counts tensors.
        title: For messages about memory.
        package: That it needs and siliang does not install; None for none.
        without_cuda: The one to use where there is no GPU, if it needs one.
        sharded: Its step is right on weights that FSDP shards.
        on_fake: It runs on fake tensors; where not, the plan uses a substitute with the same state.
    """

    name: str
    make: Make
    state_share: float
    title: str
    package: str | None = None
    without_cuda: str | None = None
    sharded: bool = False
    on_fake: bool = True


def make_optimizer(
    model: nn.Module, settings: TrainConfig, *, heads: Sequence[str], learning_rate: float, eps: float
) -> Optimizer:
    """The optimizer of the settings, over all trained parameters.

    Args:
        heads: Names of the modules that are the task's head.
        learning_rate: The peak.
        eps: Of Adam.
    """
    groups = parameter_groups(model, settings, learning_rate)
    return OPTIMIZERS[settings.optimizer].make(model, groups, heads, learning_rate, eps)


def check_optimizer_runs(settings: TrainConfig, device: torch.device, *, sharded: bool) -> None:
    """Refuses, before the base model is loaded, an optimizer that cannot run here.

    Args:
        sharded: What is trained is sharded over ranks.

    Raises:
        ConfigError: The optimizer cannot run here.
    """
    spec = OPTIMIZERS[settings.optimizer]
    if spec.package is not None and find_spec(spec.package) is None:
        raise ConfigError(
            Bilingual(
                f"train.optimizer = {spec.name} needs {spec.package}, which is not installed: pip install "
                f"{spec.package}",
                f"train.optimizer = {spec.name} 需要 {spec.package}，而它没有安装：pip install {spec.package}",
            )
        )
    if spec.without_cuda is not None and device.type != "cuda":
        raise ConfigError(
            Bilingual(
                f"train.optimizer = {spec.name} pages a GPU's memory, and there is none: use {spec.without_cuda}.",
                f"train.optimizer = {spec.name} 使用分页显存，而这里没有 GPU：请用 {spec.without_cuda}。",
            )
        )
    if sharded and not spec.sharded:
        usable = " or ".join(other.name for other in OPTIMIZERS.values() if other.sharded)
        raise ConfigError(
            Bilingual(
                f"train.optimizer = {spec.name} does not train sharded weights (fsdp): use {usable}.",
                f"train.optimizer = {spec.name} 不能训练分片的权重（fsdp）：请用 {usable}。",
            )
        )


def parameter_groups(model: nn.Module, settings: TrainConfig, learning_rate: float) -> Groups:
    """The trained parameters that are decayed, then those that are not, as in transformers' Trainer, each with the
    learning rate that the settings give it. Those of the peak learning rate come first.

    There is no empty group: DeepSpeed leaves it out, and a checkpoint must be the same with every strategy.
    """
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    factors = rate_factors(model, settings)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed = not name.startswith(norms) and NOT_DECAYED.search(name.lower()) is None
            groups.setdefault((factors.get(name, 1.0), decayed), []).append(p)
    ordered = sorted(groups, key=lambda key: (key[0] != 1.0, -key[0], not key[1]))
    return [
        {
            "params": groups[factor, decays],
            "weight_decay": settings.weight_decay if decays else 0.0,
            "lr": learning_rate * factor,
        }
        for factor, decays in ordered
    ]


def rate_factors(model: nn.Module, settings: TrainConfig) -> dict[str, float]:
    """What the learning rate of a parameter is multiplied by, by its name; 1 for those that are left out.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) trains LoRA's B faster than A. Layer-wise decay (Howard and Ruder 2018,
    arXiv:1801.06146) multiplies the rate once more for each layer below the last one; embeddings are below the first.
    """
    factors: dict[str, float] = {}
    if (decay := settings.layerwise_decay) is not None:
        layers = transformer_layers(model)
        depth = {id(p): i for i, layer in enumerate(layers) for p in layer.parameters()}
        below = {id(p) for p in _embedding_weights(model)}
        for name, p in model.named_parameters():
            if id(p) in depth:
                factors[name] = decay ** (len(layers) - depth[id(p)])
            elif id(p) in below:
                factors[name] = decay ** (len(layers) + 1)
    if (ratio := settings.loraplus_ratio) is not None:
        for name, _ in model.named_parameters():
            if "lora_B." in name or ".lora_embedding_B." in name:  # a parameter's has more before it
                factors[name] = factors.get(name, 1.0) * ratio
    return factors


def _embedding_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of embeddings, with what adapters train of them: copies, rows, and LoRA's factors."""
    return [p for m in model.modules() if isinstance(unwrapped(m), nn.Embedding) for p in m.parameters()]


def _not_for_muon(model: nn.Module, heads: Sequence[str]) -> set[int]:
    """The ids of the weights with a row for each word, position or class: those of embeddings and output layers."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    outputs = [child for name, child in base.named_children() if name in (*heads, *OTHER_HEADS)]
    if (output := output_layer(base)) is not None:
        outputs.append(output)
    return {id(p) for p in chain(_embedding_weights(model), *(module.parameters() for module in outputs))}


def _adamw(model: nn.Module, groups: Groups, heads: Sequence[str], learning_rate: float, eps: float) -> Optimizer:
    return AdamW(groups, lr=learning_rate, betas=BETAS, eps=eps, fused=True)


def _adafactor(model: nn.Module, groups: Groups, heads: Sequence[str], learning_rate: float, eps: float) -> Optimizer:
    from transformers.optimization import Adafactor  # which imports PEFT, where it is installed

    return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)


def _lion(model: nn.Module, groups: Groups, heads: Sequence[str], learning_rate: float, eps: float) -> Optimizer:
    return Lion(groups, lr=learning_rate)


def _muon(model: nn.Module, groups: Groups, heads: Sequence[str], learning_rate: float, eps: float) -> Optimizer:
    return MuonAndAdamW(groups, _not_for_muon(model, heads), lr=learning_rate, eps=eps)


def _adamw_8bit(
    model: nn.Module, groups: Groups, heads: Sequence[str], learning_rate: float, eps: float, *, paged: bool = False
) -> Optimizer:
    """bitsandbytes' AdamW with moments of 8 bits; those of embeddings stay in 32, as in transformers' Trainer."""
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    kind = PagedAdamW8bit if paged else AdamW8bit
    made: Optimizer = kind(groups, lr=learning_rate, betas=BETAS, eps=eps)
    return made


class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an interpolated momentum; one moment.

    u = sign(b1 m + (1 - b1) g);  p = p - lr (u + wd p);  m = b2 m + (1 - b2) g
    """

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float] = LION_BETAS) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Makes one step."""
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                m, g = state["exp_avg"], p.grad
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(torch.sign(m * b1 + g * (1 - b1)), alpha=-lr)
                m.lerp_(g, 1 - b2)


class MuonAndAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for matrices, AdamW for all else: embeddings, output layer, biases, norms.

    Muon's step is scaled to the size of AdamW's (match_rms_adamw), so that both take the same learning rate.

    Args:
        tables: The ids of matrices that Muon is not for.
    """

    def __init__(self, groups: Groups, tables: set[int], *, lr: float, eps: float) -> None:
        matrices, rest = ([], [])
        for group in groups:
            by_muon = [p for p in group["params"] if p.ndim == 2 and id(p) not in tables]
            others = [p for p in group["params"] if p.ndim != 2 or id(p) in tables]
            matrices += [group | {"params": by_muon}] if by_muon else []
            rest += [group | {"params": others}] if others else []
        self._parts: list[Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self._parts.append(AdamW(rest, lr=lr, betas=BETAS, eps=eps, fused=True))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts have the groups and the state of the whole."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Makes one step."""
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a `state_dict`."""
        super().load_state_dict(state_dict)
        self._share()


OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        OptimizerSpec("adamw", _adamw, 2.0, "Adam", sharded=True),
        OptimizerSpec("adamw_8bit", _adamw_8bit, 0.5, "Adam", package="bitsandbytes", on_fake=False),
        OptimizerSpec(
            "paged_adamw_8bit",
            partial(_adamw_8bit, paged=True),
            0.5,
            "Adam",
            package="bitsandbytes",
            without_cuda="adamw_8bit",
            on_fake=False,
        ),
        OptimizerSpec("adafactor", _adafactor, 0.0, "adafactor"),
        OptimizerSpec("lion", _lion, 1.0, "lion", sharded=True),
        OptimizerSpec("muon", _muon, 1.0, "muon"),
    )
}


def state_tensors(optimizer: Optimizer) -> Iterable[Tensor]:
    """What an optimizer keeps of its parameters between steps."""
    return (x for kept in optimizer.state.values() for x in kept.values() if isinstance(x, Tensor))
