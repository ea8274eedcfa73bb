"""Whether a model that is to write reads only what is before each token."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from siliang.engine.trial import ModelTrial, modes
from siliang.engine.trial_batch import BEGIN, vocabulary_of
from siliang.language import Bilingual
from siliang.peft_api.model import PeftModel
from siliang.types import ModelError

# of the largest logit: above it, a difference is not rounding
SHARE, SHARE_OF_HALF = 1e-4, 1e-2


def reads_back(trial: ModelTrial, logits: Tensor) -> bool:
    """Whether sequences of the trial that begin with the same tokens have the same logits there.

    Args:
        logits: Of all tokens, (S, V + W, vocabulary).
    """
    start = logits.shape[1] - trial.batch.width
    one, *others = (logits[i, start : start + BEGIN] for i in trial.alike)
    return all(_same(one, other) for other in others)


def check_causal(trial: ModelTrial, more: Mapping[str, object]) -> None:
    """Runs one of the trial's sequences twice, with another last token, without the adapter.

    Args:
        more: Further arguments of the model.

    Raises:
        ModelError: The logits of earlier tokens differ: training would show the model what it is to predict.
    """
    model, ids = trial.model, trial.batch.inputs["input_ids"][:1]
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary_of(trial.base)
    try:
        bare = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        with modes(model, training=False), torch.no_grad(), bare:
            last = slice(-ids.shape[1], -1)
            one, two = (model(input_ids=x, use_cache=False, **more).logits[0, last] for x in (ids, other))
    except Exception:  # a model may raise any exception in a trial; the run itself says what is wrong
        return
    if not _same(one, two):
        raise ModelError(
            Bilingual(
                "the model reads ahead: what it predicts changes with the tokens behind, as in an encoder, so that it "
                "cannot learn to write.\nUse a decoder, set is_decoder in its config.json, or choose seq_cls, "
                "token_cls or question_ans.",
                "该模型能看到后面的词元（编码器如此）：预测会随后文改变，因此学不会生成文本。\n"
                "请换成解码器模型，在它的 config.json 中设置 is_decoder，或选择 seq_cls、token_cls、"
                "question_ans 任务。",
            )
        )


def _same(one: Tensor, two: Tensor) -> bool:
    share = SHARE if one.dtype == torch.float32 else SHARE_OF_HALF
    differ = float((one - two).abs().max()) > share * float(one.abs().max())
    return not differ  # of broken weights, whose logits are NaN, the loss says what is wrong
