"""LN tuning of layers that are no norms, as PEFT's: a copy of a layer of any kind."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close
from tiny import batch, make
from torch import nn
from transformers.pytorch_utils import Conv1D

import siliang
from siliang.types import MergeError, TargetError, TaskType

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type.*")  # of peft
KINDS = {
    "linear": lambda: nn.Linear(8, 8),
    "transposed": lambda: Conv1D(8, 8),
    "convolution": lambda: nn.Conv1d(5, 5, 3, padding=1),
    "table": lambda: nn.Embedding(20, 8),
    "batch norm": lambda: nn.BatchNorm1d(5),
    "recurrent": lambda: nn.LSTM(8, 8, batch_first=True),
}


class Small(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.look = KINDS[kind]()
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.look(x)
        return self.last(y[0] if isinstance(y, tuple) else y)


def inputs(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (4, 5) if kind == "table" else (4, 5, 8)
    return torch.randint(20, shape, generator=generator) if kind == "table" else torch.randn(shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_as_in_peft(kind: str, tmp_path: Path) -> None:
    ours: Any = siliang.get_peft_model(Small(kind), siliang.LNTuningConfig(target_modules=["look"]))
    theirs: Any = peft.get_peft_model(Small(kind), peft.LNTuningConfig(target_modules=["look"]))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    x = inputs(kind)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model.train()(x).square().mean().backward()
        optimizer.step()
    named = [{n: p for n, p in model.state_dict().items() if p.is_floating_point()} for model in (ours, theirs)]
    assert_all_close(*named)
    wanted = theirs.eval()(x)
    assert_close(ours.eval()(x), wanted)
    for model, library, folder in ((ours, peft, tmp_path / "ours"), (theirs, siliang, tmp_path / "theirs")):
        model.save_pretrained(str(folder))
        again: Any = library.PeftModel.from_pretrained(Small(kind), str(folder))
        assert_close(again.eval()(x), wanted)
    if kind == "batch norm":
        with pytest.raises(MergeError, match=r"BatchNorm1d has statistics of its own \(num_batches_tracked, running_m"):
            ours.merge_and_unload()
    else:
        assert_close(ours.merge_and_unload().eval()(x), wanted)


def test_a_table_of_a_half_precision_model() -> None:
    """The copy is in fp32, and what follows gets the base's dtype."""
    base: Any = make("llama").to(torch.bfloat16)
    model: Any = siliang.get_peft_model(
        base, siliang.LNTuningConfig(task_type=TaskType.CAUSAL_LM, target_modules=["embed_tokens", "norm"])
    )
    output = model(**batch("llama"))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and all(p.grad.any() for p in trained)


@pytest.mark.parametrize("name", ["mlp", "self_attn"])
def test_a_block_is_not_copied(name: str) -> None:
    with pytest.raises(TargetError, match="which LN_TUNING cannot wrap"):
        siliang.get_peft_model(
            make("llama"), siliang.LNTuningConfig(task_type=TaskType.CAUSAL_LM, target_modules=[name])
        )
