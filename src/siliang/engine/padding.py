"""Removes the padding of a batch before the model's layers, and restores it after them if the head needs it.

    embeddings (S, W, D)  ->  [ layers: (1, T, D), attention by sequence ]  ->  head: (1, T, D), or (S, W, D) again

Embeddings, positions, prompts, poolers and task heads get the padded batch. The layers, which have nearly all of the
cost, get only its T tokens. Attention goes through transformers' attention interface; BLOOM, which does not use it,
gets the same attention from patches.py. All changes are limited to `PaddingFree.packed`. `PaddingFree.why_not`
verifies on a few tokens that a model gives the same results on packed rows.

Shapes: S sequences, W columns of the padded batch, T tokens, V virtual tokens in front of each sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from siliang.capabilities import why_missing
from siliang.engine.frozen import FrozenCache
from siliang.engine.last_layer import LastLayer, Read
from siliang.engine.patches import attention_implementation, pack_bloom, register_attention
from siliang.engine.splits import mixing
from siliang.language import Bilingual, local
from siliang.methods.batch_rows import BatchRows
from siliang.models.introspect import (
    NoLayerStackError,
    is_bloom_attention,
    is_encoder_decoder,
    layer_stack,
    named_arguments,
    parameters_of,
)
from siliang.ops.beginnings import Beginnings
from siliang.ops.layout import Layout
from siliang.ops.read_attention import attention
from siliang.secrets import shortened
from siliang.types import first_line, message_of

ATTENTION = "siliang_packed"
LONGEST_REASON = 100  # characters of an error from the model's code
UNSUPPORTED = (
    "softcap",
    "s_aux",
    "position_bias",
)  # arguments of some attentions


class NotPackableError(Exception):
    """The model has a part that does not work on packed rows."""


class PaddingFree:
    """Runs one model without padding.

    Attributes:
        layout: The layout of the batch in the forward pass; None outside of `packed`.
        layers: The model's layer stack.
        last: The last of them, which may compute the tokens alone that are read.
        frozen: The cache of the lowest layers' output, if it is the same in each epoch.
        readers: The rows of adapters that compute each in its own way: they get the layout.
        head_takes_packed: The modules after the layers work on packed rows, too (GPT-2 reshapes to the padded batch).
            `why_not` determines it.
        looks_ahead: An attention that has run sees later tokens: no state depends on the beginning alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Prepares `model`, the base model with its attached method.

        Raises:
            NotPackableError: The model cannot run on packed rows, or the installed libraries lack a capability.
        """
        blooms = [m for m in model.modules() if is_bloom_attention(m)]
        for needed in ("packed rows", "packed rows of BLOOM") if blooms else ("packed rows",):
            if (missing := why_missing(needed)) is not None:
                raise NotPackableError(missing)
        if is_encoder_decoder(model):
            raise NotPackableError(
                Bilingual(
                    "an encoder-decoder's cross-attention needs the padded rows",
                    "编码器-解码器模型的交叉注意力需要填充后的行",
                )
            )
        self._config = model.config
        try:
            self.layers = layer_stack(model)
        except NoLayerStackError as error:
            raise NotPackableError(message_of(error)) from None
        self.frozen: FrozenCache | None = None
        register_attention(ATTENTION, attend)
        self.layout: Layout | None = None
        self.head_takes_packed = self.looks_ahead = False
        self.readers: list[BatchRows] = []
        self._rows: tuple[tuple[int, ...], int] | None = None
        self._keep_packed = self._share = False
        self._tree: Beginnings | None = None
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}
        self.last = LastLayer(self.layers[-1], self.readers)
        self._handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.layers]
        self._handles += [layer.register_forward_hook(self._leave) for layer in {self.layers[0], self.layers[-1]}]
        self._undo = [pack_bloom(m) for m in blooms]

    def close(self) -> None:
        """Removes all hooks from the model."""
        for handle in self._handles:
            handle.remove()
        for restore in self._undo:
            restore()

    @contextmanager
    def packed(
        self,
        lengths: tuple[int, ...],
        width: int,
        *,
        keep_packed: bool = False,
        share: bool = False,
        tree: Beginnings | None = None,
        read: Read | None = None,
    ) -> Iterator[None]:
        """Within the block, which must include the backward pass, the model's layers run without padding.

        Args:
            lengths: Tokens of each sequence of the batch, which is padded on the right.
            width: The columns of the padded batch.
            keep_packed: The modules after the layers get (1, T, D), too.
            share: Virtual tokens may be computed once, as all beginnings that sequences share.
            tree: The tree of the sequences, if they are to share their beginnings.
            read: Chooses the tokens that the last layer computes; None for all. Then T is their number, and there are
                zeros in the places of the others.
        """
        self._rows, self._keep_packed = (lengths, width), keep_packed
        self._share, self._tree = share, tree
        try:
            with (
                attention_implementation(self._config, ATTENTION),
                self.last.reading(read) if read else nullcontext(),
            ):
                yield
        finally:
            self.looks_ahead |= self.layout is not None and False in self.layout.causal
            self.layout = self._rows = self._tree = None
            for reader in self.readers:
                reader.layout = None
            self._packed.clear()

    def _enter(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[Tensor], dict[str, object]] | None:
        if self._rows is None:
            return None
        named = named_arguments(layer, args, kwargs)
        parameters = parameters_of(layer)
        hidden = named.pop(next(iter(parameters)))
        if layer is self.layers[0]:
            lengths, width = self._rows
            virtual = hidden.shape[1] - width
            lengths = tuple(n + virtual for n in lengths)
            self.layout = Layout.of(lengths, width + virtual, hidden.device, self._tree_behind(virtual, lengths))
            hidden = self.layout.pack(hidden)
            for reader in self.readers:
                reader.layout = self.layout
        if self.frozen is not None and layer is self.layers[self.frozen.count]:
            assert self.layout is not None
            hidden = self.frozen.exchange(hidden, self.layout)
        assert self.layout is not None
        packed = {key: self._pack(value) for key, value in named.items()}
        if "attention_mask" in parameters:
            packed["attention_mask"] = self.layout
        return (hidden,), packed

    def _tree_behind(self, virtual: int, lengths: tuple[int, ...]) -> Beginnings | None:
        """The tree behind so many virtual tokens, which are the same in all sequences of these lengths."""
        if self._tree is not None or not virtual or not self._share:
            return self._tree and self._tree.behind(virtual)
        tree = Beginnings.apart([n - virtual for n in lengths]).behind(virtual)
        return tree if tree.saves(sum(lengths)) else None

    def _leave(
        self, layer: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...] | None:
        if self.frozen is not None and layer is self.layers[0]:
            self.frozen.note_output(output)
        if layer is not self.layers[-1] or self._rows is None or self._keep_packed:
            return None
        layout = self.last.layout or self.layout
        assert layout is not None
        if isinstance(output, tuple):
            return (layout.unpack(output[0]), *output[1:])
        return layout.unpack(output)

    def _pack(self, value: object) -> object:
        """Packs rotary tables, positions and other tensors with a row per column of the batch, each once per step."""
        if isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value):
            return tuple(map(self._pack, value))
        layout = self.layout
        assert layout is not None
        S = len(layout.lengths)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != layout.width:
            return value
        if value.shape[0] not in (1, S):
            return value
        if id(value) not in self._packed:
            packed = layout.pack(value.expand(S, *value.shape[1:]))
            self._packed[id(value)] = (value, packed)  # keep the value: its id stays unique while it exists
        return self._packed[id(value)][1]

    @torch.no_grad()
    def why_not(self, model: nn.Module, vocabulary: int, *, comparing: bool = True, **more: object) -> str | None:
        """Runs three short sequences packed and padded.

        Args:
            model: The module that training calls.
            comparing: Compare the results. False: only check that it runs.
            more: Further arguments of the model.

        Returns:
            Why this model cannot use packed rows; None if both give the same results.
        """
        if mixed := mixing(model):
            return Bilingual(
                f"{mixed[0]} takes a mean over the whole padded batch", f"{mixed[0]} 对整个填充后的批次取平均"
            )
        lengths, width = (5, 2, 4), 5
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(min(5, vocabulary - 1), vocabulary, (3, width), generator=generator)
        mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
        batch = {"input_ids": (ids * mask).to(device), "attention_mask": mask.long().to(device)}
        training = model.training
        model.eval()
        try:
            with suppress(Exception), self.packed(lengths, width, keep_packed=True):
                model(**batch, **more, **no_cache(model))
                self.head_takes_packed = True
            if self.head_takes_packed and not comparing:
                return None
            padded = model(**batch, **more, **no_cache(model))
            with self.packed(lengths, width):
                packed = model(**batch, **more, **no_cache(model))
        except Exception as error:  # a model may raise any exception on packed rows
            return trial_error(error, Bilingual("packed rows", "运行打包的样本"))
        finally:
            model.train(training)
        if not comparing:
            return None
        if (off := offset_of(model, padded, packed, mask)) is None:
            return None
        return Bilingual(
            f"packed rows give other results than padded ones (by {off:.1g} of their spread)",
            f"打包的样本与填充的样本结果不同（相差标准差的 {off:.1g} 倍）",
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function for transformers' interface: (1, H, T, K) in, (1, T, H, K) out."""
    if not isinstance(attention_mask, Layout):
        raise NotPackableError(
            Bilingual(
                f"{type(module).__name__} lost the layout on the way", f"{type(module).__name__} 中途丢失了打包布局"
            )
        )
    if wanted := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
        raise NotPackableError(
            Bilingual(f"{type(module).__name__} wants {wanted[0]}", f"{type(module).__name__} 需要 {wanted[0]}")
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    attention_mask.causal.add(causal)
    if attention_mask.tree is not None and not causal:
        raise NotPackableError(
            Bilingual(f"{type(module).__name__} sees later tokens", f"{type(module).__name__} 能看到后面的词元")
        )
    if sliding_window is not None and not causal:  # a two-sided window: short rows would not detect it
        raise NotPackableError(
            Bilingual(
                f"{type(module).__name__} has a window to both sides", f"{type(module).__name__} 使用双向滑动窗口"
            )
        )
    out = attention(
        query,
        key,
        value,
        attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal,
        window=sliding_window,
        dropout_p=dropout,
    )
    return out, None


def offset_of(model: nn.Module, expected: Any, found: Any, mask: Tensor) -> float | None:
    """How far two outputs of a model differ, relative to their spread; None if that is rounding.

    Args:
        mask: The tokens of the padded batch, (S, W).
    """
    limit = 1e-3 if dtype_of(model) == torch.float32 else 0.2
    for one, other in zip(_answers(expected, mask), _answers(found, mask), strict=True):
        off = float((one - other).abs().max()) / (float(one.std()) + 1e-6)
        if not off <= limit:
            return off
    return None


def _answers(output: Any, mask: Tensor) -> list[Tensor]:
    """The model's logits or states; if it has one per token, without those of padding."""
    if hasattr(output, "start_logits"):  # each (S, W)
        return [_of_tokens(output.start_logits, mask), _of_tokens(output.end_logits, mask)]
    first = (output[0] if not hasattr(output, "logits") else output.logits).float().cpu()
    return [_of_tokens(first, mask) if first.dim() == 3 and first.shape[1] >= mask.shape[1] else first]


def _of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    return values.float().cpu()[:, values.shape[1] - mask.shape[1] :][mask]  # virtual tokens come first


def trial_error(error: Exception, what: str) -> str:
    """The reason of a failed trial for the user: what failed, and the text of the error."""
    if isinstance(error, NotPackableError):
        return message_of(error)
    words = shortened(first_line(error, kind=True), LONGEST_REASON, " ...")
    return Bilingual(f"this model cannot run {what} ({words})", f"这个模型不能{local(what, 'zh')}（{words}）")


def no_cache(model: nn.Module) -> dict[str, bool]:
    """The argument with which a decoder keeps no keys and values."""
    return {"use_cache": False} if getattr(getattr(model, "config", None), "is_decoder", False) else {}


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the model's weights."""
    return next(p for p in model.parameters() if p.is_floating_point()).dtype
