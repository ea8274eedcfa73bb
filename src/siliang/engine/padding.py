"""Removes the padding of a batch before the model's layers, and restores it after them if the head needs it.

    embeddings (S, W, D)  ->  [ layers: (1, T, D), attention by sequence ]  ->  head: (1, T, D), or (S, W, D) again

Embeddings, positions, prompts, poolers and task heads get the padded batch. The layers, which have nearly all of the
cost, get only its T tokens. Attention goes through transformers' attention interface; BLOOM, which does not use it,
gets the same attention from patches.py. All changes are limited to `PaddingFree.packed`. A trial (trial.py)
shows whether a model gives the same results on packed rows.

Shapes: S sequences, W columns of the padded batch, T tokens, V virtual tokens in front of each sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from siliang.capabilities import why_missing
from siliang.engine.frozen import FrozenCache
from siliang.engine.last_layer import LastLayer, Read
from siliang.engine.patches import attention_implementation, pack_bloom, register_attention
from siliang.engine.trial import WayRefusedError
from siliang.language import Bilingual
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
from siliang.types import message_of

ATTENTION = "siliang_packed"
TRIED = "siliang_tried"  # the same attention, of a model that is tried: it makes its masks, whose windows are noted
UNSUPPORTED = {  # arguments of some attentions, and what they do
    "softcap": Bilingual("caps the scores of its attention (softcap)", "对注意力分数做软截断（softcap）"),
    "s_aux": Bilingual("has attention sinks (s_aux)", "使用注意力汇（attention sink，s_aux）"),
    "position_bias": Bilingual("adds a bias of positions to the scores of its attention", "在注意力分数上加位置偏置"),
}
# arguments that change nothing in an attention: keys are rotated before it
WITHOUT_EFFECT = (
    "position_ids",
    "cache_position",
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
)


class NotPackableError(WayRefusedError):
    """The model has a part that does not work on packed rows."""


class PaddingFree:
    """Runs one model without padding.

    Attributes:
        layout: The layout of the batch in the forward pass; None outside of `packed`.
        layers: The model's layer stack.
        last: The last of them, which may compute the tokens alone that are read.
        frozen: The cache of the lowest layers' output, if it is the same in each epoch.
        readers: The rows of adapters that compute each in its own way: they get the layout.
        head_takes_packed: The modules after the layers work on packed rows, too (GPT-2 reshapes to the padded batch):
            a trial shows it.
        looks_ahead: An attention that has run sees later tokens: no state depends on the beginning alone.
        is_tried: The trial is over: the model makes no masks any more.
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
        register_attention(TRIED, attend, masks=_note_window)
        self._of_masks, self._of_attentions = set[int](), set[int]()  # windows
        self.layout: Layout | None = None
        self.head_takes_packed = self.looks_ahead = self.is_tried = False
        self.readers: list[BatchRows] = []
        self._rows: tuple[tuple[int, ...], int] | None = None
        self._keep_packed = self._share = False
        self._tree: Beginnings | None = None
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}
        self.last = LastLayer(self.layers[-1], self.readers)
        self._blooms = blooms
        self._remove: list[Callable[[], None]] = []
        self.attach()

    def attach(self) -> None:
        """Adds its hooks to the model, if they are not there. Only a model that has them runs without padding."""
        if self._remove:
            return
        handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.layers]
        handles += [layer.register_forward_hook(self._leave) for layer in {self.layers[0], self.layers[-1]}]
        self._remove = [handle.remove for handle in handles] + [pack_bloom(m) for m in self._blooms]

    def close(self) -> None:
        """Removes all hooks from the model."""
        for remove in self._remove:
            remove()
        self._remove = []

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
        noted = _windows.set(self._of_masks)
        try:
            with (
                attention_implementation(self._config, ATTENTION if self.is_tried else TRIED),
                self.last.reading(read) if read else nullcontext(),
            ):
                yield
        finally:
            _windows.reset(noted)
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
            tree = self._tree_behind(virtual, lengths)
            self.layout = Layout.of(lengths, width + virtual, hidden.device, tree, self._note_attention)
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

    def _note_attention(self, causal: bool, window: int | None) -> None:
        self.looks_ahead |= not causal
        if window is not None:
            self._of_attentions.add(window)

    def why_windows_are_lost(self) -> str | None:
        """Of a model that has run in a trial: why packed rows attend too far, or None. Short rows would not show it.

        A window or a chunk that is in the mask alone, and that no attention is told, is lost with the mask.
        """
        types = getattr(self._config.get_text_config(), "layer_types", None)
        if types and not any(part in kind for kind in types for part in ("sliding", "chunked", "local")):
            return None  # the model makes a mask that no layer takes
        lost = min(self._of_masks - self._of_attentions, default=None)
        if lost is None:
            return None
        return Bilingual(
            f"some of its layers see windows or chunks of {lost:,} tokens, which their masks alone know",
            f"有的层只看 {lost:,} 个词元的窗口或分块，而这只写在掩码里",
        )

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


_windows: ContextVar[set[int]] = ContextVar("windows of masks")


def _note_window(*, local_size: int | None = None, **arguments: object) -> None:
    """A function of masks for transformers' interface, which makes none."""
    if local_size is not None:
        _windows.get().add(local_size)


def refuse_unsupported(module: nn.Module, arguments: Mapping[str, object]) -> None:
    """Refuses what packed rows and shared keys do not compute: any argument of an attention that is not known.

    Some choose which tokens are seen (MiniMax-M3's block_indices), which short rows would not show.

    Raises:
        NotPackableError: There is one.
    """
    for argument, value in arguments.items():
        if value is None or value is False or argument in WITHOUT_EFFECT:
            continue
        name = type(module).__name__
        other = Bilingual(
            f"gives its attention {argument}, which is not known here", f"的注意力有未知的参数 {argument}"
        )
        what = UNSUPPORTED.get(argument, other)
        raise NotPackableError(Bilingual(f"{name} {what}", f"{name} {what.zh}"))


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
                f"{type(module).__name__} does not take the mask that its layer is given",
                f"{type(module).__name__} 没有使用所在层得到的掩码",
            )
        )
    refuse_unsupported(module, kwargs)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask.on_attention is not None:
        attention_mask.on_attention(causal, sliding_window)
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
