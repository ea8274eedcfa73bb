"""Merges a run into a plain model, and proves that both compute the same outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from siliang.data.collate import PadCollator
from siliang.data.conversations import served_ends
from siliang.data.tokens import TokenSet
from siliang.engine.batches import sequences_of
from siliang.files import creating_folder
from siliang.language import Bilingual, local
from siliang.merge import MergeProof, merge_with_proof
from siliang.models.save import save_model
from siliang.peft_api.model import PeftModel
from siliang.run_folder import OpenedRun, create_output, find_run, open_trained, served_tokenizer
from siliang.types import ConfigError, DataError, MergeError, message_of
from siliang.use.evaluate import eval_rows

PROOF_SAMPLES = 32


def merge(run: OpenedRun, output: Path, *, data: str | None = None, force: bool = False) -> MergeProof:
    """Merges the run's adapter, proves it on the run's own data, or on `data`, and writes a plain model folder.

    Raises:
        ConfigError: The run has no adapter.
        MergeError: The outputs of the merged and the unmerged model differ; nothing is written, unless `force`.
        OutputError: The output folder is not empty.
    """
    if not isinstance(run.model, PeftModel):
        raise ConfigError(
            Bilingual(
                f"{run.folder} was fully tuned: {run.folder / 'model'} is a plain model already.",
                f"{run.folder} 是全参数微调：{run.folder / 'model'} 已经是完整的模型。",
            )
        )
    if run.precision.compute != "fp32":  # which would round the sum
        trained = run.trained or find_run(run.folder, force=True)
        run = open_trained(trained, dtype=torch.float32, quantized=False)
    try:
        tokens = eval_rows(run, data, limit=PROOF_SAMPLES, same=False).tokens
    except DataError as error:
        if data is not None:
            raise
        raise DataError(
            Bilingual(
                f"{error}\nThe proof needs some rows, any will do: give them with --data FILE.",
                f"{local(message_of(error), 'zh')}\n验证需要一些样本，任何样本都可以：请用 --data FILE 给出。",
            )
        ) from None
    samples = list(_samples(run, tokens))
    new = create_output(output)
    try:
        merged, proof = merge_with_proof(run.model, samples)
        if not proof.holds and not force:
            raise MergeError(
                Bilingual(
                    f"The merged model does not answer as the adapter does: {proof}.\n"
                    "Nothing was written. Merge in a wider --dtype, or keep it anyway with --force.",
                    f"合并后的模型与接着适配器时输出不一致：{proof.in_words.zh}。\n"
                    "没有写入任何内容。请用更宽的 --dtype 合并，或加 --force 照样保留。",
                )
            )
        assert isinstance(merged, PreTrainedModel)  # as it was loaded
        with creating_folder(output) as temporary:
            tokenizer = served_tokenizer(run)[0]
            ends = served_ends(run.tokenizer, run.config.data, run.record.layouts) if run.task.decoder_only else ()
            save_model(temporary, merged, tokenizer, ends=ends)
            if (more := run.task.extra_files) is not None:
                more(temporary, merged, tokenizer)
    except BaseException:
        if new:
            with suppress(OSError):
                output.rmdir()
        raise
    return proof


def _samples(run: OpenedRun, tokens: TokenSet) -> Iterator[dict[str, Tensor]]:
    """The model's inputs, one entry at a time."""
    collate, task = PadCollator(run.tokenizer.pad_token_id), run.task
    left_out = () if task.has_encoder else task.data.targets  # a decoder reads the labels
    for i in range(min(PROOF_SAMPLES, len(tokens))):
        row = tokens[i]
        inputs = collate(sequences_of(row) if task.data.sequences else [row])
        yield {k: x.to(run.model.device) for k, x in inputs.items() if k not in left_out}
