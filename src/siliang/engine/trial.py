"""The trial of a model: a few short sequences, run as the model itself runs them and in other ways, and compared.

An optimization is on where its way of running them gives the same results, and the same gradients if the model is to be
trained. The gradients are those of a weighted sum of the results: with respect to the embeddings of the tokens, through
all layers, and to the smallest of the trained parameters.

Shapes: S sequences, W columns of the padded batch, V virtual tokens in front of each sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from siliang.data.batch import Batch, tree_of
from siliang.engine.last_layer import Reads
from siliang.engine.trial_batch import of_tokens, sharers, trial_batch, vocabulary_of
from siliang.language import Bilingual, local
from siliang.ops.beginnings import Beginnings
from siliang.secrets import shortened
from siliang.tasks import Task
from siliang.types import first_line, message_of

MOST_NUMBERS = 2**21  # of trained parameters whose gradients are compared, the smallest first
LONGEST_REASON = 100  # characters of an error from the model's code
# Of a difference of results, in standard deviations: above it, it is not rounding. With 32 layers in bf16, roundings
# come to 0.03, and to 0.05 of a gradient (docs/log.md).
LIMIT, LIMIT_OF_HALF = 1e-3, 0.1
LIMIT_OF_ONE = 0.5  # of a single number in half precision, whose largest rounding is a matter of chance
MANY = 16  # numbers of a token whose mean square is not one
# of a difference of gradients, by norm; one that cancels to nearly nothing is measured by this share of the largest
GRADIENT_LIMIT, GRADIENT_LIMIT_OF_HALF = 1e-2, 0.15
SHARE, SHARE_OF_HALF = 1e-3, 0.1
# of the gradient of one token's embedding, measured in the same way: its roundings come to 0.1 with 24 layers in bf16
ROW_LIMIT, ROW_LIMIT_OF_HALF, ROW_SHARE_OF_HALF = 1e-2, 0.25, 0.02


class WayRefusedError(Exception):
    """The model cannot be run in this way. The message is the reason, for the user."""


@dataclass(frozen=True)
class Way:
    """How the sequences are run.

    Attributes:
        packed: Without padding.
        tree: The tree of the sequences, whose shared beginnings are computed once.
        reads: The tokens that the last layer computes; None for all.
        plain: By the model alone, with all its logits.
    """

    packed: bool = True
    tree: Beginnings | None = None
    reads: Reads | None = None
    plain: bool = False


PLAIN, PADDED, PACKED = Way(packed=False, plain=True), Way(packed=False), Way()


@dataclass(frozen=True)
class Output:
    """What the model gives for the sequences.

    Attributes:
        values: What the loss reads.
        others: What else there is of each token, without padding: that no loss reads it hides no fault.
        logits: All of them, (S, V + W, ...), of a model that writes; None unless it was run plainly.
    """

    values: Sequence[Tensor]
    others: Sequence[Tensor] = ()
    logits: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """A run of the sequences.

    Attributes:
        gradients: Of a weighted sum of the values: the first `embedded` of them by the embeddings of tokens.
        chosen: The tokens of the last layer that the values depend on behind it, (S, V + W); None if not known.
    """

    output: Output
    gradients: Sequence[Tensor] = ()
    chosen: Tensor | None = None
    embedded: int = 0


@dataclass
class _Seen:
    """The tensors that passed by in a run."""

    embedded: list[Tensor] = field(default_factory=list[Tensor])
    last: list[Tensor] = field(default_factory=list[Tensor])


class ModelTrial:
    """The trial of one model.

    Attributes:
        batch: The sequences, as a batch of the model's task. The longest end with the padding token.
        alike: The numbers of those that begin with the same tokens.
        tree: The tree of all.
        comparing: Results are compared. False on fake tensors: it only has to run.
        last: The last layer; None if not known.
        passes: How many times the model was run.
    """

    def __init__(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        task: Task,
        run: Callable[[Batch, Way], Output] | None = None,
        *,
        comparing: bool = True,
        gradients: bool = False,
    ) -> None:
        """
        Args:
            model: The module that training calls.
            base: The base model in it.
            run: Runs the sequences.
            gradients: Compare gradients, too.
        """
        self.model, self.base, self.task, self.comparing = model, base, task, comparing
        self.last: nn.Module | None = None
        self.passes = 0
        self._run, self._gradients = run, gradients and comparing and not torch.is_inference_mode_enabled()
        self._kept: dict[Way, Result] = {}
        self.device = next(model.parameters()).device
        self.half = next(p for p in model.parameters() if p.is_floating_point()).dtype != torch.float32
        with unset_fake_temporarily():
            batch = trial_batch(task, vocabulary_of(base), getattr(base.config, "pad_token_id", None))
            self.alike = sharers(batch.lengths)
            self.tree = tree_of(batch.inputs, batch.lengths, least=1)
            self.batch = batch.to(self.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block the sequences may be run: in eval mode, and without gradients unless they are compared."""
        with modes(self.model, training=False), stirred(self.model) if self.comparing else nullcontext():
            try:
                with torch.no_grad():
                    yield
            finally:
                self.forget()

    def forget(self) -> None:
        """Forgets earlier runs, after a change of the way in which all are run."""
        self._kept.clear()

    def output(self, way: Way) -> Output:
        """Runs the sequences."""
        assert self._run is not None
        self.passes += 1
        return self._run(self.batch, way)

    def of(self, way: Way) -> Result:
        """A run of the sequences, which may be an earlier one.

        Raises:
            Exception: Of any kind: the model's code may not allow this way.
        """
        if way not in self._kept:
            self._kept[way] = self._result(way)
        return self._kept[way]

    def in_training_mode(self) -> None:
        """Runs the sequences as in training, dropout included."""
        with modes(self.model, training=True):
            self.output(PACKED)

    def _result(self, way: Way) -> Result:
        finds = way is PLAIN and self.comparing and self.last is not None and not self.task.writes
        seen = _Seen()
        with ExitStack() as stack:
            if self._gradients:
                stack.enter_context(_watched(self.base.get_input_embeddings(), seen.embedded))
            if finds and self.last is not None and not torch.is_inference_mode_enabled():
                stack.enter_context(_watched(self.last, seen.last))
            stack.enter_context(torch.set_grad_enabled(self._gradients or bool(finds)))
            output = self.output(way)
            total = sum((x.float() * _weights(x)).sum() for x in output.values)
        gradients: list[Tensor] = []
        chosen = None
        if isinstance(total, Tensor) and total.requires_grad:
            if self._gradients:
                gradients, chosen = self._differentiate(total, seen)
            else:
                with suppress(Exception):  # where weights are gathered for the forward pass alone
                    chosen = _changing(torch.autograd.grad(total, seen.last)[0])
        output = Output([x.detach() for x in output.values], [x.detach() for x in output.others], output.logits)
        return Result(output, gradients, chosen, len(seen.embedded) if gradients else 0)

    def _differentiate(self, total: Tensor, seen: _Seen) -> tuple[list[Tensor], Tensor | None]:
        wanted = [*seen.last, *seen.embedded, *self._trained()]
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        full = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
        chosen = _changing(full.pop(0)) if seen.last else None
        here = len(seen.embedded)
        return [*map(self._of_tree, full[:here]), *full[here:]], chosen

    def _of_tree(self, gradient: Tensor) -> Tensor:
        """The gradient of the batch's embeddings, by token of the tree: a shared token has it all in one sequence, and
        separate ones in each. Of other embeddings, such as virtual tokens, as it is."""
        if self.tree is None or gradient.shape[:2] != self.batch.inputs["input_ids"].shape:
            return gradient
        tokens = torch.from_numpy(np.concatenate(self.tree.of_sequences)).to(gradient.device)
        found = gradient.new_zeros(self.tree.tokens, *gradient.shape[2:])
        return found.index_add_(0, tokens, of_tokens(gradient, self.batch))

    def _trained(self) -> Iterator[Tensor]:
        """The smallest trained parameters."""
        left = MOST_NUMBERS
        for p in sorted((p for p in self.model.parameters() if p.requires_grad), key=Tensor.numel):
            left -= p.numel()
            if left < 0:
                return
            yield p

    # ---- comparing ----

    def differs(
        self, way: Way, other: Way, what: Bilingual, than: Bilingual, *, by_column: bool = False
    ) -> Bilingual | None:
        """Runs the sequences in a way. Returns why that is not as good as another one, or None if they differ by
        rounding.

        Args:
            what: What has other results and gradients, a plural.
            than: What they are compared with.
            by_column: A difference is measured by the spread of its column.

        Raises:
            Exception: Of any kind: the model's code may not allow this way.
        """
        if not self.comparing:
            self.output(way)
            return None
        found = self._kept[way] = self._result(way)
        expected = self.of(other)
        pairs = [*zip(found.output.values, expected.output.values, strict=True)]
        if found.output.others:
            pairs += zip(found.output.others, expected.output.others, strict=True)
        off = max((_offset(a, b, by_column=by_column, half=self.half) for a, b in pairs), key=_badness, default=0.0)
        if not off <= (LIMIT_OF_HALF if self.half else LIMIT):
            return _other(Bilingual("results", "结果"), what, than, off)
        first = found.embedded
        rows = zip(found.gradients[:first], expected.gradients[:first], strict=True)
        off = max(
            (_row_offset(a, b, ROW_SHARE_OF_HALF if self.half else SHARE) for a, b in rows), key=_badness, default=0.0
        )
        if off <= (ROW_LIMIT_OF_HALF if self.half else ROW_LIMIT):
            off = _gradient_offset(found.gradients, expected.gradients, SHARE_OF_HALF if self.half else SHARE)
            if off <= (GRADIENT_LIMIT_OF_HALF if self.half else GRADIENT_LIMIT):
                return None
        return _other(Bilingual("gradients", "梯度"), what, than, off)


def _other(kind: Bilingual, what: Bilingual, than: Bilingual, off: float) -> Bilingual:
    return Bilingual(
        f"{what} give other {kind} than {than} (by {off:.1g} of their size)",
        f"{what.zh}与{than.zh}的{kind.zh}不同（相差其大小的 {off:.1g} 倍）",
    )


def trial_error(error: Exception, what: str) -> str:
    """The reason of a failed trial for the user: what failed, and the text of the error."""
    if isinstance(error, WayRefusedError):
        return message_of(error)
    words = shortened(first_line(error, kind=True), LONGEST_REASON, " ...")
    return Bilingual(f"this model cannot run {what} ({words})", f"这个模型不能{local(what, 'zh')}（{words}）")


def _offset(a: Tensor, b: Tensor, *, by_column: bool, half: bool) -> float:
    """The largest difference, in standard deviations of b. In half precision that of a token, if it has many numbers,
    by the root of their mean square; one number may be further off."""
    a, b = a.float(), b.float()
    if a.shape != b.shape:
        return float("inf")
    if not b.numel():
        return 0.0
    found, spread = (a - b).abs(), b.std(0, correction=0) if by_column else b.std(correction=0)
    found = found / (spread + 1e-6)
    if half and found.dim() > 1 and found.shape[-1] >= MANY:
        found = found.square().mean(-1).sqrt()
    elif half:
        found = found * (LIMIT_OF_HALF / LIMIT_OF_ONE)
    return float(found.max())


def _gradient_offset(found: Sequence[Tensor], expected: Sequence[Tensor], share: float) -> float:
    """The largest difference by norm, relative to the gradient's own norm and a share of the largest gradient's."""
    sizes = [g.float().norm() for g in expected]
    least = share * max(sizes, default=0.0) + 1e-12
    offsets = (
        float((a.float() - b.float()).norm() / (size + least))
        for a, b, size in zip(found, expected, sizes, strict=True)
    )
    return max(offsets, key=_badness, default=0.0)


def _row_offset(found: Tensor, expected: Tensor, share: float) -> float:
    """The same of each token's gradient, (..., D): of many tokens, one wrong one is a small part of all."""
    sizes = expected.float().norm(dim=-1)
    if not sizes.numel():
        return 0.0
    offsets = (found.float() - expected.float()).norm(dim=-1) / (sizes + share * sizes.max() + 1e-12)
    return float(offsets.max())


def _badness(off: float) -> float:
    return off if off == off else float("inf")


def _changing(gradient_SWD: Tensor) -> Tensor:
    """The tokens whose gradient is not zero, (S, V + W)."""
    return gradient_SWD.ne(0).any(-1)


def _weights(x: Tensor) -> Tensor:
    """Any numbers, the same each time, so that no part of a sum of results is like another."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)


# ---- the model ----


@contextmanager
def modes(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Within the block the model is in training mode, or in eval mode. Each module is in its own mode again afterwards:
    they may differ."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def stirred(model: nn.Module) -> Iterator[None]:
    """Within the block, trained parameters that are all zero are random: at the start of a training many parts of
    methods change nothing, and a trial would not see them."""
    generator = torch.Generator().manual_seed(0)
    changed: list[Tensor] = []
    for p in model.parameters():
        own = p.to_local() if isinstance(p, DTensor) else p
        if p.requires_grad and p.is_floating_point() and own.numel() and not own.detach().any():
            own.detach().copy_(0.1 * torch.randn(own.shape, generator=generator))
            changed.append(own.detach())
    try:
        yield
    finally:
        for own in changed:
            own.zero_()


@contextmanager
def _watched(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Within the block the module's outputs are appended to the list, as tensors that a gradient can be asked of."""

    def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        found = output[0] if isinstance(output, tuple) else output
        if not found.requires_grad:
            found = found.detach().requires_grad_()
        seen.append(found)
        copied = found.clone()  # what follows may write into it
        return (copied, *output[1:]) if isinstance(output, tuple) else copied

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
