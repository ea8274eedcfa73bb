"""Each hot path against its reference: values, every gradient, odd shapes, and the error budget in low precision."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_all_close, assert_close
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from siliang.ops.dense_attention import repeatable
from siliang.ops.layout import BUCKET_RATIO, BUCKET_WASTE, Layout
from siliang.ops.lora_linear import Impl, lora_linear
from siliang.ops.masked_ce import masked_cross_entropy
from siliang.ops.packed_attention import packed_attention, prefix_places
from siliang.ops.place import planned_for
from siliang.ops.recomputed import recomputed_linear
from siliang.ops.rms_norm import rms_norm

BUDGET = 6  # roundings; 4.3 are needed, of bf16 on two cores with AVX512-BF16


def results(f: Callable[..., Tensor], tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The value of `f` and its gradients, computed in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = f(*leaves)
    seed = torch.Generator().manual_seed(7)
    weight = torch.randn(y.shape, generator=seed).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


def by_number(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(i): t for i, t in enumerate(tensors)}


def same(f: Callable[..., Tensor], reference: Callable[..., Tensor], *tensors: Tensor) -> None:
    """fp32: to some roundings. Low precision: no element is more than `BUDGET` further from fp64 than the reference's.

    Both round their result, and where the reference happens to be exact ours may be a rounding off.
    """
    ours, theirs = (results(g, tensors, torch.float32) for g in (f, reference))
    assert_all_close(by_number(ours), by_number(theirs))
    truth = results(reference, tensors, torch.float64)
    for low in (torch.bfloat16, torch.float16):
        for ours, naive, true in zip(results(f, tensors, low), results(reference, tensors, low), truth, strict=True):
            within_budget(ours, naive, true, low)


def within_budget(ours: Tensor, naive: Tensor, true: Tensor, low: torch.dtype) -> None:
    """No element of ours is more than `BUDGET` roundings of `low` further from the truth than the reference's."""
    assert true.dtype == torch.float64
    size = torch.maximum(true.abs(), true.abs().mean())
    over = (ours.double() - true).abs() - (naive.double() - true).abs()
    needed = float((over / (torch.finfo(low).eps * size + 1e-30)).max())
    assert needed <= BUDGET, f"{low}: {needed:.1f} roundings further from the truth than the reference"


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 33)])
def test_recomputed_linear(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, A, B = torch.randn(shape), torch.randn(2, shape[-1]), torch.randn(4, 2)

    def ours(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return recomputed_linear(x, lambda: torch.sin(B @ A), [A, B])

    same(ours, lambda x, A, B: F.linear(x, torch.sin(B @ A)), x, A, B)
    A.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = recomputed_linear(x, lambda: torch.sin(B @ A), [A, B])
    assert [t.shape for t in saved] == [x.shape]  # no weight
    assert y.requires_grad and torch.autograd.grad(y.sum(), A)[0].abs().max() > 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 33)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lora_linear(shape: tuple[int, ...], bias: bool, device: str) -> None:
    """Also as it is laid out for CUDA."""
    torch.manual_seed(0)
    I, O, R = shape[-1], 17, 3  # noqa: E741
    tensors = [torch.randn(*shape[:-1], O), torch.randn(shape), torch.randn(R, I), torch.randn(O, R)]
    tensors += [torch.randn(O)] if bias else []

    def go(impl: Any) -> Callable[..., Tensor]:
        return lambda y, x, A, B, b=None: lora_linear(y, x, A, B, 0.7, bias_O=b, impl=impl)

    with planned_for(device):
        same(go("fused"), go("reference"), *tensors)


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_of_lora_may_be_changed_in_place(bias: bool) -> None:
    """Falcon adds to it, and OLMo clamps it."""
    x, A, B = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 8), (2, 8), (6, 2)))
    b = torch.randn(6, requires_grad=True) if bias else None
    wanted = [p for p in (x, A, B, b) if p is not None]

    def gradients(impl: Impl) -> tuple[Tensor, ...]:
        y = lora_linear(torch.ones(2, 5, 6), x, A, B, 0.7, bias_O=b, impl=impl)
        return torch.autograd.grad(y.mul_(2.0).clamp_(-1.0, 3.0).square().sum(), wanted)

    for found, expected in zip(gradients("fused"), gradients("reference"), strict=True):
        assert_close(found, expected)


def test_lora_linear_keeps_wide_factors_beside_narrow_activations() -> None:
    y, x = torch.randn(4, 8).bfloat16(), torch.randn(4, 6).bfloat16().requires_grad_()
    A, B = torch.randn(2, 6, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    out = lora_linear(y, x, A, B, 2.0)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert A.grad is not None and A.grad.dtype == torch.float32


def test_lora_dropout() -> None:
    """The mean is kept, the gradient sees the same mask, and eval mode has none."""
    torch.manual_seed(0)
    x, A, B = torch.ones(20_000, 4, requires_grad=True), torch.randn(2, 4), torch.randn(3, 2, requires_grad=True)
    y = lora_linear(torch.zeros(20_000, 3), x, A, B, 1.0, dropout_p=0.25, training=True)
    torch.testing.assert_close(y.mean(0), A.sum(1) @ B.T, rtol=0.03, atol=0.03)
    y.sum().backward()
    assert x.grad is not None
    dropped = x.grad[:, 0] == 0
    assert abs(float(dropped.float().mean()) - 0.25) < 0.02
    assert_close(x.grad[~dropped][0, 0], (B.sum(0) @ A)[0].detach() / 0.75)
    assert_close(lora_linear(torch.zeros(5, 3), x[:5], A, B, 1.0, dropout_p=0.25), x[:5] @ A.T @ B.T)


class Adapted(nn.Module):
    """A head that is more than a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.gain = linear, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain.to(x.dtype) * self.linear(x)


@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"softcap": 2.0}, {"label_smoothing": 0.1, "scale": 0.3}, {"softcap": 3.0, "scale": 2.0}],
)
@pytest.mark.parametrize("kind", ["frozen", "biased", "trained", "adapted"])
def test_masked_cross_entropy(rows: int, options: dict[str, float], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import siliang.ops.masked_ce as module

    torch.manual_seed(0)
    D, V = 9, 41
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * V * 50)  # so that 130 rows take three chunks
    monkeypatch.setattr(module, "ROWS", 50)
    monkeypatch.setattr(module, "LEAST_TILE", 16)
    monkeypatch.setattr(module, "TILE_BYTES", 4 * 16)  # and 41 columns three tiles, the last of them narrower
    labels = torch.randint(V, (rows,))
    weight, offset = torch.randn(V, D), torch.randn(V)

    def head(dtype: torch.dtype) -> nn.Module:
        linear = nn.Linear(D, V, bias=kind != "frozen").to(dtype)
        linear.weight.data = weight.to(dtype)
        if kind != "frozen":
            linear.bias.data = offset.to(dtype)
        linear.requires_grad_(kind == "trained")
        return Adapted(linear).to(dtype) if kind == "adapted" else linear

    def go(impl: Any) -> Callable[[Tensor], Tensor]:
        def run(h: Tensor) -> Tensor:
            made.append(head(h.dtype))
            return masked_cross_entropy(h, made[-1], labels, impl=impl, **options)

        return run

    made: list[nn.Module] = []
    if kind in ("frozen", "biased"):
        same(go("chunked"), go("reference"), torch.randn(rows, D))
        return
    found = []
    for impl in ("chunked", "reference"):
        h = torch.randn(rows, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (go(impl)(h) * 0.5).backward()
        found.append([h.grad, *(p.grad for p in made[-1].parameters() if p.requires_grad)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert_close(ours, theirs)


def test_a_tensor_that_the_head_shares_with_other_layers_gets_its_gradient() -> None:
    """An adapter's shared tensors (VeRA's) are no parameters of the head itself."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.own = nn.Linear(6, 41).requires_grad_(False), nn.Parameter(torch.ones(41))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + x @ shared * self.own

    torch.manual_seed(0)
    shared = nn.Parameter(torch.randn(6, 41))
    head, labels = Shared(), torch.randint(41, (5,))
    found = []
    for impl in ("chunked", "reference"):
        shared.grad = head.own.grad = None
        masked_cross_entropy(
            torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), head, labels, impl=impl
        ).backward()
        found.append((shared.grad, head.own.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        assert_close(ours, theirs)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_the_gradient_of_a_sure_model_is_not_lost_to_rounding(dtype: torch.dtype, off: float) -> None:
    """softmax - 1 is 1e-4 to 1e-10 of what it is made of; and e^1000 is not a number."""
    torch.manual_seed(0)
    weight, labels = nn.Linear(64, 2000, bias=False).weight.detach().to(dtype), torch.arange(0, 2000, 500)
    for gain in (20.0, 40.0, 1000.0):
        own = weight[labels].float()
        h = (gain * own / own.square().sum(-1, keepdim=True)).to(dtype)
        found = []
        for number in (dtype, torch.float64):
            head = nn.Linear(64, 2000, bias=False, dtype=number).requires_grad_(False)
            head.weight.copy_(weight)
            leaf = h.to(number, copy=True).requires_grad_()
            if number is dtype:
                loss = masked_cross_entropy(leaf, head, labels)
            else:
                loss = F.cross_entropy(head(leaf), labels, reduction="sum")
            loss.backward()
            assert leaf.grad is not None
            found.append((float(loss.detach()), leaf.grad.double()))
        (ours, gradient), (true, right) = found
        assert abs(ours - true) <= off * true + 1e-5
        size = torch.maximum(right.abs(), right.abs().mean())
        assert ((gradient - right).abs() <= off * size + 1e-30).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 33)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)

    def go(impl: Any) -> Callable[..., Tensor]:
        return lambda x, w: rms_norm(x, w, 1e-5, impl=impl)

    same(go("fused"), go("reference"), 3 * torch.randn(shape), torch.randn(shape[-1]))


def test_rms_norm_of_mixed_formats_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    norm, x, weight = LlamaRMSNorm(16), torch.randn(5, 16).bfloat16(), torch.randn(5, 16)
    ours, theirs, true = (x.to(dtype, copy=True).requires_grad_() for dtype in (x.dtype, x.dtype, torch.float64))
    outputs = [rms_norm(ours, norm.weight, norm.variance_epsilon), norm(theirs)]
    assert {y.dtype for y in outputs} == {torch.float32}
    assert_close(*outputs)
    outputs.append(rms_norm(true, norm.weight.double(), norm.variance_epsilon, impl="reference"))
    for y in outputs:
        (y * weight).sum().backward()
    assert ours.grad is not None and theirs.grad is not None and true.grad is not None
    within_budget(ours.grad, theirs.grad, true.grad, torch.bfloat16)


def test_no_labelled_rows() -> None:
    h = torch.randn(0, 4, requires_grad=True)
    masked_cross_entropy(h, nn.Linear(4, 9), torch.zeros(0, dtype=torch.long)).backward()
    assert h.grad is not None and h.grad.shape == (0, 4)


def test_the_loss_alone_needs_no_gradient() -> None:
    head, h, labels = nn.Linear(4, 9), torch.randn(6, 4), torch.arange(6)
    with torch.no_grad():
        loss = masked_cross_entropy(h, head, labels)
    assert_close(loss, masked_cross_entropy(h, head, labels, impl="reference").detach())


LENGTHS = [(1,), (5, 5, 5), (7, 1, 12, 3)]


def heads(T: int, H: int, K: int, *, prefix: int = 0) -> Tensor:
    return torch.randn(1, H, prefix + T, K)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("extra", ["", "grouped", "prefix", "bias", "window", "all"])
@pytest.mark.parametrize("impl", ["products", "sdpa"])
def test_packed_attention(lengths: tuple[int, ...], causal: bool, extra: str, impl: str) -> None:
    torch.manual_seed(0)
    T, H, K = sum(lengths), 4, 8
    P = 3 if extra in ("prefix", "all") else 0
    G = 2 if extra in ("grouped", "all") else H
    bias = torch.randn(H, P + max(lengths)) if extra in ("bias", "all") else None
    window = 4 if extra in ("window", "all") else None
    layout = Layout.of(lengths, max(lengths), torch.device("cpu"))

    def go(impl: Any) -> Callable[..., Tensor]:
        return lambda q, k, v: packed_attention(
            q, k, v, layout, scaling=K**-0.5, causal=causal, bias_HN=bias, window=window, impl=impl
        )

    same(go(impl), go("reference"), heads(T, H, K), heads(T, G, K, prefix=P), heads(T, G, K, prefix=P))


@pytest.mark.parametrize("waste", [0, 3_000])
def test_sequences_of_one_bucket_are_of_about_the_same_length(waste: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order: each of these is nearly as long as the one before it, and the last ten times as long as the
    first."""
    monkeypatch.setitem(BUCKET_WASTE, "cpu", waste)
    lengths = [10]
    while lengths[-1] < 100:
        lengths.append(lengths[-1] * 6 // 5)
    torch.manual_seed(0)
    tensors = [heads(sum(lengths), 2, 8) for _ in range(3)]
    for order in (lengths, lengths[::-1], lengths[::2] + lengths[1::2]):
        layout = Layout.of(tuple(order), max(order), torch.device("cpu"))
        buckets = [bucket.lengths for bucket in layout.buckets]
        assert sum(buckets, ()) == tuple(order) and len(buckets) > 1
        for found in buckets:
            wasted = sum(max(found) ** 2 - n**2 for n in found)
            assert min(found) >= BUCKET_RATIO * max(found) or wasted <= waste

        def go(impl: Any, layout: Layout = layout) -> Callable[..., Tensor]:
            return lambda q, k, v: packed_attention(q, k, v, layout, scaling=0.3, causal=False, impl=impl)

        same(go("sdpa"), go("reference"), *tensors)


def test_nothing_leaks_between_sequences() -> None:
    """The gradient of one sequence's output is zero on all others."""
    layout = Layout.of((4, 6, 3), 6, torch.device("cpu"))
    q, k, v = (heads(13, 2, 8).requires_grad_() for _ in range(3))
    out = packed_attention(q, k, v, layout, scaling=1.0, causal=False)
    for start, n in zip(layout.starts, layout.lengths, strict=True):
        for grad in torch.autograd.grad(out[:, start : start + n].sum(), (q, k, v), retain_graph=True):
            outside = torch.ones(13, dtype=torch.bool)
            outside[start : start + n] = False
            assert not grad[:, :, outside].any() and grad[:, :, ~outside].any()


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packing_and_back(lengths: tuple[int, ...]) -> None:
    width = max(lengths)
    layout = Layout.of(lengths, width, torch.device("cpu"))
    x = torch.randn(len(lengths), width, 3)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    assert torch.equal(layout.pack(x)[0], x[mask])
    assert torch.equal(layout.unpack(layout.pack(x)), x * mask[..., None])


def test_a_plan_for_cuda_does_not_keep_what_only_a_cpu_would() -> None:
    """Scores that are tensors are kept for the backward pass; flash attention on CUDA keeps none."""

    def kept() -> int:
        q, k, v = (heads(64, 4, 8).bfloat16().requires_grad_() for _ in range(3))
        layout, found = Layout.of((32, 32), 32, torch.device("cpu")), [0]

        def count(x: Tensor) -> Tensor:
            found[0] += x.numel() if x.shape[-2:] == (32, 32) else 0
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            packed_attention(q, k, v, layout, scaling=1.0, causal=True)
        return found[0]

    assert kept() > 0
    with planned_for("cuda"):
        assert kept() == 0


def test_flash_attention_of_cuda_takes_grouped_heads_as_they_are() -> None:
    """Its shapes, without a card: k and v are not repeated for each head, and so are not kept that large."""
    q, k, v = (torch.randn(1, H, 8, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for H in (8, 2, 2))
    layout = Layout.of((3, 5), 5, torch.device("meta"))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        out = packed_attention(q, k, v, layout, scaling=0.1, causal=True, window=2, impl="varlen")
    assert out.shape == (1, 8, 8, 64)
    assert kept.count((8, 2, 64)) == 2 and kept.count((8, 8, 64)) <= 2  # q and the result
    out.sum().backward()
    assert k.grad is not None and k.grad.shape == k.shape


def test_attention_on_cuda_asks_for_gradients_in_a_fixed_order() -> None:
    """The mode is on in the operator's own backward pass, and as before in what comes after it."""
    seen: list[tuple[str, int]] = []

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            seen.append((ctx.name, torch.get_deterministic_debug_mode()))
            return gradients[0], None

    x = torch.ones(2, requires_grad=True)
    Mark.apply(repeatable(Mark.apply(Mark.apply(x, "before"), "attention")), "after").sum().backward()
    assert seen == [("after", 0), ("attention", 2), ("before", 0)] and torch.get_deterministic_debug_mode() == 0
    assert repeatable(torch.ones(2)).grad_fn is None


@pytest.mark.parametrize("extra", ["", "grouped", "prefix"])
def test_a_plan_for_cuda_takes_its_flash_attention(extra: str) -> None:
    """On fake tensors, forwards and backwards; the copies of a prefix are each sequence's own keys."""
    from siliang.plan.fake import fake_mode

    P, G = 3 if extra == "prefix" else 0, 2 if extra == "grouped" else 4
    with fake_mode(), planned_for("cuda"):
        shapes = [(1, 4, 8, 16), (1, G, P + 8, 16), (1, G, P + 8, 16)]
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        out = packed_attention(q, k, v, Layout.of((3, 5), 5, torch.device("cpu")), scaling=0.1, causal=True)
        assert out.shape == (1, 8, 4, 16)
        node: Any = out.grad_fn
        assert "varlen" in str(node.next_functions)
        out.sum().backward()
        assert k.grad is not None and k.grad.shape == k.shape


def test_each_sequence_has_the_prefix_before_it() -> None:
    layout = Layout.of((3, 1), 3, torch.device("cpu"))
    places = prefix_places(layout, 2)
    x = torch.tensor([10.0, 11.0, 1.0, 2.0, 3.0, 4.0], requires_grad=True)
    filled = places.fill(x[:, None])[:, 0]
    assert filled.tolist() == [10, 11, 1, 2, 3, 10, 11, 4] and places.bounds.tolist() == [0, 5, 8]
    (gradient,) = torch.autograd.grad((filled * torch.arange(8.0)).sum(), x)
    assert gradient.tolist() == [0 + 5, 1 + 6, 2, 3, 4, 7]
