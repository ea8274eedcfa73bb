"""Several sources in one run: their layouts, and the shares by temperature."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, make, word_tokenizer, write_jsonl

from siliang.config import DataConfig, RunConfig
from siliang.config.sources import Source
from siliang.data.layouts import LAYOUTS
from siliang.data.layouts_in_words import IN_WORDS
from siliang.data.load import load_examples, load_rows
from siliang.data.splitting import mixed, weighted
from siliang.run_folder import open_run
from siliang.tasks import TASKS
from siliang.train.run import train
from siliang.types import ConfigError, DataError
from siliang.use.evaluate import evaluate
from siliang.use.generate import how_it_is_asked

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
CAUSAL = TASKS["CAUSAL_LM"].data


def sources(folder: Path, sizes: tuple[int, ...] = (40, 10, 30)) -> list[str]:
    """Plain texts, instructions, and texts in a column of another name."""
    texts = [{"text": f"one {' '.join(WORDS[i % 20 : i % 20 + 18])}"} for i in range(sizes[0])]
    asked = [{"instruction": f"say {WORDS[i % 30]} {i}", "output": WORDS[i % 7]} for i in range(sizes[1])]
    talks = [
        {"messages": [{"role": "user", "content": f"{i} {WORDS[i % 9]}"}, {"role": "assistant", "content": "two"}]}
        for i in range(sizes[2])
    ]
    parts = {"texts": texts, "asked": asked, "talks": talks}
    return [str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in parts.items()]


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=2, max_size=6),
    temperature=st.floats(1, 20),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_shares_follow_the_formula(sizes: list[int], temperature: float, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=len(sizes), max_size=len(sizes)))
    rows = [n * times for n, times in zip(sizes, mixed(sizes, weights, temperature), strict=True)]
    assert math.isclose(sum(rows), sum(n * w for n, w in zip(sizes, weights, strict=True)), rel_tol=1e-9)
    wanted = [w * n ** (1 / temperature) for n, w in zip(sizes, weights, strict=True)]
    for found, part in zip(rows, wanted, strict=True):
        assert math.isclose(found / sum(rows), part / sum(wanted), rel_tol=1e-9)
    assert mixed(sizes, weights, 1.0) == pytest.approx(weights)


@given(
    sources=st.lists(st.tuples(st.integers(0, 60), st.floats(0.05, 3.5)), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_the_rows_that_the_weights_say(sources: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = [n for n, _ in sources], [w for _, w in sources]
    ends = np.cumsum(sizes)
    chosen = [i for i in range(sum(sizes)) if i % 7]  # the others are held out
    found = Counter(weighted(chosen, sizes, weights, seed))
    kept = np.bincount(np.searchsorted(ends, chosen, side="right"), minlength=len(sizes))
    assert abs(sum(found.values()) - float(kept @ weights)) <= 0.5 + 1e-6
    for start, end, w in zip(ends - sizes, ends, weights, strict=True):
        own = [i for i in chosen if start <= i < end]
        assert {found[i] for i in own} <= {math.floor(w), math.ceil(w)}
        assert abs(sum(found[i] for i in own) - w * len(own)) < 1 + 1e-6
    assert Counter(weighted(chosen, sizes, weights, seed)) == found and set(found) <= set(chosen)


def test_a_mixture_is_the_same_for_a_seed(tmp_path: Path) -> None:
    files = sources(tmp_path)
    data = DataConfig(train=[{"path": f} for f in files], mix_temperature=5.0, test_size=0.1)  # type: ignore[list-item]

    def kinds(seed: int) -> list[str]:
        return [type(e).__name__ + str(e.texts) for e in load_examples(data, CAUSAL, seed=seed).train]

    assert kinds(1) == kinds(1) != kinds(2)
    found = load_examples(data, CAUSAL, seed=1)
    counts = Counter(found.train.where(i).rpartition(":")[0] for i in range(len(found.train)))
    rows = [counts[f] for f in files]
    assert abs(sum(rows) - 72) < 6  # 90% of 80 rows
    assert min(rows) > 15 and len(found.eval) == 8  # of 10 instructions, 9 are trained about twice each
    assert sum("mix_temperature" in note for note in found.notes) == 3


def test_each_source_has_its_own_layout(tmp_path: Path) -> None:
    texts, asked, talks = sources(tmp_path)
    found = load_examples(DataConfig(train=[texts, asked, talks], test_size=0.1), CAUSAL, seed=1)
    assert [*found.layouts] == ["text", "alpaca", "messages"] and found.layout == "text" and not found.unused
    says = "text: 'text'; alpaca: 'instruction', 'output'; messages: 'messages'"
    assert found.says_columns == says and "；" in found.says_columns.zh
    # a source's layout may be set, where its columns fit several
    both = write_jsonl(tmp_path / "both.jsonl", [{"instruction": "a", "output": "b", "text": "say one"}] * 2)
    named = DataConfig(train=[asked, {"path": str(both), "layout": "text"}], test_size=0.0)  # type: ignore[list-item]
    found = load_examples(named, CAUSAL, seed=1)
    assert [*found.layouts] == ["alpaca", "text"] and found.unused == ["instruction", "output"]
    likely = load_examples(DataConfig(train=[asked, str(both)], test_size=0.0), CAUSAL, seed=1)
    assert [*likely.layouts] == ["alpaca"] and likely.unused == ["text"]


def test_a_mixed_run_is_evaluated_on_each_kind(tmp_path: Path) -> None:
    texts, asked, _ = sources(tmp_path)
    model, tok = make("llama"), word_tokenizer()
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tok.save_pretrained(tmp_path / "model")
    values = {
        "model": str(tmp_path / "model"),
        "task": "causal_lm",
        "data": {"train": [texts, asked], "max_length": 16, "mix_temperature": 2.0},
        "train": {"max_steps": 2, "batch_size": 4, "precision": "fp32"},
        "output": str(tmp_path / "run"),
    }
    record = train(RunConfig.build(values))
    assert record.layouts == {"text": {"text": "text"}, "alpaca": {"instruction": "instruction", "output": "output"}}
    run = open_run(tmp_path / "run")
    assert evaluate(run)["loss"] == pytest.approx(record.final["eval_loss"], rel=1e-6)
    assert evaluate(run, texts)["rows"] == 40 and evaluate(run, asked)["rows"] == 10
    assert "in the template human-assistant" in str(how_it_is_asked(run.record))
    other = write_jsonl(tmp_path / "other.jsonl", [{"review": "a", "label": "b"}])
    with pytest.raises(DataError, match="has no column 'text', which the run was trained on; it has 'review', 'label'"):
        load_rows(run.config.data, CAUSAL, str(other), run.record.layouts)


def test_a_temperature_needs_several_sources(tmp_path: Path) -> None:
    texts, *_ = sources(tmp_path)
    with pytest.raises(ConfigError, match=r"data.mix_temperature = 2 needs several sources"):
        load_examples(DataConfig(train=texts, mix_temperature=2.0), CAUSAL, seed=0)
    alone = DataConfig(train=[Source(path=texts, weight=0.5)], streaming=True)
    with pytest.raises(ConfigError, match=r"of a single one, the weight 0\.5 has no effect"):
        load_examples(alone, CAUSAL, seed=0)


def test_a_mismatch_names_the_columns_and_the_task_that_fits(tmp_path: Path) -> None:
    """In one line, for the rows of every layout and every task that does not read it."""
    rows: dict[str, dict[str, object]] = {
        "chosen-rejected": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "alpaca": {"instruction": "a", "output": "b"},
        "text": {"text": "a"},
        "text-label": {"text": "a", "label": "b"},
        "tokens-tags": {"tokens": ["a"], "tags": ["O"]},
        "squad": {"context": "a", "question": "a", "answers": {"text": ["a"], "answer_start": [0]}},
        "source-target": {"source": "a", "target": "b"},
    }
    seen = 0
    for layout, row in rows.items():
        path = tmp_path / f"{layout}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        for task in TASKS.values():
            try:
                load_examples(DataConfig(train=str(path), test_size=0), task.data, seed=0, keep_going=True)
            except DataError as error:
                first = str(error).splitlines()[0]
                names = [repr(name) for name in row]
                assert any(name in first for name in names), (layout, task.title, first)
                if "which task=" in first:
                    seen += 1
                    assert all(f"task={name}" in first for name in IN_WORDS[layout][1]), first
                    assert f"task={task.title} reads" in first and "\n" not in str(error)
    assert seen >= 25
    for name in LAYOUTS:
        readers = tuple(t.title for t in TASKS.values() if name in t.data.layouts)
        assert IN_WORDS[name][1] == (readers or ("preference with preference.loss=kto",))
    with pytest.raises(
        DataError, match=r"'squad' is not for causal_lm; .* It holds questions on a context, for task=ques"
    ):
        load_examples(DataConfig(train=str(tmp_path / "text.jsonl"), layout="squad"), CAUSAL, seed=0)
