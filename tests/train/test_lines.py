"""What a run prints of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import WORDS, write_jsonl

from siliang.config import DataConfig
from siliang.data.prepared import PreparedData
from siliang.tasks import QUESTION_ANS, RERANKER, Task
from siliang.train.lines import say_data

LONG = " ".join(WORDS[:20])
CASES = [
    (
        QUESTION_ANS,
        {"context": LONG, "question": "what", "answers": {"text": WORDS[2], "answer_start": LONG.index(WORDS[2])}},
        "(windows of 3 questions)",
    ),
    (RERANKER, {"query": "what", "pos": WORDS[:2], "neg": []}, "(entries of 3 rows of the data)"),
]


@pytest.mark.parametrize(("task", "row", "shown"), CASES, ids=["question_ans", "reranker"])
def test_what_the_training_rows_are_made_of(
    task: Task, row: dict[str, Any], shown: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [row] * 3))
    settings = DataConfig(train=rows, test_size=0.0, max_length=16, stride=4)
    data = PreparedData(settings, task.data, model=str(model_folders["bert"]), revision=None, seed=0)
    lines: list[str] = []
    say_data(data, lines.append)
    assert shown in lines[0]
