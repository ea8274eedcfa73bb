"""The rows of the batch that a model computes: of which row each place of a layer's input is.

Whatever computes each row in its own way asks this: an adapter with several tasks or experts, and a batch that mixes
adapters. What the answer needs is known, not guessed from an input's shape: how many rows and columns the batch has,
from the model's forward; whether its padding is gone, from what takes it out; and whether a layer reads every token in
its place, from the layer's place in the model (`models.introspect.is_routed`).

Shapes: B rows of the batch, N tokens of a padded row, T tokens of all rows once the padding is gone, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.models.introspect import backbone, encoder, is_encoder_decoder
from siliang.ops.layout import Layout
from siliang.types import ConfigError


class BatchRows:
    """The rows of the batch. The model's forward begins a batch; the backward pass, which may compute layers again,
    still finds it.

    Attributes:
        rows, device: B, and where the batch is.
        layout: Where the rows lie while the batch has no padding: set by the code that removes the padding.
        setting: What asks, for errors: a setting or an argument.
        mixes_layers: What a layer adds follows from something that is trained outside of it.
    """

    mixes_layers: ClassVar[bool] = False
    REMEDY: ClassVar[Bilingual] = Bilingual(
        "Leave the layer out of target_modules.", "请从 target_modules 中去掉这一层。"
    )

    def __init__(self, setting: str) -> None:
        self.layout: Layout | None = None
        self.rows, self.device, self.setting = 0, torch.device("cpu"), setting
        self._widths: set[int] = set()

    def watch(self, model: nn.Module) -> Callable[[], None]:
        """Hooks through which the model's forward begins a batch.

        Returns:
            A function that removes them.
        """
        hosts: dict[nn.Module, None] = dict.fromkeys(
            [model, backbone(model), *([encoder(model)] if is_encoder_decoder(model) else [])]
        )
        hooks = [
            host.register_forward_pre_hook(partial(self._enter, host is model), with_kwargs=True) for host in hosts
        ]

        def remove() -> None:
            for hook in hooks:
                hook.remove()

        return remove

    def _enter(self, whole: bool, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tokens = token_tensors(args, kwargs)
        if not tokens:
            return
        self._widths = (set() if whole else self._widths) | {t.shape[1] for t in tokens if t.dim() > 1}
        self.begin(len(tokens[0]), tokens[0].device)

    def begin(self, rows: int, device: torch.device) -> None:
        """A batch begins.

        Args:
            rows: B.
        """
        self.rows, self.device = rows, device

    def at(self, of_rows: Tensor, x: Tensor, *, routed: bool) -> Tensor:
        """What each row has, at the places of a layer's input.

        Args:
            of_rows: (B, ...).
            x, routed: As of `numbers`.

        Returns:
            (B, 1, ...), (B, ...), (1, T, ...) or (B N, ...).

        Raises:
            ConfigError: As of `numbers`.
        """
        numbers = self.numbers(x, routed=routed)
        if numbers is None:
            return of_rows.view(len(of_rows), *[1] * (x.dim() - 2), *of_rows.shape[1:])
        return of_rows[numbers.to(of_rows.device)].view(*x.shape[:-1], *of_rows.shape[1:])

    def numbers(self, x: Tensor, *, routed: bool) -> Tensor | None:
        """The number of the row that each place of a layer's input is of.

        Args:
            x: (B, N, D), or (B, D), or of the tokens alone (1, T, D), or flattened (B N, D).
            routed: The layer may read any tokens, in any order, as an expert does. Then only (B, N, D) is known.

        Returns:
            (T,) or (B N,); None where each place of the first dimension is a row.

        Raises:
            ConfigError: It is not known.
        """
        B, layout, flat = self.rows, self.layout, x.dim() == 2
        if len(x) == B and not (routed and flat):
            return None
        if layout is not None and x.shape[:-1].numel() == layout.tokens and not routed:
            return torch.tensor([i for i, n in enumerate(layout.lengths) for _ in range(n)])
        if flat and len(x) in {B * width for width in self._widths} and not routed:
            return torch.arange(B).repeat_interleave(len(x) // B)
        raise self.unknown(x)

    def unknown(self, x: Tensor) -> ConfigError:
        """The error for a layer's input of which the rows are not known."""
        setting, shape = self.setting, tuple(x.shape)
        return ConfigError(
            Bilingual(
                f"{setting}: a layer reads {shape} where the batch has {self.rows} rows, and of which row each place "
                f"is cannot be known, as in a mixture's experts. {self.REMEDY}",
                f"{setting}：有一层读入 {shape}，而批次有 {self.rows} 条样本，无法知道每个位置属于哪一条"
                f"（例如混合专家模型中的专家）。{self.REMEDY.zh}",
            )
        )


def token_tensors(args: tuple[object, ...], kwargs: dict[str, object]) -> list[Tensor]:
    """What a model was called with that has its tokens, or their embeddings: the batch is the first dimension."""
    named = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    return [t for name in named if isinstance(t := kwargs.get(name), Tensor)] or tensors[:1]
