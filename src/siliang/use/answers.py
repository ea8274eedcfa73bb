"""The outputs of a trained model for some prompts and held-out rows: the same for every run of a comparison."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np

from siliang.engine.splits import mixing
from siliang.engine.written import sample
from siliang.peft_api.model import PeftModel
from siliang.records import Answer, Answers
from siliang.run_folder import OpenedRun
from siliang.secrets import redacted_part
from siliang.tasks.measures import measuring
from siliang.train.types import Run
from siliang.use.evaluate import measures_of_texts
from siliang.use.generate import as_asked, write_texts
from siliang.use.predict import predict
from siliang.use.sampling import Sampling

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
    found, size = Answers(), 1 if mixing(run.model) else None  # what takes a mean over a batch answers each alone
    write = partial(write_texts, sampling=Sampling(up_to=max_new_tokens), batch_size=size, base=base)
    written = write(opened, [as_asked(opened, prompt) for prompt in prompts])
    found.prompts = [Answer(input=prompt, predicted=text) for prompt, text in zip(prompts, written, strict=True)]
    eval_rows = run.examples.eval
    questions = {number: eval_rows[number].prompt(PREFIX) for number in sample(len(eval_rows), WRITTEN_ROWS)}
    asked = {number: question for number, question in questions.items() if question is not None}
    texts = dict[int, str]()
    for task in {eval_rows[number].task or 0 for number in asked}:
        own = [number for number in asked if (eval_rows[number].task or 0) == task]
        rows = [as_asked(opened, asked[n].instruction, asked[n].input, plain=asked[n].plain) for n in own]
        texts |= zip(own, write(replace(opened, task_id=task), rows), strict=True)
    for number, question in asked.items():
        instruction, right, given = question.instruction, question.target, texts[number]
        shown = f"{instruction}\n{question.input}".strip()
        if question.plain:  # a text that was cut in two, perhaps within a secret
            at = len(instruction)
            shown = redacted_part(instruction + right, 0, at).strip()
            given, right = redacted_part(instruction + given, at), redacted_part(instruction + right, at)
        found.rows.append(Answer(where=eval_rows.where(number), input=shown, expected=right, predicted=given))
    task = run.task
    if not task.measures:
        task = measuring(task, task.usual_measures)
    missing = base or not set(task.measures) <= set(run.record.final)
    if task.measures and missing:
        tuned = run.model
        with tuned.disable_adapter() if base and isinstance(tuned, PeftModel) else nullcontext():
            found.metrics |= measures_of_texts(opened, run.eval_rows, task).values
    return found
