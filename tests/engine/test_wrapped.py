"""Models in torch's wrappers: DistributedDataParallel, whose `training` flag nothing turns off, and the first FSDP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import VOCABULARY, make, without_dropout
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from siliang import BOFTConfig, LoraConfig, OFTConfig, TaskType, TrainableTokensConfig, get_peft_model
from siliang.data.collate import PadCollator
from siliang.distributed.sharding import average_gradients
from siliang.engine.batches import StepCollator
from siliang.engine.step import Engine
from siliang.tasks import CAUSAL_LM


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("setting", [{"label_smoothing": 0.2}, {"neftune_alpha": 40.0}])
def test_the_reference_has_neither_noise_nor_smoothing(setting: dict[str, Any]) -> None:
    model: Any = get_peft_model(make("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM, r=2))
    without_dropout(model)
    model.train()
    wrapped = DistributedDataParallel(model)
    rows = [{"input_ids": [5 + (7 * i + j) % (VOCABULARY - 5) for j in range(6)]} for i in range(3)]
    collate = StepCollator(PadCollator(0), CAUSAL_LM, len(rows), packed=False)
    (batch,) = collate([row | {"labels": row["input_ids"]} for row in rows])["batches"]

    def loss(engine: Engine, called: Any) -> Tensor:
        with engine.loss(called, batch) as found:
            return found.detach()

    plain = Engine(model, CAUSAL_LM, packing=False)
    expected = loss(plain, model)
    plain.close()
    engine = Engine(model, CAUSAL_LM, packing=False, **setting)
    torch.manual_seed(3)
    assert (loss(engine, wrapped) - expected).abs() > 1e-3
    with engine.reference():
        assert wrapped.training and not model.training
        assert torch.equal(loss(engine, wrapped), expected)
    engine.close()


@pytest.mark.usefixtures("one_rank")
def test_gradients_of_several_dtypes_are_sent_in_the_order_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank must send the same message at the same time, and the order of a set may differ between processes."""
    sent: list[torch.dtype] = []
    send = dist.all_reduce

    def recorded(tensor: Tensor) -> Any:
        sent.append(tensor.dtype)
        return send(tensor)

    monkeypatch.setattr(dist, "all_reduce", recorded)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    for first in range(len(dtypes)):
        wanted = dtypes[first:] + dtypes[:first]
        sent.clear()
        average_gradients(torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2, dtype=d)) for d in wanted]))
        assert sent == wanted


class Computed(nn.Module):
    """A convolution, and the weights of two experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.conv(x).mean((2, 3)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(2, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", x, self.down_proj)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.parametrize(
    "config",
    [
        lambda: BOFTConfig(target_modules=["conv"], boft_block_size=4, init_weights=False),
        lambda: OFTConfig(target_modules=["conv"], r=9, oft_block_size=0, init_weights=False),
        lambda: LoraConfig(
            r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False, lora_dropout=0.0
        ),
    ],
)
def test_under_torchs_first_fsdp_adapters_compute_too(config: Any) -> None:
    """Its parameters are plain attributes of the layers."""
    torch.manual_seed(0)
    model: Any = get_peft_model(Computed(), config()).eval()
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        expected = model(x)
        with model.disable_adapter():
            assert not torch.allclose(model(x), expected)
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert torch.equal(wrapped(x), expected)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:FSDP")
def test_under_torchs_first_fsdp_trained_rows_of_a_table() -> None:
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 4))
    model: Any = get_peft_model(table, TrainableTokensConfig(target_modules=["0"], token_indices=[1, 3])).eval()
    x = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
        expected = model(x)
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert torch.equal(wrapped(x), expected)
