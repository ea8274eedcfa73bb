"""Which of transformers' modules have a fused form: those that compute the same, and no others."""

from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from siliang.engine.fused import FusedModules, fused_form
from siliang.models.chatglm3.model import RMSNorm as ChatGLMRMSNorm


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
