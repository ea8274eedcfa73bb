"""Which tokens of a batch are read behind the last layer: those with a label, or one of each sequence. Found by trial.

A model that writes reads the states of its labelled tokens. What a classifier reads follows from its code: the first
token, the last one, the last that is not the padding token. The gradient of its results says which it is for the
sequences of a trial. Then the last layer computes only those, with zeros in the place of the others, and has to give
the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from siliang.data.batch import Batch
from siliang.engine.last_layer import LastLayer, Read, Reads
from siliang.engine.trial import PACKED, PLAIN, ModelTrial, Way, trial_error
from siliang.language import Bilingual
from siliang.ops.layout import Layout
from siliang.ops.place import kind_of
from siliang.ops.read_attention import ReadLayout
from siliang.peft_api.model import PeftModel

MOST_READ = 0.9  # share of a batch's tokens above which the last layer computes all
SOME, ALL = Bilingual("some tokens alone", "只算部分词元"), Bilingual("all of them", "计算所有词元")
Place = Callable[[Batch, Layout], Tensor]  # where the token that is read is in its sequence, (S,), virtual ones first


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


def one_of_each(place: Place, batch: Batch) -> Read:
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


def find_reads(trial: ModelTrial, last: LastLayer, padding: int | None) -> tuple[Reads | None, str | None]:
    """What is read, None for all tokens; and why all are computed where that is not what the model reads.

    Args:
        padding: The model's padding token, if it has one.
    """
    if (reason := _needs_all_tokens(trial.model)) is not None:
        return None, reason
    try:
        return _find(trial, last, padding) if trial.comparing else (_find_on_fake(trial, last), None)
    except Exception as error:  # a model may raise any exception in a trial
        return None, trial_error(error, Bilingual("some tokens alone in its last layer", "在最后一层只算部分词元"))
    finally:
        last.filler = 0.0


def _find(trial: ModelTrial, last: LastLayer, padding: int | None) -> tuple[Reads | None, str | None]:
    last.filler = float("nan")
    if trial.task.writes:
        reason = _differs(trial, last, partial(labelled, always=True))
        return (labelled, None) if reason is None else (None, reason)
    places: list[Place] = [_first, _last, _first_of_text]
    if padding is not None:
        places.insert(0, partial(_last_but, padding))
    chosen = trial.of(PLAIN).chosen
    known = chosen is not None
    if chosen is not None:
        places = [place for place in places if torch.equal(chosen, _read_at(place, trial.batch, chosen))]
    why, others = None, known
    for place in places:
        reads: Reads = partial(one_of_each, place)
        if (reason := _differs(trial, last, reads)) is not None:
            why, others = reason, True
        elif others:  # not a model whose results are all alike
            return reads, None
    return None, why if known else None


def _read_at(place: Place, batch: Batch, chosen_SW: Tensor) -> Tensor:
    """The tokens of the padded batch, (S, V + W), that would be read."""
    S, width = chosen_SW.shape
    layout = Layout.of(tuple(n + width - batch.width for n in batch.lengths), width, chosen_SW.device)
    found = torch.zeros_like(chosen_SW)
    found[torch.arange(S, device=found.device), place(batch, layout)] = True
    return found


def _differs(trial: ModelTrial, last: LastLayer, reads: Reads) -> Bilingual | None:
    """Why the results of these tokens alone are others, without skipping linear layers if need be."""
    for last.skips in (True, False):
        try:
            reason = trial.differs(Way(reads=reads), PACKED, SOME, ALL, by_column=True)
        except Exception:
            if not last.skips:
                raise
            continue
        if reason is None or not last.skips:
            return reason
    return None


def _find_on_fake(trial: ModelTrial, last: LastLayer) -> Reads | None:
    if trial.task.writes:
        trial.output(Way(reads=partial(labelled, always=True)))
        return labelled
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        states = output[0] if isinstance(output, tuple) else output
        leaves.append(states.detach().requires_grad_())
        return (leaves[0], *output[1:]) if isinstance(output, tuple) else leaves[0]

    handle = last.layer.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            found = trial.output(PACKED).values
    finally:
        handle.remove()
    if not picks_tokens(found, leaves[0]):
        return None
    reads: Reads = partial(one_of_each, _first)  # whichever it is takes as much memory
    trial.output(Way(reads=reads))
    return reads


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


def _needs_all_tokens(model: nn.Module) -> str | None:
    """Why an adapter needs all tokens of a batch; None if none does."""
    injection = model.injection if isinstance(model, PeftModel) else None
    if injection is None:
        return None
    layers = (layer for name in injection.active for layer in injection.adapters[name].layers.values())
    return next((layer.NEEDS_ALL_TOKENS for layer in layers if layer.NEEDS_ALL_TOKENS is not None), None)
