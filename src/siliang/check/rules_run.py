"""Rules on the base model, the precision and the course of the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from siliang.check.finding import RATE_FACTOR, Found
from siliang.check.subject import Subject
from siliang.hardware import FP16_ADAM_EPS
from siliang.methods import METHODS
from siliang.models.quantized import count_parameters
from siliang.peft_model import get_peft_model
from siliang.types import OTHER_HEADS, ConfigError, ModelError, TargetError


def no_pad_token(s: Subject) -> Iterator[Found]:
    """There is no pad token.

    Cause: Rows of a batch are filled up to one length, and there is nothing to fill them with. Where the tokenizer
    has an end of sequence or an unknown token, siliang takes that one: labels and attention are masked by position,
    so any will do.

    Fix: Name a pad_token in the model's tokenizer_config.json.
    """
    if s.tokenizer.pad_token_id is None:
        yield Found(f"{s.config.model}: its tokenizer has no pad token, no end of sequence and no unknown token")


def vocabulary(s: Subject) -> Iterator[Found]:
    """Tokens without an embedding.

    Cause: The tokenizer knows more tokens than the embedding has rows: on the first such token the run ends in an index
    error, on a GPU in one that says nothing.

    Fix: Use the model's own tokenizer, or name the new tokens in data.add_tokens, which makes the embeddings grow.
    """
    rows = getattr(s.text_config, "vocab_size", None)
    if rows is None or s.data.add_tokens:
        return
    read = [ids for part in (s.train, s.eval) for ids in part.lists("input_ids") if len(ids)]
    largest = max((int(ids.max()) for ids in read), default=0)
    named = {"pad": s.tokenizer.pad_token_id, "eos": s.tokenizer.eos_token_id, "bos": s.tokenizer.bos_token_id}
    beyond = [f"its {name} token is {token:,}" for name, token in named.items() if token is not None and token >= rows]
    own = len(set(s.tokenizer.get_vocab().values()) - set(s.tokenizer.get_added_vocab().values()))
    if largest >= rows:
        yield Found(f"the data holds token {largest:,}, and the embedding has {rows:,} rows")
    elif beyond or own > rows:
        why = beyond[0] if beyond else f"{own:,} of them its own: it is another model's tokenizer"
        yield Found(f"the tokenizer has {len(s.tokenizer):,} tokens, the embedding {rows:,} rows, and {why}")
    elif len(s.tokenizer) > rows:
        yield Found(
            f"the tokenizer has {len(s.tokenizer):,} tokens, the embedding {rows:,} rows; the data uses none beyond",
            severity="warning",
        )


def targets(s: Subject) -> Iterator[Found]:
    """The method finds nothing to tune.

    Cause: method.target_modules names modules that this model does not have, wholly or in part; PEFT passes over the
    part that matches nothing.

    Fix: Name modules that are there (the message lists near ones), or leave target_modules out.
    """
    if s.method.tunes == "biases" or (problem := _attach(s)) is None:
        return
    yield Found(problem)


def no_biases(s: Subject) -> Iterator[Found]:
    """BitFit on a model without biases.

    Cause: BitFit trains the biases, and Llama and its kin have none: nothing would be learned.

    Fix: Use method=lora, or a model with biases (BLOOM, BERT, GPT-2, Qwen2's attention).
    """
    if s.method.tunes == "biases" and (problem := _attach(s)) is not None:
        yield Found(problem)


def invented(s: Subject) -> Iterator[Found]:
    """Weights that the model's files do not hold.

    Cause: The model has parts beside the task's head that its files lack, such as the pooler of a BERT that was trained
    without one. Loading makes them up at random. Frozen, they would be others wherever the adapter is opened, so they
    are trained, and saved with the adapter (modules_to_save), as the head is.

    Fix: Nothing is wrong where the model is known to come without them. Otherwise take a checkpoint that holds them.
    """
    heads = (*s.task.model.heads, *OTHER_HEADS)
    if new := [path for path in s.invented if not any(head in path.split(".") for head in heads)]:
        it = "it is" if len(new) == 1 else "they are"
        yield Found(f"{s.config.model} does not hold {', '.join(new)}: {it} new, and trained and saved along")


def tied_embedding(s: Subject) -> Iterator[Found]:
    """An adapter on a tied embedding.

    Cause: The model's output head is its embedding. An adapter on one of them leaves the other as it was, and merging
    parts the two: the merged model is larger by an embedding, and programs that tie them all the same answer otherwise.

    Fix: Leave the embedding and the head out of target_modules and modules_to_save, or do not merge.
    """
    if not getattr(s.text_config, "tie_word_embeddings", False) or s.method.config is None:
        return
    given = s.config.method.arguments
    names: list[str] = []
    for key in ("target_modules", "modules_to_save"):
        value = given.get(key) or []
        names += [value] if isinstance(value, str) else list(value)
    touched = [n for n in names if any(part in n for part in ("embed", "lm_head", "wte", "output_layer", "shared"))]
    if touched:
        yield Found(f"{', '.join(touched)} is tied to the model's other end (tie_word_embeddings)")


def too_many_positions(s: Subject) -> Iterator[Found]:
    """Rows longer than the model can read.

    Cause: The model has learned embeddings for so many positions, and none for the next one: the run would end in an
    index error. Virtual tokens in front of a row (prompts, prefixes) take positions too. With rotary positions the
    model goes on, and answers worse there than it was trained to.

    Fix: Lower data.max_length to the model's length, less the method's virtual tokens.
    """
    positions = s.positions
    longest = max(int(part.lengths.max(initial=0)) for part in (s.train, s.eval))
    if positions.reads is not None and longest > positions.reads:
        yield Found(f"a row has {longest:,} tokens, the model {positions.in_words(positions.reads)}")
    if s.task.has_encoder:
        longest = max(int(part.learned.max(initial=0)) for part in (s.train, s.eval))
        if positions.writes is not None and longest > positions.writes:
            lower = "Lower data.max_target_length to that"
            said = f"a target has {longest:,} tokens, the model's decoder {positions.in_words(positions.writes)}"
            yield Found(said, fix=lower)
        return
    trained = getattr(s.text_config, "max_position_embeddings", None)
    if positions.reads is None and trained and longest + positions.virtual > trained:
        yield Found(f"a row has {longest:,} tokens, the model was made for {trained:,}", severity="warning")


def pure_fp16(s: Subject) -> Iterator[Found]:
    """Everything in fp16.

    Cause: Adam divides by the root of the second moment plus 1e-8, and 1e-8 is 0 in fp16, whose smallest number is
    6e-8: the step is divided by zero. An eps of 1e-4 avoids that and costs stability. "Attempting to unscale FP16
    gradients" is the same trap.

    Fix: precision=auto keeps what is trained in fp32; precision=bf16 where the hardware has it.
    """
    if s.config.train.precision == "pure-fp16":
        yield Found(f"weights, gradients and Adam's moments are all fp16; eps is raised to {FP16_ADAM_EPS:g}")


def emulated_precision(s: Subject) -> Iterator[Found]:
    """A number format that this hardware only imitates.

    Cause: Arithmetic that the processor does not have is done in another format and converted back and forth: fp16 on a
    CPU is several times slower than fp32. And where bf16 is native, fp16 brings its narrow range for nothing.

    Fix: precision=auto.
    """
    wanted, machine = s.config.train.precision.removeprefix("pure-"), s.machine
    if wanted == "fp16" and machine.kind == "cpu":
        yield Found("fp16 on a CPU is emulated, and slower than fp32")
    elif wanted == "bf16" and not machine.native_bf16:
        yield Found(f"bf16 on this {machine.kind} is emulated, and slower than fp32")
    elif wanted == "fp16" and machine.native_bf16:
        yield Found(
            f"fp16 is used where this {machine.kind} has bf16, which needs no loss scaling and does not overflow"
        )


def wide_quantised_compute(s: Subject) -> Iterator[Found]:
    """QLoRA that computes in fp32.

    Cause: Each 4-bit weight is widened to quantization.compute_dtype before it is multiplied, and fp32 is bitsandbytes'
    own default: on a GPU that misses the tensor cores, and steps take minutes instead of seconds.

    Fix: quantization.compute_dtype=auto takes bf16, or fp16 on older GPUs.
    """
    wanted, machine = s.config.quantization, s.machine
    if (
        wanted
        and wanted.bits == 4
        and wanted.compute_dtype == "fp32"
        and (machine.native_bf16 or machine.kind == "cuda")
    ):
        native = "bf16" if machine.native_bf16 else "fp16"
        yield Found(
            f"quantization.compute_dtype is fp32, and this {machine.kind} computes {native} several times faster"
        )


def steps(s: Subject) -> Iterator[Found]:
    """Steps and warm-up that do not fit the data.

    Cause: The learning rate rises for train.warmup_fraction of the steps. In a run of few steps that is most of it;
    with fewer steps than train.log_every nothing is seen of it; and a batch larger than the data makes one step an
    epoch.

    Fix: More epochs, a smaller train.batch_size times train.gradient_accumulation, or a smaller warm-up.
    """
    t = s.config.train
    effective = t.batch_size * t.gradient_accumulation
    if effective > len(s.train):
        yield Found(f"one optimiser step takes {effective:,} rows, and there are {len(s.train):,}")
    elif s.steps < t.log_every:
        yield Found(f"the run has {s.steps:,} steps, fewer than between two lines of the log ({t.log_every:,})")
    if t.warmup_fraction > 0.5:
        yield Found(f"the learning rate rises for {100 * t.warmup_fraction:.0f}% of the run and hardly stands")
    if t.save_every and t.save_every > s.steps:
        yield Found(
            f"train.save_every = {t.save_every:,} is more than the run's {s.steps:,} steps: nothing is saved between"
        )


def learning_rate(s: Subject) -> Iterator[Found]:
    """A learning rate usual for another method.

    Cause: The methods differ by orders of magnitude. Full fine-tuning at LoRA's rate collapses to the largest class;
    prompt tuning at LoRA's rate learns nothing in its few parameters.

    Fix: Leave train.learning_rate out, which takes the method's own (`siliang methods`), or stay within ten times of
    it.
    """
    rate, usual = s.config.train.learning_rate, s.method.learning_rate
    if rate is None or max(rate / usual, usual / rate) < RATE_FACTOR * (1 - 1e-9):
        return
    near = min(METHODS.values(), key=lambda m: max(rate / m.learning_rate, m.learning_rate / rate))
    like = f"; {rate:g} is usual for {near.name}" if near is not s.method and near.learning_rate / rate < 3 else ""
    yield Found(f"{rate:g} for {s.method.name}, whose own is {usual:g} ({s.method.learning_rate_source}){like}")


def disk(s: Subject) -> Iterator[Found]:
    """The checkpoints will not fit the disk.

    Cause: Each checkpoint holds the trained weights and Adam's two moments of each, and a run that fills the disk
    ends in the middle of writing one.

    Fix: Make room, choose another disk with --output, or lower train.keep.
    """
    trained = _trained_parameters(s)
    if trained is None:
        return
    t = s.config.train
    copies = t.keep + 1 + bool(t.best) if t.saves else 1
    need = 4 * trained * (1 + 3 * copies) + 2**20
    folder = Path(s.config.output).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        yield Found(f"{need / 1e6:,.0f} MB are needed in {folder}, and {free / 1e6:,.0f} MB are free on that disk")


def _attach(s: Subject) -> str | None:
    """What goes wrong when the method is attached to the model's skeleton; None where nothing does."""
    if s.method.config is None:
        return None
    try:
        _attached(s)
    except (TargetError, ConfigError) as error:
        return str(error)
    return None


def _attached(s: Subject) -> Any:
    assert s.method.config is not None
    with torch.device("meta"):
        return get_peft_model(s.skeleton(), s.method.config(task_type=s.task.adapter_type, **s.config.method.arguments))


def _trained_parameters(s: Subject) -> int | None:
    try:
        if s.method.config is None:
            return count_parameters(s.skeleton())[1]
        return count_parameters(_attached(s))[0]
    except (TargetError, ConfigError, ModelError):
        return None
