"""Optimizers for LoRA, under the names of Hugging Face PEFT's: LoRA+, LoRA-FA, and a Riemannian preconditioner.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354) trains B at a higher rate than A. LoRA-FA (Zhang et al. 2023,
arXiv:2308.03303) freezes A, and gives B the step that comes nearest to a step of the whole weight:

    g_B = 1/s^2 g (A A^T)^-1        g the gradient of B; AdamW takes its step with g_B

The preconditioner (Zhang and Pilanci 2024, arXiv:2402.02347) changes the gradients before each step of any optimizer:

    g_A = (B^T B + reg 1)^-1 g_A,  g_B = g_B (A A^T + reg 1)^-1

Shapes: A (R, I), B and g (O, R).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_parameter_names

from siliang.language import Bilingual
from siliang.methods.low_rank import LowRank
from siliang.peft_api.model import PeftModel
from siliang.peft_api.weighted import lora_layers
from siliang.types import ConfigError

IN_8_BITS = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")  # of bitsandbytes
DAMPING = 1e-8  # of A A^T, before it is inverted
BETAS, EPS = (0.9, 0.999), 1e-6  # of LoRA-FA's moments, PEFT's


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer that trains LoRA's B, and all vectors, at `loraplus_lr_ratio` times the rate of all else.

    Its four groups are PEFT's: A and other matrices, embeddings' A and B, B and vectors, biases and LayerNorms. A group
    may be empty.

    Args:
        lr: The learning rate of A.
        loraplus_lr_ratio: That of B over that of A; the paper has 2 to 16.
        kwargs: `loraplus_lr_embedding` (1e-6), the rate of LoRA on embeddings; `loraplus_weight_decay` (0), of all but
            biases and LayerNorms; all else is the optimizer's.

    Raises:
        ConfigError: The ratio is not above 0, or the model trains nothing.
    """
    if not 0 < loraplus_lr_ratio < math.inf:
        raise ConfigError(
            Bilingual(
                f"loraplus_lr_ratio = {loraplus_lr_ratio!r}: must be above 0, such as 16.",
                f"loraplus_lr_ratio = {loraplus_lr_ratio!r}：须大于 0，例如 16。",
            )
        )
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    decayed = {name for name in get_parameter_names(model, [nn.LayerNorm]) if "bias" not in name}
    groups: list[list[nn.Parameter]] = [[], [], [], []]
    of_a, of_embeddings, of_b, not_decayed = groups
    for name, p in _trained(model).items():
        if ".lora_embedding_" in name:
            of_embeddings.append(p)
        elif "lora_B" in name or p.ndim == 1:
            (of_b if name in decayed else not_decayed).append(p)
        else:
            of_a.append(p)
    rates = (lr, embedding_lr, lr * loraplus_lr_ratio, lr * loraplus_lr_ratio)
    made: Any = optimizer_cls
    optimizer: Optimizer = made(
        [
            {"params": group, "weight_decay": own_decay, "lr": rate}
            for group, rate, own_decay in zip(groups, rates, (decay, decay, decay, 0.0), strict=True)
        ],
        lr=lr,
        **kwargs,
    )
    if optimizer_cls.__name__ in IN_8_BITS:
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def create_lorafa_optimizer(
    model: PeftModel,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freezes A of every LoRA adapter, and gives the optimizer of B and of all else that is trained.

    Args:
        r, lora_alpha: Without effect, as in PEFT: the scaling of each layer counts.
        lr: The learning rate.
        weight_decay: AdamW's, of all that is trained.
        use_rslora: None, or what the active adapters' configs have.

    Raises:
        ConfigError: The model has no LoRA adapter, one of MiCA, of DoRA or another variant, or on a convolution in
            groups, or one with another `use_rslora`.
    """
    adapters = lora_layers(model)
    if not adapters:
        raise ConfigError(
            Bilingual(
                "The model has no LoRA adapter, and LoRA-FA trains LoRA's B: use torch.optim.AdamW.",
                "模型上没有 LoRA 适配器，而 LoRA-FA 训练的是 LoRA 的 B：请用 torch.optim.AdamW。",
            )
        )
    if any(adapter.B.shape[1] != len(adapter.A) for adapter in adapters):
        raise ConfigError(
            Bilingual(
                "LoRA-FA's step is that of a product B A, which a convolution in groups has not: use LoRA+.",
                "LoRA-FA 的更新针对乘积 B A，而分组卷积没有这样的乘积：请使用 LoRA+。",
            )
        )
    if any(adapter.frozen_b for adapter in adapters):
        raise ConfigError(
            Bilingual(
                "LoRA-FA trains B alone, and MiCA's B is frozen: use torch.optim.AdamW.",
                "LoRA-FA 只训练 B，而 MiCA 的 B 是冻结的：请用 torch.optim.AdamW。",
            )
        )
    for name in model.active_adapters:
        config = model.peft_config[name]
        other = "target_parameters" if getattr(config, "target_parameters", None) else None
        if variant := getattr(config, "variant", None) or other:
            raise ConfigError(
                Bilingual(
                    f"LoRA-FA's step is that of W + s B A alone, and adapter {name!r} has {variant}: leave it out, "
                    "or use LoRA+.",
                    f"LoRA-FA 的更新只针对 W + s B A，而适配器 {name!r} 使用了 {variant}：请去掉它，或使用 LoRA+。",
                )
            )
        own = bool(getattr(model.peft_config[name], "use_rslora", False))
        if use_rslora is not None and own != use_rslora:
            raise ConfigError(
                Bilingual(
                    f"use_rslora = {use_rslora!r}, and adapter {name!r} has {own!r}: leave it out here.",
                    f"use_rslora = {use_rslora!r}，而适配器 {name!r} 中是 {own!r}：请不要在这里设置。",
                )
            )
    for adapter in adapters:
        adapter.A.requires_grad_(False)
    params = list(_trained(model).values())
    return LoraFAOptimizer(params, {adapter.B: adapter for adapter in adapters}, lr=lr, weight_decay=weight_decay)


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer of the given class that preconditions the gradients of LoRA's A and B, of layers whose both are
    trained matrices, before each step. All else takes the class's own step.

    Args:
        reg: The damping of the matrices that are inverted.
        kwargs: Of the class.

    Raises:
        ConfigError: The model trains no such pair, or one of target_parameters or in blocks; or the class evaluates
            the loss within its step, as LBFGS does.
    """
    named = _trained(model)
    trained = {name.partition(".lora_A.")[2].partition(".")[0] for name in named}
    for name, config in getattr(model, "peft_config", {}).items():
        own = (other for other in ("target_parameters", "use_bdlora") if getattr(config, other, None))
        if name in trained and (setting := next(own, None)) is not None:
            raise ConfigError(
                Bilingual(
                    f"The preconditioner is that of a product B A, and adapter {name!r} has {setting}, whose A and B "
                    "are cut into blocks or belong to experts: use LoRA+.",
                    f"该预条件针对乘积 B A，而适配器 {name!r} 使用了 {setting}，其 A 和 B 分块或分属各专家："
                    "请使用 LoRA+。",
                )
            )
    pairs = [(A, named.get(name.replace(".lora_A.", ".lora_B."))) for name, A in named.items() if ".lora_A." in name]
    factors = [(A, B) for A, B in pairs if B is not None and A.ndim == B.ndim == 2]
    if not factors:
        raise ConfigError(
            Bilingual(
                "create_riemannian_optimizer needs LoRA layers of which both A and B are trained.",
                "create_riemannian_optimizer 需要 A 和 B 都训练的 LoRA 层。",
            )
        )
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(
            Bilingual(
                f"optimizer_cls = {optimizer_cls!r}: must be a class of optimizers of torch.",
                f"optimizer_cls = {optimizer_cls!r}：须为 torch 的优化器类。",
            )
        )
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            Bilingual(
                f"{optimizer_cls.__name__} computes the gradients anew within its step: use another, such as AdamW.",
                f"{optimizer_cls.__name__} 在更新时会重新计算梯度：请换一个优化器，例如 AdamW。",
            )
        )
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **{"lr": lr, **kwargs})

    def precondition(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise ConfigError(
                Bilingual(
                    "An optimizer of create_riemannian_optimizer takes no closure: call step() after backward().",
                    "create_riemannian_optimizer 的优化器不接受 closure：请在 backward() 之后调用 step()。",
                )
            )
        for A, B in factors:
            _precondition(A, B, reg)

    optimizer.register_step_pre_hook(precondition)
    return optimizer


@torch.no_grad()
def _precondition(A: nn.Parameter, B: nn.Parameter, reg: float) -> None:
    """Multiplies the gradients of A and B, in place."""
    wide = torch.promote_types(A.dtype, torch.float32)
    A_RI, B_OR = A.detach().to(wide), B.detach().to(wide)
    one = torch.eye(len(A_RI), device=A.device, dtype=wide)
    if A.grad is not None:
        A.grad.copy_(torch.linalg.pinv(B_OR.T @ B_OR + reg * one) @ A.grad.to(wide))
    if B.grad is not None:
        B.grad.copy_(B.grad.to(wide) @ torch.linalg.pinv(A_RI @ A_RI.T + reg * one))


class LoraFAOptimizer(Optimizer):
    """AdamW, whose decay follows the step, with LoRA-FA's gradient of B.

    Args:
        params: What is trained.
        adapters: The adapter of each B among them.
    """

    def __init__(
        self, params: list[nn.Parameter], adapters: Mapping[Tensor, LowRank], *, lr: float, weight_decay: float = 0.0
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ConfigError(
                    Bilingual(f"{name} = {value!r}: must be at least 0.", f"{name} = {value!r}：须大于等于 0。")
                )
        super().__init__(params, {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": weight_decay})
        self._adapters = adapters

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes one step; returns what `closure` gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                adapter = self._adapters.get(p)
                g = p.grad if adapter is None else _gradient_of_b(p.grad, adapter.A, adapter.s)
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
                m.mul_(b1).add_(g, alpha=1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                size = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-size)
                if group["weight_decay"] > 0:
                    p.add_(p, alpha=-lr * group["weight_decay"])
        return loss


def _gradient_of_b(g: Tensor, A: Tensor, s: float) -> Tensor:
    """1/s^2 g (A A^T)^-1, in g's dtype; the product is taken in bf16 where the device has it, as in PEFT.

    Args:
        g: (O, R), or a convolution's, (O, R, 1 ...).
        A: (R, I), or a convolution's, (R, C, window).
    """
    g_OR, A = g.flatten(1), A.flatten(1)
    AA_RR = A @ A.T
    inverse_RR = torch.linalg.pinv(AA_RR + DAMPING * torch.eye(len(A), device=A.device))
    in_bf16 = A.device.type != "cuda" or torch.cuda.is_bf16_supported()
    with torch.autocast(A.device.type, dtype=torch.bfloat16, enabled=in_bf16):
        return ((1 / s**2) * (g_OR @ inverse_RR)).to(g.dtype).view_as(g)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """
    Raises:
        ConfigError: Nothing is trained.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ConfigError(
            Bilingual(
                "The model trains nothing: load the adapter with is_trainable=True, or make it active.",
                "模型没有可训练的参数：请用 is_trainable=True 加载适配器，或激活它。",
            )
        )
    return found
