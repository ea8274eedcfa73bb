"""Whether beginnings that sequences share may be computed once (`ops/beginnings.py`). A trial on the model decides.

It is exact where the state of a token depends on the tokens before it alone: in a causal model without padding, and
without dropout. In evaluations there is no dropout.
"""

from __future__ import annotations

import torch
from torch import nn

from siliang.adapters.active_rows import looks_ahead
from siliang.capabilities import why_missing
from siliang.engine.batches import EVERYWHERE, Sharing
from siliang.engine.padding import PaddingFree, no_cache, offset_of, trial_error
from siliang.engine.randomness import draws_on_fake, find_randomness
from siliang.language import Bilingual, local, together
from siliang.ops.beginnings import find_beginnings
from siliang.ops.cascade import CASCADE
from siliang.ops.place import kind_of
from siliang.peft_api.model import PeftModel


def find_shares(
    model: nn.Module,
    padding: PaddingFree,
    vocabulary: int,
    *,
    wanted: Sharing = EVERYWHERE,
    noise: bool = False,
    comparing: bool = True,
    **more: object,
) -> tuple[Sharing, list[str]]:
    """Where beginnings are shared, and the lines that say why not. Of an encoder, which sees later tokens, there are
    none.

    Args:
        model: The module that training calls.
        wanted: Where they may be shared.
        noise: Training adds noise to the embeddings.
        comparing: Compare the results. False on fake tensors.
        more: Further arguments of the model.
    """
    off = Bilingual("shared beginnings are computed for each row: ", "样本相同的开头逐条计算：")
    if padding.readers:
        setting = padding.readers[0].setting
        why = Bilingual(f"{setting} computes each row in its own way", f"{setting} 对每条样本的计算各不相同")
        return Sharing(), [together(off, why)]
    if (why := looks_ahead(model.injection) if isinstance(model, PeftModel) else None) is not None:
        return Sharing(), [together(off, why)]
    if kind_of(next(model.parameters())) == "cpu" and (missing := why_missing(CASCADE)) is not None:
        return Sharing(), [together(off, missing)]
    if padding.looks_ahead:  # known before any trial: an error within a sharded forward would leave it gathered
        return Sharing(), []
    trial = _Trial(model, padding, vocabulary, more)
    try:
        reason = trial.differs(comparing=comparing)
    except Exception as error:  # a model may raise any exception on shared rows
        reason = trial_error(error, Bilingual("shared beginnings", "共用开头的样本"))
    if reason is not None:
        return Sharing(), [together(off, reason)]
    if not wanted.training:
        return Sharing(evaluation=wanted.evaluation), []
    why = _random_in_training(trial, noise=noise, comparing=comparing)
    if why is None:
        return Sharing(training=True, evaluation=True), []
    only = Bilingual("shared beginnings are computed for each row in training: ", "训练中，样本相同的开头逐条计算：")
    return Sharing(evaluation=True), [together(only, why)]


class _Trial:
    """Three short sequences, two of which begin with the same two tokens."""

    LENGTHS = (5, 2, 4)

    def __init__(self, model: nn.Module, padding: PaddingFree, vocabulary: int, more: dict[str, object]) -> None:
        self.model, self.padding = model, padding
        # vocabularies may be small: tokens of a sequence may be equal, but not its branches
        letters = [(5 + 7 * i) % vocabulary for i in range(9)]
        ids = torch.tensor([[letters[ord(c) - ord("a")] for c in row] for row in ("abcde", "hiaaa", "abfga")])
        self.mask = torch.arange(5)[None] < torch.tensor(self.LENGTHS)[:, None]
        self.tree = find_beginnings([b"abcde", b"hi", b"abfg"], 1, least=1)
        self.device = next(model.parameters()).device
        inputs = {"input_ids": (ids * self.mask).to(self.device), "attention_mask": self.mask.long().to(self.device)}
        self.inputs = more | inputs | no_cache(model)

    @torch.no_grad()
    def differs(self, *, comparing: bool) -> str | None:
        """Why the results differ from those of separate rows; None if they do not."""
        training = self.model.training
        self.model.eval()
        try:
            with self.padding.packed(self.LENGTHS, 5, tree=self.tree, share=True):
                shared = self.model(**self.inputs)
            if not comparing:
                return None
            with self.padding.packed(self.LENGTHS, 5):
                apart = self.model(**self.inputs)
        finally:
            self.model.train(training)
        if (found := offset_of(self.model, apart, shared, self.mask)) is None:
            return None
        return Bilingual(
            f"they give other results than separate rows (by {found:.1g} of their spread)",
            f"与逐条计算的结果不同（相差标准差的 {found:.1g} 倍）",
        )

    @torch.no_grad()
    def run(self) -> None:
        """Runs them in training mode, apart. The modules are in their own modes again afterwards."""
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.train()
            with self.padding.packed(self.LENGTHS, 5):
                self.model(**self.inputs)
        finally:
            self.model.eval()
            for module in training:
                module.training = True


def _random_in_training(trial: _Trial, *, noise: bool, comparing: bool) -> str | None:
    """What is random in the layers in training; None if nothing is."""
    if noise:
        return Bilingual("train.neftune_alpha adds noise", "train.neftune_alpha 会加入噪声")
    if not comparing:
        random = Bilingual("something in it is random, such as dropout", "其中有随机的部分，如 dropout")
        return random if draws_on_fake(trial.run) else None
    found = find_randomness(trial.model, trial.run, trial.device, until=trial.padding.layers[-1])
    if found is None:
        return None
    what, where = found
    return Bilingual(f"there is {what} ({where})", f"存在{local(what, 'zh')}（{where}）")
