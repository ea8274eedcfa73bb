"""Which of transformers' modules have a fused form: those that compute the same, and no others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import GemmaConfig, LlamaConfig
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.glm4.modeling_glm4 import Glm4MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from siliang.engine.fused import FusedModules, fused_form, gated_form
from siliang.models.chatglm3.model import RMSNorm as ChatGLMRMSNorm
from siliang.models.introspect import is_gated


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, ChatGLMRMSNorm, BloomGelu, NewGELUActivation])
def test_the_same_results_and_gradients(kind: Any) -> None:
    torch.manual_seed(0)
    module = kind(24) if kind.__name__.endswith("Norm") else kind()
    for p in module.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    fused, found = FusedModules(module), []
    for way in (fused.on, torch.enable_grad):
        x = 3 * torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        with way():
            assert ("forward" in module.__dict__) == (way == fused.on)
            y = module(x)
            y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())])
        module.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [GELUActivation, GemmaRMSNorm, nn.LayerNorm, nn.Linear])
def test_what_computes_something_else_stays(kind: Any) -> None:
    """GELU by the error function; a norm that scales by 1 + w; what has another name."""
    assert fused_form(kind) is None


def test_a_plan_on_fake_tensors_finds_what_a_run_finds() -> None:
    fused_form.cache_clear()
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        assert fused_form(LlamaRMSNorm) is not None
        gated_form.cache_clear()
        assert gated_form(LlamaMLP) is not None


@contextmanager
def kept_shapes() -> Iterator[list[torch.Size]]:
    """The shapes of what autograd keeps within the block."""
    shapes: list[torch.Size] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        yield shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_layer_has_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)).to(dtype)
    layer.requires_grad_(False)
    fused, found = FusedModules(layer), []
    for way in (fused.on, torch.enable_grad):
        x = torch.randn(2, 7, 24, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with way(), kept_shapes() as kept:
            y = layer(x)
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad])
        assert kept.count(torch.Size((2, 7, 40))) == (2 if way == fused.on else 3)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", [LlamaMLP, MistralMLP, Qwen2MLP])
def test_classes_of_gated_layers(kind: Any) -> None:
    assert gated_form(kind) is not None


def test_other_gates_stay() -> None:
    class Other(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)

    assert gated_form(Other) is None
    config = GemmaConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, hidden_activation="gelu_pytorch_tanh"
    )
    assert not is_gated(GemmaMLP(config)) and gated_form(Glm4MLP) is None  # one layer for gate and value
