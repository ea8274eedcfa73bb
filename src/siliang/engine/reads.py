"""Which tokens of a batch are read behind the last layer: those with a label, or one of each sequence. Found by trial.

A model that writes reads the states of its labelled tokens. What a classifier reads follows from its code: the first
token, the last one, the last that is not the padding token. The trial runs a few short sequences with the last layer
computing all tokens, and then only those, with zeros in the place of the others: it is that reading which gives the
same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor

from siliang.data.batch import Batch
from siliang.data.collate import PadCollator
from siliang.engine.batches import StepCollator
from siliang.engine.last_layer import LastLayer, Read
from siliang.engine.padding import dtype_of, trial_error
from siliang.language import Bilingual
from siliang.ops.layout import Layout
from siliang.ops.place import kind_of
from siliang.ops.read_attention import ReadLayout
from siliang.peft_api.model import PeftModel
from siliang.tasks import Task

MOST_READ = 0.9  # share of a batch's tokens above which the last layer computes all
LENGTHS = (5, 2, 4, 3)  # of a trial's sequences
Reads = Callable[[Batch], Read | None]  # what is read of a batch; None for all


def labelled(batch: Batch, *, always: bool = False) -> Read | None:
    """The tokens that predict a labelled one. Not on CUDA, where nobody has measured whether it pays."""
    found = sum(batch.labelled)
    if batch.targets is None or not found or (found > MOST_READ * batch.distinct_tokens and not always):
        return None
    if kind_of(batch.targets) == "cuda":
        return None
    _, sequences, columns = batch.targets

    def read(layout: Layout) -> ReadLayout:
        at = (layout.width - batch.width) + columns
        rows = _tokens_at(layout, sequences, at)
        index = sequences * layout.width + at
        return ReadLayout(batch.labelled, layout.width, index, whole=layout, rows=rows, alone=False)

    return read


def one_of_each(place: Callable[[Batch, Layout], Tensor], batch: Batch) -> Read:
    """One token of each sequence.

    Args:
        place: Where it is in its sequence, (S,), virtual tokens first.
    """

    def read(layout: Layout) -> ReadLayout:
        at, S = place(batch, layout), len(layout.lengths)
        sequences = torch.arange(S, device=at.device)
        rows, index = _tokens_at(layout, sequences, at), sequences * layout.width + at
        # of shared beginnings, whose keys are those of several texts, the attention computes all tokens
        return ReadLayout((1,) * S, layout.width, index, whole=layout, rows=rows, alone=layout.tree is None)

    return read


def _tokens_at(layout: Layout, sequences: Tensor, places: Tensor) -> Tensor:
    """The tokens in these places of these sequences."""
    if layout.tree is not None:
        return layout.places[sequences, places]
    return torch.tensor(layout.starts, device=places.device)[sequences] + places


def _last(batch: Batch, layout: Layout) -> Tensor:
    return torch.tensor(layout.lengths, device=layout.index.device) - 1


def _first(batch: Batch, layout: Layout) -> Tensor:
    return torch.zeros(len(layout.lengths), dtype=torch.long, device=layout.index.device)


def _first_of_text(batch: Batch, layout: Layout) -> Tensor:
    return _first(batch, layout) + (layout.width - batch.width)


def _last_but(padding: int, batch: Batch, layout: Layout) -> Tensor:
    """The last token that is not the padding token: transformers looks at nothing else."""
    ids = batch.inputs["input_ids"]
    columns = torch.arange(batch.width, device=ids.device) * (ids != padding)
    return torch.minimum(columns.argmax(-1) + (layout.width - batch.width), _last(batch, layout))


class ReadingTrial:
    """Finds what is read.

    Args:
        run: What the model gives for a batch, with a reading.
        model: The module that training calls.
        writes: It reads labelled tokens.
        padding: The model's padding token, if it has one.
    """

    def __init__(
        self,
        last: LastLayer,
        run: Callable[[Batch, Reads | None], list[Tensor]],
        model: nn.Module,
        task: Task,
        vocabulary: int,
        padding: int | None,
    ) -> None:
        self._last, self._run, self._model, self._task = last, run, model, task
        self._vocabulary, self._padding = vocabulary, padding
        self._limit = 1e-3 if dtype_of(model) == torch.float32 else 0.2

    def find(self, *, comparing: bool = True) -> tuple[Reads | None, str | None]:
        """What is read, None for all tokens; and why all are computed where that is not what the model reads.

        Args:
            comparing: Compare the results. False on fake tensors: it only has to run.
        """
        if (reason := _needs_all_tokens(self._model)) is not None:
            return None, reason
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), stirred(self._model) if comparing else nullcontext():
                return self._find() if comparing else (self._find_on_fake(), None)
        except Exception as error:  # a model may raise any exception in a trial
            return None, trial_error(error, Bilingual("some tokens alone in its last layer", "在最后一层只算部分词元"))
        finally:
            self._last.filler = 0.0
            self._model.train(training)

    def _find(self) -> tuple[Reads | None, str | None]:
        batch = self._batch()
        expected = self._run(batch, None)
        self._last.filler = float("nan")
        if self._task.writes:
            if self._agrees(batch, partial(labelled, always=True), expected):
                return labelled, None
            return None, Bilingual("its result for some tokens alone is another", "只算部分词元时结果不同")
        places = [_first, _last, _first_of_text]
        if self._padding is not None:
            places.insert(0, partial(_last_but, self._padding))
        found, others = list[Reads](), 0
        for place in places:
            reads: Reads = partial(one_of_each, place)
            if self._agrees(batch, reads, expected):
                found.append(reads)
            else:
                others += 1
            if found and others:  # not a model whose results are all alike
                return found[0], None
        return None, None

    def _find_on_fake(self) -> Reads | None:
        with unset_fake_temporarily():
            batch = self._batch()
        if self._task.writes:
            self._run(batch, partial(labelled, always=True))
            return labelled
        leaves: list[Tensor] = []

        def cut(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
            states = output[0] if isinstance(output, tuple) else output
            leaves.append(states.detach().requires_grad_())
            return (leaves[0], *output[1:]) if isinstance(output, tuple) else leaves[0]

        handle = self._last.layer.register_forward_hook(cut)
        try:
            with torch.enable_grad():
                found = self._run(batch, None)
        finally:
            handle.remove()
        if not picks_tokens(found, leaves[0]):
            return None
        reads: Reads = partial(one_of_each, _first)  # whichever it is takes as much memory
        self._run(batch, reads)
        return reads

    def _agrees(self, batch: Batch, reads: Reads, expected: Sequence[Tensor]) -> bool:
        """Whether the results are the same: if need be, without skipping linear layers."""
        for skips in (True, False):
            self._last.skips = skips
            try:
                if same(self._run(batch, reads), expected, self._limit):
                    return True
            except Exception:
                if not skips:
                    raise
        return False

    def _batch(self) -> Batch:
        """A few short sequences of random tokens; one of them ends with the padding token."""
        pad = self._padding or 0
        rows = [self._task.synthetic_row(n, 2) for n in LENGTHS]
        (batch,) = StepCollator(PadCollator(pad), self._task, len(rows))(rows)["batches"]
        ids = batch.inputs["input_ids"]
        low = min(5, self._vocabulary - 1)
        random = torch.randint(low, self._vocabulary, ids.shape, generator=torch.Generator().manual_seed(0))
        lengths = torch.tensor(batch.lengths)[:, None]
        columns = torch.arange(ids.shape[1])[None]
        random = torch.where(random == pad, low if low != pad else low - 1, random)
        ids.copy_(torch.where((columns < lengths) & ~((columns == lengths - 1) & (lengths == LENGTHS[0])), random, pad))
        if batch.targets is not None:  # labels of every other token
            batch.targets = batch.targets[:, (batch.targets[1] + batch.targets[2]) % 2 == 0]
            batch.labelled = tuple(torch.bincount(batch.targets[1], minlength=len(batch.lengths)).tolist())
        return batch.to(next(self._model.parameters()).device)


def same(found: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> bool:
    """Whether results are the same but for rounding.

    Args:
        limit: Of a difference, in standard deviations of the values of one column.
    """
    for a, b in zip(found, expected, strict=True):
        a, b = a.float(), b.float()
        if a.shape != b.shape or not bool(((a - b).abs() <= limit * (b.std(0, correction=0) + 1e-6)).all()):
            return False
    return True


def picks_tokens(found: Sequence[Tensor], states: Tensor) -> bool:
    """Whether results are read from single tokens of the last layer's states, on fake tensors: autograd finds a choice
    of places on each way back.

    Args:
        states: (S, W, D), a leaf of the graph.
    """
    S, W = states.shape[:2]
    seen, nodes, reached = set[object](), [x.grad_fn for x in found], False
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is states:
            return False
        sizes = getattr(node, "_saved_self_sym_sizes", ())
        if node.name() in ("SelectBackward0", "IndexBackward0", "GatherBackward0") and tuple(sizes[:2]) == (S, W):
            reached = True
            continue
        nodes += [following for following, _ in node.next_functions]
    return reached


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a model's output."""
    return [x for x in output.values() if isinstance(x, Tensor) and x.is_floating_point()]


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


def _needs_all_tokens(model: nn.Module) -> str | None:
    """Why an adapter needs all tokens of a batch; None if none does."""
    injection = model.injection if isinstance(model, PeftModel) else None
    if injection is None:
        return None
    layers = (layer for name in injection.active for layer in injection.adapters[name].layers.values())
    return next((layer.NEEDS_ALL_TOKENS for layer in layers if layer.NEEDS_ALL_TOKENS is not None), None)
