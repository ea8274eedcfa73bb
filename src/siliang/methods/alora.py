"""Activated LoRA, aLoRA (Greenewald et al., 2025, arXiv:2504.12397), a variant of LoRA.

    y_t = W x_t + m_t s B A x_t        m_t = 1 from a row's last invocation on, 0 before it

The invocation is a sequence of tokens, such as the beginning of an answer. What comes before it is computed as by the
base model, so that a server uses one cache of keys and values for the base model and for all such adapters. A row
without the invocation is computed by the base model alone.

Shapes: W (O, I), A (R, I), B (O, R); x (S, W, I), or (1, T, I) with the padding taken out. S rows, W columns of the
padded batch, T tokens, K columns with those that are cached, N tokens of the invocation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import BaseForward, LayerAdapter
from siliang.methods.lora_linear import LoraLinear
from siliang.models.introspect import backbone, cache_in, cached_tokens, is_encoder_decoder, named_arguments
from siliang.types import ConfigError, MergeError

WHY_NOT_MERGED = Bilingual(
    "aLoRA cannot be merged: it computes from its invocation on, and the base model before it.",
    "aLoRA 无法合并：它从触发序列开始才起作用，之前由基座模型计算。",
)


class AloraLinear(LoraLinear):
    """LoRA from the invocation on.

    Attributes:
        invocation: Where it is in the rows of the forward pass; None while the adapter is not active in all of them.
    """

    PART_OF_A_BATCH = False
    LOOKS_AHEAD = Bilingual("aLoRA begins at a row's last invocation", "aLoRA 从一行最后一次出现触发序列处开始")
    NEEDS_ALL_TOKENS = Bilingual("aLoRA counts the tokens of each text", "aLoRA 要数每段文本的词元")

    invocation: Invocation | None = None

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y = base_forward(x)
        if self.invocation is None:
            raise ConfigError(
                Bilingual(
                    "aLoRA's layer was called by itself: call the model, which knows the tokens.",
                    "aLoRA 的层被单独调用：请调用模型，模型才知道 token。",
                )
            )
        return torch.where(self.invocation.mask(x, routed=self.layer.routed), self.added(y, x, *self.factors()), y)

    def check_merge(self) -> None:
        raise MergeError(WHY_NOT_MERGED)


class Invocation:
    """Where the last invocation is in each row of a forward pass."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tuple(tokens)
        self._mask_SW = torch.zeros(0, 0, dtype=torch.bool)
        self._real_SW: Tensor | None = None
        self._packed: dict[int, Tensor] = {}
        self._seen: Tensor | None = None  # the ids whose keys and values are in the cache, (S, K)
        self._placed: Tensor | None = None  # the ids whose invocation `alora_offsets` gave
        self._cache: weakref.ref[object] | None = None

    def mask(self, x: Tensor, *, routed: bool) -> Tensor:
        """m for the input of a layer, with a last dimension of 1.

        Args:
            routed: The layer may read any tokens, as of `BatchRows.numbers`.

        Raises:
            ConfigError: The layer's input is not a state for each token of the rows.
        """
        where, shape = self._mask_SW, x.shape[:-1]
        if shape == where.shape or (shape == (where.numel(),) and not routed):
            return where.view(*shape, 1)
        if not routed and len(shape) == 2 and shape[0] == 1 and self._real_SW is not None and shape[1] <= where.numel():
            return self._without_padding(shape[1])
        raise ConfigError(
            Bilingual(
                f"alora_invocation_tokens: a layer's input is {tuple(shape)} for {where.shape[0]} rows of "
                f"{where.shape[1]} tokens: leave the layers that do not see every token out of target_modules, and "
                "add no prompt.",
                f"alora_invocation_tokens：有一层的输入是 {tuple(shape)}，而有 {where.shape[0]} 行、每行 "
                f"{where.shape[1]} 个 token：请从 target_modules 中去掉看不到所有 token 的层，也不要同时使用提示。",
            )
        )

    def _without_padding(self, T: int) -> Tensor:
        """m of the T tokens that are not padding, (1, T, 1)."""
        if T not in self._packed:
            assert self._real_SW is not None
            order = (~self._real_SW).flatten().sort(stable=True).indices[:T]
            self._packed[T] = self._mask_SW.flatten()[order].view(1, T, 1)
        return self._packed[T]

    def read(self, ids_SW: Tensor, attention_mask: Tensor | None, cache: object, cached: int) -> None:
        """Takes the tokens of a forward pass.

        Args:
            attention_mask: (S, K), or another kind of mask, which is not read.
            cache: Of keys and values; None for none.
            cached: How many tokens are in it. Where it was filled without this adapter, nothing before is invoked.
        """
        S, W = ids_SW.shape
        ids_SK = torch.cat([self._cached_ids(S, cache, cached, ids_SW), ids_SW], dim=1)
        real_SK = torch.ones_like(ids_SK, dtype=torch.bool)
        if isinstance(attention_mask, Tensor) and attention_mask.shape in (ids_SK.shape, ids_SW.shape):
            real_SK[:, -attention_mask.shape[1] :] = attention_mask.bool()
        self._set(from_last(ids_SK, real_SK, self._tokens)[:, -W:], real_SK[:, -W:])
        self._seen = ids_SK

    def read_offsets(self, ids_SW: Tensor, offsets: Sequence[int | None]) -> None:
        """Takes PEFT's `alora_offsets`: how many tokens from the end the invocation begins, None for nowhere."""
        self._placed, W = ids_SW, ids_SW.shape[1]
        starts = torch.tensor([W - min(offset or 0, W) for offset in offsets], device=ids_SW.device)
        self._set(torch.arange(W, device=ids_SW.device) >= starts[:, None], None)

    def has_placed(self, ids_SW: Tensor) -> bool:
        """Whether `alora_offsets` gave the invocation of these very tokens."""
        return self._placed is ids_SW

    def forget_offsets(self) -> None:
        """The next forward pass reads its tokens."""
        self._placed = None

    def keep(self, cache: object) -> None:
        """Remembers which cache the tokens that were read are in."""
        self._cache = None if cache is None else weakref.ref(cache)
        self._seen = None if cache is None else self._seen

    def _set(self, mask_SW: Tensor, real_SW: Tensor | None) -> None:
        self._mask_SW, self._real_SW, self._packed = mask_SW, real_SW, {}

    def _cached_ids(self, S: int, cache: object, cached: int, ids_SW: Tensor) -> Tensor:
        seen = self._seen
        known = cache is not None and self._cache is not None and self._cache() is cache
        if seen is None or not known or seen.shape[1] < cached or S % len(seen):
            return ids_SW[:, :0]
        return seen[:, :cached].repeat_interleave(S // len(seen), 0)  # beams may have begun since


def from_last(ids_SK: Tensor, real_SK: Tensor, tokens: Sequence[int]) -> Tensor:
    """m: the columns from the beginning of the last occurrence of `tokens` on, (S, K).

    Args:
        real_SK: Which tokens are not padding.
    """
    K, N = ids_SK.shape[1], len(tokens)
    if K < N:
        return torch.zeros_like(real_SK)
    wanted = torch.tensor(tokens, device=ids_SK.device)
    found = (ids_SK.unfold(1, N, 1) == wanted).all(-1) & real_SK.unfold(1, N, 1).all(-1)
    columns = torch.arange(K, device=ids_SK.device)
    begin = torch.where(found, columns[: K - N + 1], -1).amax(1, keepdim=True)
    return (begin >= 0) & (columns >= begin)


def follow_tokens(model: nn.Module, layers: Iterable[LayerAdapter], tokens: Sequence[int]) -> Callable[[], None]:
    """Lets an adapter's layers know where the invocation is in each forward pass of the model.

    Returns:
        A function that ends it.
    """
    here, invocation = [layer for layer in layers if isinstance(layer, AloraLinear)], Invocation(tokens)
    hosts = dict.fromkeys((model, backbone(model)))  # OPT's model with a head calls a part of its backbone alone

    def before(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        offsets = kwargs.pop("alora_offsets", None)
        named = named_arguments(module, args, kwargs)
        ids = named.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ConfigError(
                Bilingual(
                    "alora_invocation_tokens: the model is called without input_ids, in which aLoRA finds its "
                    "invocation.",
                    "alora_invocation_tokens：调用模型时没有 input_ids，aLoRA 要在其中查找触发序列。",
                )
            )
        if module is model:
            invocation.forget_offsets()
        if isinstance(offsets, Sequence):
            invocation.read_offsets(ids, offsets)
        elif not invocation.has_placed(ids):
            invocation.read(ids, named.get("attention_mask"), cache_in(named), cached_tokens(named))
        return args, kwargs

    def after(module: nn.Module, args: object, output: object) -> None:
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        invocation.keep(next((part for part in parts if hasattr(part, "get_seq_length")), None))

    for layer in here:
        layer.invocation = invocation
    handles = [host.register_forward_pre_hook(before, with_kwargs=True) for host in hosts]
    handles += [host.register_forward_hook(after) for host in hosts]

    def end() -> None:
        for handle in handles:
            handle.remove()
        for layer in here:
            layer.invocation = None

    return end


def check_model(model: nn.Module, tokens: Sequence[int]) -> None:
    """
    Raises:
        ConfigError: aLoRA cannot work on this model.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None or is_encoder_decoder(model):
        raise ConfigError(
            Bilingual(
                f"alora_invocation_tokens is for causal language models, not {type(model).__name__}.",
                f"alora_invocation_tokens 只用于因果语言模型，不能用于 {type(model).__name__}。",
            )
        )
    rows = len(embeddings.weight)
    if (beyond := max(tokens)) >= rows:
        raise ConfigError(
            Bilingual(
                f"alora_invocation_tokens: {beyond} is not a token of the model, which has {rows:,}: use its "
                "tokenizer's ids of the invocation.",
                f"alora_invocation_tokens：{beyond} 不是模型的 token，模型只有 {rows:,} 个：请用它的分词器得到的编号。",
            )
        )
