"""Whether beginnings that sequences share may be computed once (`ops/beginnings.py`). A trial on the model decides.

It is exact where the state of a token depends on the tokens before it alone: in a causal model without padding, and
without dropout. In evaluations there is no dropout.
"""

from __future__ import annotations

from siliang.adapters.active_rows import looks_ahead
from siliang.capabilities import why_missing
from siliang.engine.batches import EVERYWHERE, Sharing
from siliang.engine.padding import PaddingFree
from siliang.engine.randomness import draws_on_fake, find_randomness
from siliang.engine.trial import PACKED, ModelTrial, Way, trial_error
from siliang.language import Bilingual, local, together
from siliang.ops.cascade import CASCADE
from siliang.ops.place import kind_of
from siliang.peft_api.model import PeftModel

SHARED, SEPARATE_ROWS = Bilingual("they", "共用开头"), Bilingual("separate rows", "逐条计算")


def find_shares(
    trial: ModelTrial, padding: PaddingFree, *, wanted: Sharing = EVERYWHERE, noise: bool = False
) -> tuple[Sharing, list[str]]:
    """Where beginnings are shared, and the lines that say why not. Of an encoder, which sees later tokens, there are
    none.

    Args:
        wanted: Where they may be shared.
        noise: Training adds noise to the embeddings.
    """
    model = trial.model
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
    try:
        reason = trial.differs(Way(tree=trial.tree), PACKED, SHARED, SEPARATE_ROWS)
    except Exception as error:  # a model may raise any exception on shared rows
        reason = trial_error(error, Bilingual("shared beginnings", "共用开头的样本"))
    if reason is not None:
        return Sharing(), [together(off, reason)]
    if not wanted.training:
        return Sharing(evaluation=wanted.evaluation), []
    why = _random_in_training(trial, padding, noise=noise)
    if why is None:
        return Sharing(training=True, evaluation=True), []
    only = Bilingual("shared beginnings are computed for each row in training: ", "训练中，样本相同的开头逐条计算：")
    return Sharing(evaluation=True), [together(only, why)]


def _random_in_training(trial: ModelTrial, padding: PaddingFree, *, noise: bool) -> str | None:
    """What is random in the layers in training; None if nothing is."""
    if noise:
        return Bilingual("train.neftune_alpha adds noise", "train.neftune_alpha 会加入噪声")
    if not trial.comparing:
        random = Bilingual("something in it is random, such as dropout", "其中有随机的部分，如 dropout")
        return random if draws_on_fake(trial.in_training_mode) else None
    found = find_randomness(trial.model, trial.in_training_mode, trial.device, until=padding.layers[-1])
    if found is None:
        return None
    what, where = found
    return Bilingual(f"there is {what} ({where})", f"存在{local(what, 'zh')}（{where}）")
