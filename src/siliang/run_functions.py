"""What is done with a trained run, as functions (docs/python.md): what `siliang eval, predict, generate, merge` do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from siliang.argument_kinds import check_least, wrong_kind
from siliang.config import MeasureName
from siliang.data.example import Example
from siliang.function_arguments import as_inputs, as_path, as_text, quietly
from siliang.language import Bilingual

if TYPE_CHECKING:  # slow to import
    from siliang.merge import MergeProof
    from siliang.run_folder import OpenedRun
    from siliang.tasks import Prediction
    from siliang.use.evaluate import Evaluation
    from siliang.use.sampling import Sampling


RUN = Bilingual("the folder of a run, or what open_run gives", "运行的文件夹，或 open_run 的结果")
FILE = Bilingual("a file, a folder or a name on the hub", "文件、文件夹或 hub 上的名称")


@quietly
def open_run(run: str | os.PathLike[str], *, base: str | None = None, force: bool = False) -> OpenedRun:
    """Loads a run, for several calls of the functions below.

    Args:
        run: Its folder, or that of a checkpoint in it; or a model that writes, or such an adapter, alone.
        base: The present place of its base model, if it was moved.
        force: Open it even if its base model or its data have changed since its training.
    """
    from siliang.hardware import find_device
    from siliang.run_folder import find_run_or_model, open_trained

    folder = Path(as_path(run, "run", RUN))
    return open_trained(find_run_or_model(folder, base=base, force=force), device=find_device())


def _opened(run: OpenedRun | str | os.PathLike[str]) -> OpenedRun:
    if isinstance(run, str | os.PathLike):
        return open_run(run)
    from siliang.run_folder import OpenedRun

    if not isinstance(run, OpenedRun):
        raise wrong_kind(run, "run", RUN)
    return run


@quietly
def evaluate(
    run: OpenedRun | str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    measures: Sequence[MeasureName] | None = None,
    rows: int | Literal["all"] | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """The metrics of a run.

    Args:
        run: Its folder, or an opened run.
        data: None: the run's held-out rows.
        measures: Of the texts that the model writes (docs/measures.md). None: the run's own.
        rows: For how many rows texts are written. None: evaluation.rows.
        batch_size: Rows that go through the model at once. None: the run's own.

    Returns:
        `metrics` by name, and the `signatures` of measures of texts.

    Raises:
        DataError: There is no row to measure.
        ConfigError: A measure does not suit the run.
    """
    from siliang.use.evaluate import evaluation, with_evaluation

    check_least(batch_size=batch_size)
    opened = _opened(run)
    settings: dict[str, object] = {} if measures is None else {"measures": list(measures)}
    settings |= {} if rows is None else {"rows": None if rows == "all" else rows}
    opened = with_evaluation(opened, settings) if settings else opened
    return evaluation(opened, None if data is None else as_path(data, "data", FILE), batch_size=batch_size)


@quietly
def predict(
    run: OpenedRun | str | os.PathLike[str],
    inputs: str | Iterable[str | Sequence[str] | Example],
    *,
    top: int | None = None,
    min_confidence: float | None = None,
    prompt_name: Literal["query", "document", "none"] | None = None,
    batch_size: int | None = None,
) -> list[Prediction]:
    """A prediction for each text, in order.

    Args:
        run: Its folder, or an opened run.
        inputs: Texts; pairs of texts; (question, context); or the words of a sentence. A text alone is one text.
        top: So many of the most probable classes, in `values()["top"]`. None: only the most probable one.
        min_confidence: Below this probability a prediction is "no label". None: classification.min_confidence of the
            run.
        prompt_name: Of a run that gives vectors, the prompt of single texts: query, document or none. None:
            embedding.prompt_name of the run.
        batch_size: Rows that go through the model at once. None: as many as are the fastest.

    Returns:
        Each has `predicted`, `probability`, `inputs`, and `values()` for JSON.

    Raises:
        ConfigError: The run writes text: use `generate`; or `top`, `min_confidence` or `prompt_name` is not for it.
        DataError: A text lacks a part, or is longer than the model can read.
    """
    from siliang.use.predict import predict as predictions

    check_least(batch_size=batch_size)
    opened = _with_options(_opened(run), top, min_confidence, prompt_name)
    return list(predictions(opened, as_inputs(inputs), batch_size=batch_size))


def _with_options(
    run: OpenedRun,
    top: int | None,
    min_confidence: float | None,
    prompt_name: Literal["query", "document", "none"] | None,
) -> OpenedRun:
    """The run with what is wanted of its predictions."""
    least = run.min_confidence if min_confidence is None else min_confidence
    name = run.prompt_name if prompt_name is None else prompt_name
    return replace(run, top=run.top if top is None else top, min_confidence=least, prompt_name=name)


@quietly
def predict_file(
    run: OpenedRun | str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    top: int | None = None,
    min_confidence: float | None = None,
    prompt_name: Literal["query", "document", "none"] | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Writes the rows of a data file with a run's predictions, or with the texts that it generates, into another file.
    The same call resumes where it was stopped.

    Args:
        run: Its folder, or an opened run.
        data: A file with the columns that the run was trained on.
        output: A new .csv, .tsv, .jsonl or .parquet file.
        top: As for `predict`, like `min_confidence` and `prompt_name`.
        sampling: How a run that generates writes its texts. None: the most probable token each time.
        system: For such a run, a system message for rows without one. None: none.
        batch_size: For such a run, the texts that are written at once.
        progress: Called with the number of rows that are done.

    Returns:
        The number of rows.

    Raises:
        DataError: A row cannot be read.
        ConfigError: The output is of another kind, or an argument is not for the run.
        OutputError: The output is there already, or its .partial is of another call.
        InterruptedRunError: Ctrl-C.
    """
    from siliang.use.predict_file import check_output
    from siliang.use.predict_file import predict_file as write

    target = Path(as_path(output, "output", Bilingual("a new file", "新的文件")))
    check_output(target)
    check_least(batch_size=batch_size)
    return write(
        _with_options(_opened(run), top, min_confidence, prompt_name),
        as_path(data, "data", FILE),
        target,
        sampling=sampling,
        system=as_text(system or "", "system"),
        batch_size=batch_size,
        progress=progress,
    )


@quietly
def generate(
    run: OpenedRun | str | os.PathLike[str],
    instruction: str,
    input: str = "",
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    plain: bool | None = None,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text that a run's model writes, in the run's template.

    Args:
        run: Its folder, or an opened run.
        input: Of the instruction.
        system: A system message. None: none.
        max_new_tokens: None: 128, or as many as the model has positions for. More than it was trained for is a warning.
        temperature: 0: the most probable token each time.
        top_p: Only the most probable tokens are drawn that together have this probability.
        top_k: Only so many of the most probable tokens are drawn.
        repetition_penalty: Above 1: tokens that are there already are less probable.
        stop: The text ends in front of the first of these.
        seed: The same seed gives the same text. None: another text each time.
        plain: Continue the text without a template. None: as the run was trained.
        base: Ask the base model, without the adapter.
        on_text: Called with each piece of the text while it is written.

    Raises:
        ConfigError: The run does not write, the text is too long for it, or a value is not allowed.
    """
    from siliang.use.generate import generate as write
    from siliang.use.sampling import Sampling

    sampling = Sampling(
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop),
        seed=seed,
    )
    return write(
        _opened(run),
        as_text(instruction, "instruction"),
        as_text(input, "input"),
        system=as_text(system or "", "system"),
        sampling=sampling,
        plain=plain,
        base=base,
        on_text=on_text,
    )


@quietly
def merge(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    data: str | os.PathLike[str] | None = None,
    base: str | None = None,
    force: bool = False,
) -> MergeProof:
    """Merges a run's adapter into its base model, checks that the outputs are equal, and saves a plain model.

    Args:
        run: Its folder.
        output: A new folder.
        dtype: Of the saved model.
        data: Rows for the check. None: the run's own.
        base: The present place of the base model, if it was moved.
        force: Keep the model even if its outputs differ.

    Raises:
        MergeError: The outputs differ; nothing is written.
        ConfigError: The run has no adapter.
    """
    import torch

    from siliang.run_folder import check_empty
    from siliang.run_folder import open_run as opened
    from siliang.use.merge import merge as merged

    numbers = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    folder = Path(as_path(output, "output", Bilingual("a new folder", "新的文件夹")))
    check_empty(folder)
    run = as_path(run, "run", Bilingual("the folder of a run", "运行的文件夹"))
    loaded = opened(Path(run), base=base, force=force, dtype=numbers[dtype], quantized=False)
    return merged(loaded, folder, data=None if data is None else as_path(data, "data", FILE), force=force)
