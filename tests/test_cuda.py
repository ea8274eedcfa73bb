"""On a CUDA device: its own paths beside fp64, whole trainings beside the CPU's, and resuming to the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods_everywhere import SMALL
from tiny import write_jsonl
from torch import Tensor

from faults.runs import WORDS, Place, make_place
from siliang.methods import METHODS
from siliang.ops.layout import Layout
from siliang.ops.lora_linear import lora_linear
from siliang.ops.packed_attention import packed_attention
from siliang.ops.rms_norm import rms_norm
from siliang.records import Record
from siliang.run_folder import CHECKPOINTS
from siliang.train.run import train
from siliang.train.types import Listener

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BUDGET = 8  # roundings further from fp64 than the plain way in the same precision; an H100 needs 6.6, in bf16
PROMPT = {"num_virtual_tokens": 4}
# Without a method's dropout, which is drawn on the device.
SETTINGS = {name: {k: v for k, v in own.items() if not k.endswith("dropout")} for name, own in SMALL.items()}
SETTINGS |= dict.fromkeys(("prompt_tuning", "p_tuning", "prefix_tuning"), PROMPT)
OTHERS = ("head", "xlora", "poly")  # which need a new head, and experts, and draw noise on the device
EVERY = [name for name in METHODS if name not in OTHERS]


def results(f: Callable[..., Tensor], tensors: Iterable[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    """The value of `f` and its gradients, in fp64 on the CPU."""
    leaves = [t.detach().to(device, dtype).requires_grad_() for t in tensors]
    y = f(*leaves)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    return [t.double().cpu() for t in (y.detach(), *torch.autograd.grad((y * weight).sum(), leaves))]


def assert_within_budget(ours: list[Tensor], naive: list[Tensor], true: list[Tensor], dtype: torch.dtype) -> None:
    """No element is more than `BUDGET` roundings further from the truth than the plain way's, which may be exact."""
    budget = BUDGET if dtype != torch.float32 else 10 * BUDGET  # whose sums have another order
    least = max(float(t.abs().mean()) for t in true)  # a gradient that is zero has the size of the others
    for o, n, t in zip(ours, naive, true, strict=True):
        size = t.abs().clamp(min=max(float(t.abs().mean()), least / 10))
        needed = float((((o - t).abs() - (n - t).abs()) / (torch.finfo(dtype).eps * size)).max())
        assert needed <= budget, f"{needed:.1f} roundings"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [(1,), (5, 5, 5), (7, 1, 12, 3), (130, 64, 3)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("extra", ["", "grouped", "prefix", "bias", "window", "all", "prefix and window"])
def test_packed_attention(lengths: tuple[int, ...], causal: bool, extra: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    T, H, K = sum(lengths), 4, 16
    P = 3 if "prefix" in extra or extra == "all" else 0
    G = 2 if extra in ("grouped", "all") else H
    window = 4 if ("window" in extra or extra == "all") and causal else None
    bias = torch.randn(H, P + max(lengths)) if extra in ("bias", "all") else None

    def go(impl: Any, device: str) -> Callable[..., Tensor]:
        layout = Layout.of(lengths, max(lengths), torch.device(device))
        on_device = None if bias is None else bias.to(device)
        return lambda q, k, v: packed_attention(
            q, k, v, layout, scaling=K**-0.5, causal=causal, bias_HN=on_device, window=window, impl=impl
        )

    tensors = [torch.randn(1, H, T, K), torch.randn(1, G, P + T, K), torch.randn(1, G, P + T, K)]
    true = results(go("reference", "cpu"), tensors, torch.float64, "cpu")
    naive = results(go("reference", "cuda"), tensors, dtype, "cuda")
    ours = results(go("auto", "cuda"), tensors, dtype, "cuda")
    assert_within_budget(ours, naive, true, dtype)


@pytest.mark.parametrize("tokens", [1, 7, 64, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_linear(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(tokens, 48), torch.randn(tokens, 64), torch.randn(8, 64), torch.randn(48, 8)]

    def go(impl: Any) -> Callable[..., Tensor]:
        return lambda y, x, A, B: lora_linear(y, x, A, B, 0.7, impl=impl)

    true = results(go("reference"), tensors, torch.float64, "cpu")
    naive, ours = (results(go(impl), tensors, dtype, "cuda") for impl in ("reference", "fused"))
    assert_within_budget(ours, naive, true, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 64), (333, 2048)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [3 * torch.randn(shape), torch.randn(shape[-1])]

    def go(impl: Any) -> Callable[..., Tensor]:
        return lambda x, w: rms_norm(x, w, 1e-5, impl=impl)

    true = results(go("reference"), tensors, torch.float64, "cpu")
    naive, ours = (results(go(impl), tensors, dtype, "cuda") for impl in ("reference", "fused"))
    assert_within_budget(ours, naive, true, dtype)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("cuda"), dropout=0.0)


def configured(place: Place, folder: Path, method: str, **settings: Any) -> Any:
    """Six steps, without a method's dropout, which is drawn on the device."""
    config = place.config(folder, **({"max_steps": 6, "log_every": 1, "eval_every": None} | settings))
    values = config.model_dump(mode="json")
    return type(config).build(values | {"method": {"name": method, **SETTINGS.get(method, {})}})


def losses(record: Record) -> list[float]:
    return [line.loss for line in record.steps if line.loss is not None]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", EVERY)
def test_a_training_has_the_losses_of_the_cpu(
    method: str, packing: bool, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_card = losses(train(configured(place, tmp_path / "cuda", method, packing=packing)))
    assert Record.read(tmp_path / "cuda").device.kind == "cuda"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        on_cpu = losses(train(configured(place, tmp_path / "cpu", method, packing=packing)))
    assert on_card == pytest.approx(on_cpu, rel=1e-4) and len(on_card) == 6


PRECISIONS = {"bf16": 0.02, "fp16": 0.01, "pure-bf16": 0.05}  # of the losses beside fp32's


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "full", "oft"])
def test_low_precision_follows_fp32(method: str, precision: str, place: Place, tmp_path: Path) -> None:
    rate = {"learning_rate": 1e-3}
    full = losses(train(configured(place, tmp_path / "fp32", method, **rate)))
    low = losses(train(configured(place, tmp_path / "low", method, precision=precision, **rate)))
    assert low == pytest.approx(full, rel=PRECISIONS[precision])


@pytest.mark.filterwarnings("ignore:inner dimension")  # of 32: slow in 4 bits
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_trained(bits: int, place: Place, tmp_path: Path) -> None:
    config = configured(place, tmp_path / "run", "lora").model_dump(mode="json")
    found = losses(train(type(place.config(tmp_path)).build(config | {"quantization": {"bits": bits}})))
    assert found[-1] < found[0]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"packing": False}], ids=str)
@pytest.mark.parametrize(("method", "precision"), [("lora", "bf16"), ("prefix_tuning", "bf16"), ("lora", "fp32")])
def test_a_resumed_run_has_the_same_bits(
    method: str, precision: str, settings: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    more = settings | {"save_every": 3, "keep": 9, "precision": precision}
    whole, part = (
        place.config(tmp_path / name, method, max_steps=6, log_every=1, **more) for name in ("whole", "part")
    )
    for config in (whole, part):
        train(config)
    folder = tmp_path / "part"
    assert weights(folder) == weights(tmp_path / "whole")
    record = Record.read(folder)
    record.status, record.final, record.steps = "interrupted", {}, record.steps[:3]
    record.write(folder)
    for path in (*(folder / "adapter").iterdir(), *(folder / CHECKPOINTS / "checkpoint-6").iterdir()):
        path.unlink()
    (folder / "adapter").rmdir()
    (folder / CHECKPOINTS / "checkpoint-6").rmdir()
    train(part, resume=True)  # in this process: CUDA does not survive a fork
    assert weights(folder) == weights(tmp_path / "whole")


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A card of 300 MB."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(300e6 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_step_that_does_not_fit_is_split(
    little_memory: None, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = make_place(tmp_path / "large", dropout=0.0)
    draw = random.Random(0)
    rows = [{"instruction": " ".join(draw.choices(WORDS, k=12)), "output": draw.choice(WORDS)} for _ in range(12_000)]
    write_jsonl(large.data, rows)  # no copies: those are computed once
    settings = {"batch_size": 6000, "gradient_accumulation": 1, "max_steps": 2, "save_every": None, "fit": True}
    said: list[str] = []
    record = train(configured(large, tmp_path / "run", "lora", memory_budget=None, **settings), Listener(said.append))
    assert record.status == "completed"
    assert any("did not fit" in line for line in said), said
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        whole = train(configured(large, tmp_path / "cpu", "lora", memory_budget=None, **settings))
    assert losses(record) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("prefix", [0, 20])
def test_the_gradient_of_long_sequences_is_the_same_each_time(prefix: int) -> None:
    torch.manual_seed(0)
    lengths = (700, 33, 900)
    layout = Layout.of(lengths, max(lengths), torch.device("cuda"))
    shapes = [(1, 8, sum(lengths), 64), *[(1, 2, prefix + sum(lengths), 64)] * 2]
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    found = [
        torch.autograd.grad(
            packed_attention(*tensors, layout, scaling=0.1, causal=True).float().square().sum(), tensors
        )
        for _ in range(5)
    ]
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))
