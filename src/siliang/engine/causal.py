"""Whether a model that is to write reads only what is before each token."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from siliang.language import Bilingual
from siliang.peft_api.model import PeftModel
from siliang.types import ModelError

# of the largest logit: above it, a difference is not rounding
SHARE, SHARE_OF_HALF = 1e-4, 1e-2


@torch.no_grad()
def check_causal(model: nn.Module, vocabulary: int, **more: object) -> None:
    """Runs a few tokens twice, with another last token, without the adapter.

    Raises:
        ModelError: The logits of earlier tokens differ: training would show the model what it is to predict.
    """
    device = next(model.parameters()).device
    ids = torch.arange(6, device=device).remainder(vocabulary).view(1, 6)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    training = model.training
    model.eval()
    try:
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            one, two = (model(input_ids=x, use_cache=False, **more).logits[0, -6:-1] for x in (ids, other))
    except Exception:  # a model may raise any exception in a trial; the run itself says what is wrong
        return
    finally:
        model.train(training)
    share = SHARE if one.dtype == torch.float32 else SHARE_OF_HALF
    if float((one - two).abs().max()) > share * float(one.abs().max()):
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
