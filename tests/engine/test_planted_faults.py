"""A trial finds one wrong token, one wrong position and one wrong gradient of packed rows, in each precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TASK, make, without_dropout
from torch import Tensor, nn

from siliang.engine.step import Engine
from siliang.engine.trial_batch import LENGTHS
from siliang.tasks import TASKS
from siliang.types import TaskType

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = range(sum(LENGTHS))
SPREAD = 5  # weights of the size of a trained model's: with those of a new one a layer adds nearly nothing


class WrongAt(torch.autograd.Function):
    """Does nothing. The gradient of one token is half of the right one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: int) -> Tensor:
        ctx.token = token
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        wrong = gradients[0].clone()
        wrong[:, ctx.token] /= 2
        return wrong, None


def model_of(name: str, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    """A model, and its layers."""
    model: Any = make(name)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(SPREAD if p.dim() > 1 else 1)
    without_dropout(model)
    layers = model.model.layers if name == "llama" else model.bert.encoder.layer
    return model.to(dtype).train(), list(layers)


def is_found(model: nn.Module, name: str, kind: str) -> bool:
    engine = Engine(model, TASKS[TaskType(TASK[name])])
    found, notes = engine.padding is None, engine.notes[:1]
    engine.close()
    return found and f"packed rows give other {kind}" in notes[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("layer", [0, -1])
def test_each_token(name: str, layer: int, dtype: torch.dtype) -> None:
    """It has the output of the next one. The last layer's tokens count, too, though a classifier reads one of them."""
    model, layers = model_of(name, dtype)
    part = layers[layer].mlp if name == "llama" else layers[layer].output
    for token in ALL:

        def swap(module: nn.Module, args: Any, output: Tensor, token: int = token) -> Tensor:
            if output.shape[:2] != (1, len(ALL)):
                return output
            output = output.clone()
            output[:, token] = output[:, (token + 1) % len(ALL)]
            return output

        handle = part.register_forward_hook(swap)
        assert is_found(model, name, "results"), token
        handle.remove()
    engine = Engine(model, TASKS[TaskType(TASK[name])])
    assert engine.padding is not None and not engine.notes  # without a fault


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_position(dtype: torch.dtype) -> None:
    model, layers = model_of("llama", dtype)

    def move(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if kwargs["hidden_states"].shape[:2] != (1, len(ALL)):
            return None
        tables = tuple(x.clone() for x in kwargs["position_embeddings"])
        for x in tables:
            x[:, 3] = x[:, 1]
        return args, kwargs | {"position_embeddings": tables}

    layers[0].self_attn.register_forward_pre_hook(move, with_kwargs=True)
    assert is_found(model, "llama", "results")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "tokens"), [("llama", (2, 3, 6, 9, 12)), ("bert", (0, 1, 2, 3, 5, 7))])
def test_a_gradient_of_one_token(name: str, tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    """Where the loss depends on it by more than rounding."""
    model, layers = model_of(name, dtype)
    part = layers[0].mlp if name == "llama" else layers[0].output
    for token in tokens:

        def half(module: nn.Module, args: Any, output: Tensor, token: int = token) -> Tensor:
            return WrongAt.apply(output, token) if output.shape[:2] == (1, len(ALL)) else output

        handle = part.register_forward_hook(half)
        assert is_found(model, name, "gradients"), token
        handle.remove()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_that_lets_rows_see_each_other(dtype: torch.dtype) -> None:
    model, layers = model_of("llama", dtype)

    def leak(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # the values of the first row go to the second one, as where it may look at them
        if output.shape[:2] != (1, len(ALL)):
            return output
        output = output.clone()
        output[:, LENGTHS[0]] = output[:, : LENGTHS[0] + 1].mean(1)
        return output

    layers[0].self_attn.v_proj.register_forward_hook(leak)
    assert is_found(model, "llama", "results")
