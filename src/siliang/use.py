"""A trained run at work: classes for texts, text for prompts, metrics on data, and the merged model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from siliang.data.collate import PadCollator
from siliang.data.encode import IGNORED
from siliang.data.examples import ExampleSet, Labelled, SourceTarget, bad_rows_message
from siliang.data.formats import BadRow, as_text
from siliang.data.load import Layout, load_examples, load_rows
from siliang.data.sources import Reading, open_source
from siliang.data.text_files import find_text, kind_of
from siliang.data.tokens import TokenSet, prompt_tokens, special_prefix, stop_tokens, tokenise, usable
from siliang.merge import MergeProof, merge_with_proof
from siliang.methods.prefix_tuning import PrefixTuningConfig
from siliang.models.positions import Positions
from siliang.peft_model import PeftModel
from siliang.run_folder import OpenedRun, claim
from siliang.train import metrics
from siliang.types import ConfigError, DataError, MergeError, ModelError, TaskType

PROOF_SAMPLES = 32
WRITERS = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
PAIR = ("text", "text_pair")
NEW_TOKENS = 128  # of an answer, where nobody says how long it may be
LABELS = ("labels", "start_positions", "end_positions")


@dataclass(frozen=True)
class Prediction:
    """The class of a text, and how sure the model is of it."""

    text: str
    label: str
    probability: float
    pair: str | None = None


@torch.no_grad()
def predict(run: OpenedRun, texts: Sequence[str | tuple[str, str]], *, batch_size: int = 32) -> Iterator[Prediction]:
    """The most probable class of each text, in order.

    Args:
        texts: Where the run was trained on pairs of texts, such pairs, or the two in one with a tab between them.

    Raises:
        ConfigError: The run is no classifier.
        DataError: The run is for pairs and a text is alone, or a text is longer than the model can read.
    """
    if run.config.task is not TaskType.SEQ_CLS:
        other = "generate" if run.config.task in WRITERS else "eval"
        raise ConfigError(f"{run.folder} is no classifier of texts: use `siliang {other}`.")
    data = run.config.data.model_copy(update={"too_long": "cut"})
    asked = [_asked(run, text) for text in texts]
    tokens = tokenise(asked, run.tokenizer, data, run.config.task, labels=run.labels, judged=False)
    _check_positions(run, tokens, "a text")
    for start, batch in _batches(run, tokens, batch_size):
        logits = run.model(**_inputs(batch)).logits
        probabilities, numbers = logits.float().softmax(-1).max(-1)
        for one, p, n in zip(asked[start : start + batch_size], probabilities.tolist(), numbers.tolist(), strict=True):
            yield Prediction(one.text, run.labels[n], p, one.pair)


def _asked(run: OpenedRun, text: str | tuple[str, str]) -> Labelled:
    if run.record.layout != "sentence-pair":
        return Labelled(text if isinstance(text, str) else "\t".join(text), "")
    parts = text.split("\t") if isinstance(text, str) else text
    if len(parts) != 2 or not all(part.strip() for part in parts):
        first, second = run.record.columns["text"], run.record.columns["text_pair"]
        raise DataError(
            f"{run.folder} was trained on pairs of texts, {first!r} and {second!r}, and {str(text)[:60]!r} has no "
            f"{second!r}.\nGive both with a tab between them, or a file with both columns: siliang predict RUN a.csv."
        )
    return Labelled(parts[0], "", parts[1])


def read_texts(run: OpenedRun, source: str) -> list[str | tuple[str, str]]:
    """The texts of a file of data, from the columns that the run was trained on; "" where a row has none.

    Raises:
        DataError: It cannot be read, or lacks the columns.
    """
    data = run.config.data
    reading = Reading(data.header, "auto", data.separator)
    if kind_of(Path(source)) == ".txt":
        return [line.rstrip("\r\n") for _, line in find_text(Path(source)).lines()]
    names = [run.record.columns.get(part, part) for part in PAIR[: 1 + (run.record.layout == "sentence-pair")]]
    texts: list[str | tuple[str, str]] = []
    opened = open_source(source, reading)
    for row in opened.rows(next(iter(opened.parts)), reading):
        missing = [name for name in names if name not in row.values]
        if row.problem is not None:
            raise DataError(f"{row.where} {row.problem}.")
        if missing:
            there = ", ".join(map(repr, row.values))
            raise DataError(f"{row.where} has no column {missing[0]!r}, which the run was trained on; it has {there}.")
        try:
            cells = [as_text(row.values[name], name) for name in names]
        except BadRow as problem:
            raise DataError(f"{row.where} {problem}.") from None
        texts.append((cells[0], cells[1]) if len(cells) > 1 and any(map(str.strip, cells)) else cells[0])
    return texts


@torch.no_grad()
def generate(
    run: OpenedRun,
    instruction: str,
    input: str = "",
    *,
    max_new_tokens: int | None = None,
    up_to: int = NEW_TOKENS,
    temperature: float = 0.0,
    plain: bool = False,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """What the model answers to an instruction, in the run's own template.

    Args:
        max_new_tokens: So many tokens may be written. None: `up_to`, or fewer where the model has no more positions.
        temperature: 0 for the most probable token each time, higher for more varied text.
        plain: The instruction is the beginning of a text, to be continued without a template.
        base: Ask the base model, without the adapter.
        on_text: Hears the answer piece by piece while it is written.

    Raises:
        ConfigError: The run is a classifier, or the base of a fully tuned model was asked for; or the prompt, with the
            tokens to be written, is longer than the model can read.
    """
    if run.config.task not in WRITERS:
        raise ConfigError(f"{run.folder} was trained to classify: use `siliang predict`.")
    if base and not isinstance(run.model, PeftModel):
        raise ConfigError(f"{run.folder} was fully tuned: its base model is not inside it any more.")
    tokenizer, template = run.tokenizer, run.config.data.template
    if run.config.task is TaskType.SEQ_2_SEQ_LM:
        ids = tokenizer(f"{instruction}\n{input}".strip() if input else instruction)["input_ids"]
        stop = [tokenizer.eos_token_id]
    elif plain:
        ids = special_prefix(tokenizer) + tokenizer(instruction, add_special_tokens=False)["input_ids"]
        stop = [tokenizer.eos_token_id]
    else:
        ids = prompt_tokens(instruction, tokenizer, template=template, input=input)
        stop = stop_tokens(tokenizer, template=template)
    if not ids:
        raise ConfigError("the tokenizer makes nothing of this text: there is nothing to answer.")
    max_new_tokens = _room(run, len(ids), max_new_tokens, up_to, base=base)
    input_ids = torch.tensor([ids], device=run.model.device)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": stop,
        "attention_mask": torch.ones_like(input_ids),
    }
    if temperature > 0:
        settings["temperature"] = temperature
    wanted = run.model.generation_config
    streams = (wanted.num_beams or 1) == 1  # beams are not known before the end
    if on_text is not None and streams:
        settings["streamer"] = _Pieces(tokenizer, on_text)
    if wanted.stop_strings is not None:
        settings["tokenizer"] = tokenizer
    settings |= {name: value for name, value in ONE_PLAIN_ANSWER.items() if hasattr(wanted, name)}
    try:
        with run.model.disable_adapter() if base else nullcontext():
            written = run.model.generate(input_ids=input_ids, **settings)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(
            f"{run.config.model} cannot write: {str(error).strip().partition(chr(10))[0]}\n"
            "Look at its generation_config.json, which says how it writes."
        ) from error
    answer = written[0] if run.config.task is TaskType.SEQ_2_SEQ_LM else written[0, len(ids) :]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    if on_text is not None and not streams:
        on_text(text)
    return text


# What a base model's generation_config may ask for and does not get: several answers, figures beside them, and ways of
# searching that transformers fetches as code from the hub.
ONE_PLAIN_ANSWER: dict[str, Any] = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "num_beam_groups": None,
    "diversity_penalty": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
}


def _positions(run: OpenedRun, *, base: bool = False) -> Positions:
    """How long a row may be for the run's model."""
    if not isinstance(run.model, PeftModel):
        return Positions.of(run.model)
    prompts = [] if base else [c for c in run.model.peft_config.values() if c.is_prompt_learning]
    virtual = sum(c.num_virtual_tokens or 0 for c in prompts)  # type: ignore[attr-defined]
    prefix = any(isinstance(c, PrefixTuningConfig) for c in prompts)
    return Positions.of(run.model.get_base_model(), virtual=virtual, prefix=prefix)


def _check_positions(run: OpenedRun, tokens: TokenSet, what: str) -> None:
    """
    Raises:
        DataError: A row is longer than the model can read.
    """
    limit = (positions := _positions(run)).reads
    longest = int(tokens.lengths.max(initial=0))
    if limit is not None and longest > limit:
        raise DataError(
            f"{what} has {longest:,} tokens, and the model has {positions.in_words(limit)}: shorten it, or train with "
            "no larger data.max_length."
        )
    if run.config.task is TaskType.SEQ_2_SEQ_LM and positions.writes is not None:
        longest = int(tokens.learned.max(initial=0))
        if longest > positions.writes:
            raise DataError(
                f"a target has {longest:,} tokens, and the model's decoder {positions.in_words(positions.writes)}: "
                "shorten it, or train with no larger data.max_target_length."
            )


def _room(run: OpenedRun, tokens: int, wanted: int | None, up_to: int, *, base: bool) -> int:
    """How many tokens are written behind a prompt of so many.

    Raises:
        ConfigError: The model has no positions for them.
    """
    positions = _positions(run, base=base)
    limit, room = positions.reads, None
    if limit is not None and tokens > limit - (run.config.task is TaskType.CAUSAL_LM):
        raise ConfigError(
            f"the prompt has {tokens:,} tokens, and the model has {positions.in_words(limit)}: shorten it."
        )
    if run.config.task is TaskType.SEQ_2_SEQ_LM:
        room = None if positions.writes is None else positions.writes - 1  # one begins the target
    elif limit is not None:
        room = limit - tokens
    if room is not None and wanted is not None and wanted > room:
        raise ConfigError(
            f"max_new_tokens = {wanted:,} behind a prompt of {tokens:,} tokens is more than the model's "
            f"{positions.in_words(limit if limit is not None else room)}: at most {room:,} can be written."
        )
    return wanted or (up_to if room is None else min(up_to, room))


class _Pieces(TextStreamer):
    """Hands on an answer as soon as its next words are whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


@torch.no_grad()
def evaluate(run: OpenedRun, data: str | None = None, *, batch_size: int = 16) -> dict[str, float]:
    """Metrics on the run's held-out rows, or on other data.

    Returns:
        rows; loss (mean over rows for classes, over labelled tokens for text and tags); and by task: accuracy and f1;
        f1, precision and recall over spans; perplexity; rouge_l; exact_match and f1.
    """
    task = run.config.task
    rows, tokens = _rows(run, data)
    if not tokens.learned.sum():
        raise DataError("not one of these rows carries a label: there is nothing to measure.")
    if task is TaskType.QUESTION_ANS:
        found, loss = find_spans(run, tokens, rows, batch_size=batch_size)
        answers = [e.answers for e in rows]  # type: ignore[union-attr]
        return {"rows": float(len(rows)), "loss": loss} | metrics.squad(found, answers)
    loss, count = 0.0, 0
    guesses: list[Any] = []
    right: list[Any] = []
    for _, batch in _batches(run, tokens, batch_size):
        labels = batch["labels"]
        # an encoder-decoder model makes the decoder's input from the labels
        logits = run.model(**(batch if task is TaskType.SEQ_2_SEQ_LM else _inputs(batch))).logits.float()
        if task is TaskType.CAUSAL_LM:
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = labels.flatten()
        loss += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, -2), flat, ignore_index=IGNORED, reduction="sum")
        )
        count += int((flat != IGNORED).sum())
        if task is TaskType.SEQ_CLS:
            guesses += logits.argmax(-1).tolist()
            right += labels.tolist()
        elif task is TaskType.TOKEN_CLS:
            found, gold = metrics.tag_names(logits.argmax(-1).cpu().numpy(), labels.cpu().numpy(), run.labels)
            guesses += found
            right += gold
        elif task is TaskType.SEQ_2_SEQ_LM:
            guesses += _write_targets(run, batch)
    figures = {"rows": float(len(rows)), "loss": loss / max(count, 1)}
    match task:
        case TaskType.SEQ_CLS:
            return figures | metrics.classification(guesses, right)
        case TaskType.TOKEN_CLS:
            return figures | metrics.spans_of_tags(guesses, right)
    figures["perplexity"] = float(torch.tensor(figures["loss"], dtype=torch.float64).exp())
    if task is TaskType.SEQ_2_SEQ_LM:
        targets = [e.target for e in rows if isinstance(e, SourceTarget)]
        numbers = tokens.column("row").tolist()
        figures["rouge_l"] = metrics.rouge_l(guesses, [targets[n] for n in numbers])
    return figures


@torch.no_grad()
def find_spans(run: OpenedRun, tokens: TokenSet, rows: ExampleSet, *, batch_size: int = 16) -> tuple[list[str], float]:
    """The words of its context that answer each question, and the mean loss over windows.

    Args:
        tokens: Windows of the rows' contexts; a row without one is answered with "".
    """
    loss, longest = 0.0, int(tokens.lengths.max())
    starts: list[Tensor] = []
    ends: list[Tensor] = []
    for _, batch in _batches(run, tokens, batch_size):
        output = run.model(**batch)
        loss += float(output.loss) * len(batch["input_ids"])
        for joined, logits in ((starts, output.start_logits), (ends, output.end_logits)):  # each (windows, tokens)
            joined.append(torch.nn.functional.pad(logits.float(), (0, longest - logits.shape[1]), value=-1e4))
    at_start, at_end = (torch.cat(joined).cpu().numpy() for joined in (starts, ends))
    return metrics.best_spans(at_start, at_end, tokens, rows), loss / len(tokens)


def _write_targets(run: OpenedRun, inputs: dict[str, Tensor]) -> list[str]:
    written = run.model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=run.config.data.max_target_length,
        do_sample=False,
    )
    return run.tokenizer.batch_decode(written, skip_special_tokens=True)


def merge(run: OpenedRun, output: Path, *, data: str | None = None, force: bool = False) -> MergeProof:
    """Merges the run's adapter, proves it on the run's own data, or on `data`, and writes a plain model folder.

    Raises:
        ConfigError: The run has no adapter.
        MergeError: The merged model does not answer as the unmerged one; nothing is left behind, unless `force`.
        OutputError: The output folder is not empty.
    """
    if not isinstance(run.model, PeftModel):
        raise ConfigError(f"{run.folder} was fully tuned: {run.folder / 'model'} is a plain model already.")
    try:
        _, tokens = _rows(run, data, limit=PROOF_SAMPLES, same=False)
    except DataError as error:
        if data is not None:
            raise
        raise DataError(f"{error}\nThe proof needs some rows, whichever: give them with --data FILE.") from None
    keep = run.config.task is TaskType.SEQ_2_SEQ_LM
    batches = (batch for _, batch in _batches(run, tokens.select(range(min(PROOF_SAMPLES, len(tokens)))), 1))
    samples = [b if keep else _inputs(b) for b in batches]
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


def _rows(
    run: OpenedRun, data: str | None, limit: int | None = None, *, same: bool = True
) -> tuple[ExampleSet, TokenSet]:
    """The rows of `data`, or the run's own held-out rows, or, where it has none, its training rows; and tokens.

    Args:
        same: They have to be those of the training.

    Raises:
        DataError: The run's own data is not what it was.
    """
    settings, task = run.config.data, run.config.task
    if data is None and same and run.trained is not None:
        run.trained.check_data()
    if data is not None:
        settings = settings.model_copy(update={"labels": run.record.labels, "encoding": "auto"})
        layout = Layout(run.record.layout, run.record.columns) if run.record.layout else None
        rows = load_rows(settings, task, data, layout).eval
    else:
        examples = load_examples(settings, task, seed=run.config.train.seed)
        rows = examples.eval if len(examples.eval) else examples.train
    rows = rows if limit is None else rows[:limit]
    rows, tokens = usable(rows, tokenise(rows, run.tokenizer, settings, task, labels=run.record.labels))
    if not len(tokens):
        raise DataError("not one row can be used." + (f" {bad_rows_message(tokens.skipped)}" if tokens.skipped else ""))
    _check_positions(run, tokens, "a row")
    return rows, tokens


def _batches(run: OpenedRun, tokens: TokenSet, size: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    collate = PadCollator(run.tokenizer.pad_token_id)
    for start in range(0, len(tokens), size):
        rows = tokens.__getitems__(list(range(start, min(start + size, len(tokens)))))
        yield start, {name: t.to(run.model.device) for name, t in collate(rows).items()}


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}
