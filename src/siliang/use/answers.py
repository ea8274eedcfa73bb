"""The outputs of a trained model for some prompts and held-out rows: the same for every run of a comparison."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from siliang.engine.written import sample
from siliang.peft_api.model import PeftModel
from siliang.records import Answer, Answers
from siliang.run_folder import OpenedRun
from siliang.secrets import redacted_part
from siliang.tasks.measures import measuring
from siliang.train.types import Run
from siliang.use.evaluate import measures_of_texts
from siliang.use.generate import generate
from siliang.use.predict import predict

ROWS = 500  # held-out rows whose predictions are kept, for tasks that need one forward pass
WRITTEN_ROWS = 4  # ... and for tasks that generate text
PREFIX = 60  # first characters of a plain text, which the model continues


def collect(run: Run, prompts: list[str], max_new_tokens: int, *, base: bool = False) -> Answers:
    """Collects the outputs of the run's model.

    Args:
        prompts: Texts to classify, or instructions, as the user gave them.
        base: Use the base model, without the adapter.
    """
    # prompts name no task: the first
    opened = OpenedRun(
        run.folder, run.config, run.record, run.model.eval(), run.tokenizer, precision=run.precision, task_id=0
    )
    if run.task.writes:
        return _texts(run, opened, prompts, max_new_tokens, base=base)
    return _predictions(run, opened, prompts)


def _predictions(run: Run, opened: OpenedRun, prompts: list[str]) -> Answers:
    """Predictions for some of the held-out rows, each with all its entries, and for the prompts. The run has been
    evaluated."""
    task, numbers = run.task, run.eval_set.column("row")
    if task.replies is None:
        return Answers()
    examples = np.unique(numbers)
    chosen = np.isin(numbers, examples[sample(len(examples), ROWS)])
    # of the last evaluation, which was with the weights that the run has now
    found = {entry: values for entry, values in run.sums.found.items() if chosen[entry]}
    rows = [
        Answer(
            where=run.examples.eval.where(number),
            input=reply.input,
            expected=reply.expected,
            predicted=reply.predicted,
            correct=reply.correct,
            probability=reply.probability,
        )
        for number, reply in task.replies(found, run.eval_rows)
    ]
    answers = Answers(rows=rows)
    if task.example_prompt is not None:
        for predicted in predict(opened, prompts):
            probability = None if predicted.probability is None else round(predicted.probability, 4)
            answers.prompts.append(
                Answer(input=predicted.inputs[0], predicted=predicted.predicted, probability=probability)
            )
    if task.majority is not None:
        answers.majority, answers.classes = task.majority(run.eval_rows), len(run.examples.labels or [])
    return answers


def _texts(run: Run, opened: OpenedRun, prompts: list[str], max_new_tokens: int, *, base: bool) -> Answers:
    found = Answers()
    for prompt in prompts:
        given = generate(opened, prompt, up_to=max_new_tokens, base=base)
        found.prompts.append(Answer(input=prompt, predicted=given))
    for number in sample(len(run.examples.eval), WRITTEN_ROWS):
        if (question := run.examples.eval[number].prompt(PREFIX)) is None:
            continue
        instruction, input, right, plain = question.instruction, question.input, question.target, question.plain
        own = replace(opened, task_id=run.examples.eval[number].task or 0)
        given = generate(own, instruction, input, up_to=max_new_tokens, base=base, plain=plain)
        place, shown = run.examples.eval.where(number), f"{instruction}\n{input}".strip()
        if plain:  # a text that was cut in two, perhaps within a secret
            at = len(instruction)
            shown = redacted_part(instruction + right, 0, at).strip()
            given, right = redacted_part(instruction + given, at), redacted_part(instruction + right, at)
        found.rows.append(Answer(where=place, input=shown, expected=right, predicted=given))
    task = run.task
    if not task.measures:
        task = measuring(task, task.usual_measures)
    missing = base or not set(task.measures) <= set(run.record.final)
    if task.measures and missing:
        tuned = run.model
        with tuned.disable_adapter() if base and isinstance(tuned, PeftModel) else nullcontext():
            found.metrics |= measures_of_texts(opened, run.eval_rows, task).values
    return found
