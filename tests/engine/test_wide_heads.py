"""In half precision the head of a task computes in fp32 where nothing is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from every_task import configured, make_models, rows_of
from transformers import BartConfig, BartForSequenceClassification

from siliang.engine.wide_heads import heads_in_fp32
from siliang.hardware import Choice
from siliang.run_folder import open_run
from siliang.tasks import SEQ_CLS
from siliang.train.run import train
from siliang.use.predict import predict


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("task", ["number", "seq_cls", "reranker"])
def test_predictions_are_not_rounded_to_eight_bits(task: str, method: str, tmp_path: Path) -> None:
    """The head is an adapter's own copy beside a base in bf16, or the model's, whose weights are in fp32."""
    config = configured(task, make_models(tmp_path), tmp_path, method, precision="bf16")
    train(config)
    run = open_run(Path(config.output))
    assert run.precision.autocast
    name, inputs = {
        "number": ("number", [row["text"] for row in rows_of("seq_cls", 40)]),
        "seq_cls": ("probability", [row["text"] for row in rows_of("seq_cls", 40)]),
        "reranker": ("score", [("the film", f"{row['text']}") for row in rows_of("seq_cls", 40)]),
    }[task]
    exact = replace(open_run(Path(config.output), dtype=torch.float32), precision=Choice("fp32", "tested"))
    in_bf16, in_fp32 = (
        torch.tensor([p.values()[name] for p in predict(each, inputs)], dtype=torch.float32) for each in (run, exact)
    )
    assert len(in_bf16.unique()) > 0.9 * len(in_fp32.unique())  # about half of them where the head rounds
    assert not torch.equal(in_bf16, in_bf16.bfloat16().float())
    assert (in_bf16 - in_fp32).abs().max() < 0.1 * max(1.0, float(in_fp32.abs().max()))


def test_the_head_of_bart() -> None:
    """Its name is in no task's list, since PEFT does not train it."""
    config = BartConfig(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, num_labels=1, eos_token_id=2)
    config.encoder_ffn_dim = config.decoder_ffn_dim = config.encoder_attention_heads = 2
    config.decoder_attention_heads = 2
    torch.manual_seed(0)
    model = BartForSequenceClassification(config).bfloat16().eval()
    model.classification_head.float()
    ids = torch.randint(3, 60, (200, 6))
    ids[:, -1] = 2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = model(input_ids=ids).logits.float()
        with heads_in_fp32(model, SEQ_CLS.model.heads):
            wide = model(input_ids=ids).logits
    assert wide.dtype == torch.float32 and len(wide.unique()) > 1.5 * len(narrow.unique())
