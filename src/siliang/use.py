"""A trained run at work: classes for texts, text for prompts, metrics on data, and the merged model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siliang.data.examples import Labelled, Turn, load_examples
from siliang.data.tokens import IGNORED, PadCollator, prompt_tokens, special_prefix, tokenise
from siliang.merge import MergeProof, merge_with_proof
from siliang.peft_model import PeftModel
from siliang.run_folder import OpenedRun, claim
from siliang.types import ConfigError, MergeError, TaskType

PROOF_SAMPLES = 32


@dataclass(frozen=True)
class Prediction:
    """The class of a text, and how sure the model is of it."""

    text: str
    label: str
    probability: float


@torch.no_grad()
def predict(run: OpenedRun, texts: Sequence[str], *, batch_size: int = 32) -> Iterator[Prediction]:
    """The most probable class of each text, in order.

    Raises:
        ConfigError: The run is no classifier.
    """
    if run.config.task is not TaskType.SEQ_CLS:
        raise ConfigError(f"{run.folder} was trained to write text: use `siliang generate`.")
    tokens = tokenise(
        [Labelled(text, 0) for text in texts],
        run.tokenizer,
        template=run.config.data.template,
        max_length=run.config.data.max_length,
    )
    collate = PadCollator(run.tokenizer.pad_token_id)
    for start in range(0, len(texts), batch_size):
        batch = collate([tokens[i] for i in range(start, min(start + batch_size, len(texts)))])
        logits = run.model(**_inputs(batch, run.model.device)).logits
        probabilities, numbers = logits.float().softmax(-1).max(-1)
        for text, p, n in zip(texts[start : start + batch_size], probabilities.tolist(), numbers.tolist(), strict=True):
            yield Prediction(text, run.labels[n], p)


@torch.no_grad()
def generate(
    run: OpenedRun,
    instruction: str,
    input: str = "",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    plain: bool = False,
    base: bool = False,
) -> str:
    """What the model answers to an instruction, in the run's own template.

    Args:
        temperature: 0 for the most probable token each time, higher for more varied text.
        plain: The instruction is the beginning of a text, to be continued without a template.
        base: Ask the base model, without the adapter.

    Raises:
        ConfigError: The run is a classifier, or the base of a fully tuned model was asked for.
    """
    if run.config.task is not TaskType.CAUSAL_LM:
        raise ConfigError(f"{run.folder} was trained to classify: use `siliang predict`.")
    if base and not isinstance(run.model, PeftModel):
        raise ConfigError(f"{run.folder} was fully tuned: its base model is not inside it any more.")
    tokenizer = run.tokenizer
    if plain:
        ids = special_prefix(tokenizer) + tokenizer(instruction, add_special_tokens=False)["input_ids"]
    else:
        ids = prompt_tokens(Turn("", instruction, input), tokenizer, template=run.config.data.template)
    input_ids = torch.tensor([ids], device=run.model.device)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "attention_mask": torch.ones_like(input_ids),
    }
    if temperature > 0:
        settings["temperature"] = temperature
    if base:
        with run.model.disable_adapter():
            written = run.model.generate(input_ids=input_ids, **settings)
    else:
        written = run.model.generate(input_ids=input_ids, **settings)
    return tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)


@torch.no_grad()
def evaluate(run: OpenedRun, data: str | None = None, *, batch_size: int = 16) -> dict[str, float]:
    """Metrics on the run's held-out rows, or on other data.

    Returns:
        rows; loss (mean over rows for classes, over labelled tokens for text); accuracy or perplexity.
    """
    rows = _rows(run, data)
    tokens = tokenise(rows, run.tokenizer, template=run.config.data.template, max_length=run.config.data.max_length)
    collate = PadCollator(run.tokenizer.pad_token_id)
    loss, count, right = 0.0, 0, 0
    for start in range(0, len(tokens), batch_size):
        batch = collate([tokens[i] for i in range(start, min(start + batch_size, len(tokens)))])
        labels = batch["labels"].to(run.model.device)
        logits = run.model(**_inputs(batch, run.model.device)).logits.float()
        if run.config.task is TaskType.CAUSAL_LM:
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = labels.flatten()
        loss += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, -2), flat, ignore_index=IGNORED, reduction="sum")
        )
        count += int((flat != IGNORED).sum())
        right += int((logits.argmax(-1).flatten() == flat).sum())
    metrics = {"rows": float(len(rows)), "loss": loss / count}
    if run.config.task is TaskType.CAUSAL_LM:
        metrics["perplexity"] = float(torch.tensor(loss / count, dtype=torch.float64).exp())
    else:
        metrics["accuracy"] = right / count
    return metrics


def merge(run: OpenedRun, output: Path, *, force: bool = False) -> MergeProof:
    """Merges the run's adapter, proves it on the run's own data, and writes a plain model folder.

    Raises:
        ConfigError: The run has no adapter.
        MergeError: The merged model does not answer as the unmerged one; nothing is left behind, unless `force`.
        OutputError: The output folder is not empty.
    """
    if not isinstance(run.model, PeftModel):
        raise ConfigError(f"{run.folder} was fully tuned: {run.folder / 'model'} is a plain model already.")
    rows = _rows(run, None)[:PROOF_SAMPLES]
    tokens = tokenise(rows, run.tokenizer, template=run.config.data.template, max_length=run.config.data.max_length)
    collate = PadCollator(run.tokenizer.pad_token_id)
    samples = [_inputs(collate([tokens[i]]), run.model.device) for i in range(len(tokens))]
    new = claim(output)
    temporary = output.with_name(f".{output.name}.tmp{os.getpid()}")
    try:
        merged, proof = merge_with_proof(run.model, samples)
        if not proof.holds and not force:
            raise MergeError(
                f"The merged model does not answer as the adapter does: {proof}.\n"
                "Nothing was written. Merge in a wider --dtype, or keep it all the same with --force."
            )
        merged.save_pretrained(temporary)  # type: ignore[operator]
        run.tokenizer.save_pretrained(temporary)
        output.rmdir()
        temporary.rename(output)
    except BaseException:
        if new and output.is_dir():
            shutil.rmtree(output, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return proof


def _rows(run: OpenedRun, data: str | None) -> list[Any]:
    """The rows of `data`, or the run's own held-out rows, or, where it has none, its training rows."""
    settings = run.config.data
    if data is not None:
        settings = settings.model_copy(
            update={"train": data, "eval": None, "eval_fraction": 0.0, "labels": run.record.labels}
        )
        return load_examples(settings, run.config.task, seed=run.config.train.seed).train
    examples = load_examples(settings, run.config.task, seed=run.config.train.seed)
    return examples.eval or examples.train


def _inputs(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
