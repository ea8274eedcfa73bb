"""Rows with a better and a worse answer: their layouts, what is refused, and how pairs are cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import word_tokenizer, write_jsonl

from siliang.check import find
from siliang.check.input import gather_input
from siliang.config import Columns, DataConfig, RunConfig
from siliang.data.encode import IGNORED
from siliang.data.example import Example
from siliang.data.examples import from_json, to_json
from siliang.data.find_layout import find_layout
from siliang.data.messages import Message, Ranked, Rated
from siliang.data.prepared import EvalRows
from siliang.data.tokens import TokenSet, tokenize
from siliang.engine.batches import sequences_of
from siliang.tasks import task_of
from siliang.tasks.preference import PREFERENCE
from siliang.tasks.preferences.ranked import answers_of
from siliang.types import DataError

Q, GOOD, BAD = "what is one", "one is one", "two"
ASKED = [{"role": "user", "content": Q}]
ANSWERS = [[{"role": "assistant", "content": text}] for text in (GOOD, BAD)]
WHOLE = [[*ASKED, *answer] for answer in ANSWERS]
ROWS: dict[str, dict[str, Any]] = {
    "TRL, texts": {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    "TRL, turns": {"prompt": ASKED, "chosen": ANSWERS[0], "rejected": ANSWERS[1]},
    "TRL, whole conversations": {"chosen": WHOLE[0], "rejected": WHOLE[1]},
    "UltraFeedback": {"prompt": Q, "chosen": WHOLE[0], "rejected": WHOLE[1], "messages": WHOLE[0], "score_chosen": 8.0},
    "whole conversations, one of them twice": {"messages": WHOLE[0], "chosen": WHOLE[0], "rejected": WHOLE[1]},
    "HH-RLHF": {
        "chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}",
    },
    "LLaMA-Factory, alpaca": {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD},
    "LLaMA-Factory, sharegpt": {
        "conversations": [{"from": "human", "value": Q}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "ms-swift": {"messages": WHOLE[0], "rejected_response": BAD},
    "ms-swift, whole conversations": {"messages": WHOLE[0], "rejected_messages": WHOLE[1]},
    "ms-swift, answers as turns": {"messages": WHOLE[0], "rejected_messages": ANSWERS[1]},
    "responses": {"prompt": Q, "responses": [BAD, GOOD], "scores": [1, 2.5]},
    "Nectar": {"prompt": Q, "answers": [{"answer": BAD, "rank": 2}, {"answer": GOOD, "rank": 1}]},
    "UltraFeedback, completions": {
        "instruction": Q,
        "completions": [{"response": BAD, "overall_score": 3.0}, {"response": GOOD, "overall_score": 8.5}],
    },
    "Stack Exchange": {"question": Q, "answers": [{"text": GOOD, "pm_score": 4}, {"text": BAD, "pm_score": 0}]},
    "LLaMA-Factory, the best first": {"instruction": Q, "input": "", "output": [GOOD, BAD]},
}


def read(row: dict[str, Any]) -> Example | str:
    layout, columns = find_layout("auto", row, PREFERENCE.data, Columns(), "rows.jsonl")
    return layout.example(row, columns)


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_a_pair_in_the_layouts_of_the_field(row: dict[str, Any]) -> None:
    found = read(row)
    assert isinstance(found, Ranked)
    answers = (Message("assistant", GOOD),), (Message("assistant", BAD),)
    assert (found.prompt_messages, found.answers, found.pairs) == ((Message("user", Q),), answers, [(0, 1)])
    assert from_json(to_json(found)) == found


def test_turns_in_front_of_the_question_belong_to_it() -> None:
    before = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    found = read({"chosen": [*before, *WHOLE[0]], "rejected": [*before, *WHOLE[1]], "system": "three"})
    assert isinstance(found, Ranked)
    assert [m.role for m in found.prompt_messages] == ["system", "user", "assistant", "user"]
    assert [m.trained for m in found.conversations[0].messages] == [True, True, False, True, True]


def test_nothing_that_is_asked_is_lost() -> None:
    found = read({"prompt": Q, "input": "one", "history": [["two", "three"]], "chosen": GOOD, "rejected": BAD})
    assert isinstance(found, Ranked)
    assert [m.text for m in found.prompt_messages] == ["two", "three", f"{Q}\none"]
    system = {"role": "system", "content": "four"}
    found = read({"prompt": [system, *ASKED], "chosen": WHOLE[0], "rejected": WHOLE[1]})
    assert isinstance(found, Ranked) and [m.role for m in found.prompt_messages] == ["system", "user"]
    found = read({"prompt": [system, *ASKED], "chosen": [system, *WHOLE[0]], "rejected": [system, *WHOLE[1]]})
    assert isinstance(found, Ranked) and [m.role for m in found.prompt_messages] == ["system", "user"]


def test_speakers_are_named_at_the_beginning_of_a_line() -> None:
    asked = 'write "Human: hi. Assistant: hello"'
    row = {name: f"Human: {asked}\n\nAssistant: {text}" for name, text in (("chosen", GOOD), ("rejected", BAD))}
    found = read(row)
    assert isinstance(found, Ranked) and [m.text for m in found.prompt_messages] == [asked]


@pytest.mark.parametrize("write", [json.dumps, str], ids=["json", "python"])
def test_turns_that_csv_holds_as_text(write: Callable[[object], str]) -> None:
    row = {"chosen": WHOLE[0], "rejected": WHOLE[1]}
    assert read({name: write(turns) for name, turns in row.items()}) == read(row)
    row = {"prompt": ASKED, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
    assert read({name: write(turns) for name, turns in row.items()}) == read(row)


def test_a_list_that_is_the_answer_is_a_text() -> None:
    found = read({"prompt": "[3, 1]", "chosen": "[1, 3]", "rejected": "['one', 'two']"})
    assert isinstance(found, Ranked) and found.words == ["[1, 3]", "['one', 'two']"]
    assert [m.text for m in found.prompt_messages] == ["[3, 1]"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": Q, "chosen": GOOD, "rejected": " "}, "has an empty 'rejected'"),
        ({"chosen": GOOD, "rejected": BAD}, "has no question"),
        ({"prompt": Q, "chosen": WHOLE[0], "rejected": ANSWERS[1]}, "a whole conversation in one of"),
        ({"prompt": "what is two", "chosen": WHOLE[0], "rejected": WHOLE[1]}, "asks one thing in its own column"),
        ({"prompt": [*ASKED, *ANSWERS[0]], "chosen": GOOD, "rejected": BAD}, "ends its question with the assistant"),
        ({"prompt": Q, "chosen": ASKED, "rejected": ASKED}, "has no answer at the end of 'chosen'"),
        ({"prompt": ASKED, "input": "one", "chosen": GOOD, "rejected": BAD}, "has turns in 'prompt' and also 'input'"),
        (
            {"system": "a"}
            | {name: [{"role": "system", "content": "b"}, *WHOLE[i]] for i, name in enumerate(("chosen", "rejected"))},
            "has two different system messages",
        ),
        ({"prompt": Q, "chosen": GOOD, "rejected": GOOD}, "has the same text in 'chosen' and 'rejected'"),
        ({"messages": ASKED, "rejected_response": BAD}, "has no answer at the end of 'messages'"),
        ({"prompt": Q, "responses": [GOOD, BAD]}, "has answers in 'responses' and no 'scores'"),
        ({"prompt": Q, "responses": [GOOD, BAD], "scores": [1]}, "as many numbers in 'scores' as answers"),
        ({"prompt": Q, "responses": [GOOD, BAD], "scores": [1, "good"]}, "has 'good' in 'scores', not a number"),
        ({"prompt": Q, "responses": [GOOD, BAD], "scores": [1, 1]}, "has the same score for all answers"),
        ({"prompt": Q, "responses": [GOOD], "scores": [1]}, "has no list of two answers or more in 'responses'"),
        ({"responses": [GOOD, BAD], "scores": [1, 2]}, "has no question: name its column with data.columns.prompt"),
        ({"prompt": Q, "answers": [{"answer": GOOD}, {"answer": BAD, "rank": 2}]}, "of which not each has a score"),
        ({"prompt": Q, "responses": [WHOLE[0], WHOLE[1]], "scores": [2, 1]}, "has whole conversations in 'responses'"),
        ({"instruction": Q, "output": GOOD}, "task=causal_lm learns single answers"),
        ({"instruction": Q, "output": [GOOD]}, "has no list of two answers or more in 'output'"),
        ({"prompt": Q, "chosen": GOOD, "rejected": BAD, "images": ["a.png"]}, "siliang trains on text alone"),
        ({"prompt": Q, "chosen": GOOD, "rejected": BAD, "margin": 2.0}, "has 'margin', by which some programs shift"),
        (
            {"chosen": WHOLE[0], "rejected": [{"role": "user", "content": "say two"}, *ANSWERS[1]]},
            "asks one thing in 'chosen' and another in 'rejected'",
        ),
    ],
)
def test_a_row_that_is_no_pair_says_why(row: dict[str, Any], why: str) -> None:
    found = read(row)
    assert isinstance(found, str) and why in found


# ---- tokens ----


def tokenized(examples: list[Example], **settings: Any) -> TokenSet:
    data = DataConfig.model_validate({"train": "-", **settings})
    tokenizer: Any = word_tokenizer()
    return tokenize(examples, tokenizer, data, PREFERENCE.data)


def pairs(examples: list[Example], **settings: Any) -> list[dict[str, Any]]:
    tokens = tokenized(examples, **settings)
    return [tokens[i] for i in range(len(tokens))]


def ranked(asked: str, *answers: str) -> Ranked:
    return Ranked((Message("user", asked),), tuple((Message("assistant", a),) for a in answers))


def test_a_ranking_becomes_every_pair_of_it() -> None:
    found = pairs([ranked(Q, "one", "two", "three")])
    ends = [[part["input_ids"][-2] for part in sequences_of(row)] for row in found]
    one, two, three = (
        word_tokenizer()(word, add_special_tokens=False)["input_ids"][0] for word in ("one", "two", "three")
    )
    assert ends == [[one, two], [one, three], [two, three]]


def test_answers_that_are_equally_good_or_equal_are_not_compared() -> None:
    found = read({"prompt": Q, "responses": ["one", "two", "three", "one"], "scores": [2, 1, 2, 0]})
    assert isinstance(found, Ranked)
    assert found.words == ["one", "three", "two", "one"] and found.pairs == [(0, 2), (1, 2), (1, 3), (2, 3)]
    assert from_json(to_json(found)) == found
    rows = tokenized([found, ranked(Q, "two", "four")])
    assert rows.column("row").tolist() == [0, 0, 0, 0, 1]
    shown = [texts for _, _, *texts in answers_of(range(5), EvalRows(rows, [found, ranked(Q, "two", "four")], []))]
    assert shown == [["one", "two"], ["three", "two"], ["three", "one"], ["two", "one"], ["two", "four"]]


def test_a_pair_that_is_too_long_keeps_one_prompt() -> None:
    asked = " ".join(["one", "two", "three", "four"] * 10)
    tokens = tokenized([ranked(asked, "one two three", "four")], max_length=24)
    chosen, rejected = sequences_of(tokens[0])
    prompts = [
        [x for x, label in zip(part["input_ids"], part["labels"], strict=True) if label == IGNORED]
        for part in (chosen, rejected)
    ]
    assert prompts[0] == prompts[1] and len(chosen["input_ids"]) == 24
    assert tokens.column("lost_answer").tolist() == [0] and tokens.column("lost")[0] > 0
    tokens = tokenized([ranked(asked, " ".join(["four"] * 40), "one")], max_length=24)
    chosen, _ = sequences_of(tokens[0])
    assert len(chosen["input_ids"]) == 24 and sum(x != IGNORED for x in chosen["labels"]) == 12
    assert chosen["labels"][-1] == word_tokenizer().eos_token_id and tokens.column("lost_answer")[0] > 0
    long, short = ranked(asked, "one", "two"), ranked(Q, "one", "two")
    tokens = tokenized([short, long], max_length=24, too_long="drop")
    assert len(tokens) == tokens.dropped == 1 and [tokens[0]] == pairs([short], max_length=24)


# ---- check ----


def findings(rows: list[dict[str, Any]], folder: Path) -> set[str]:
    from every_task import configured, make_models

    models = make_models(folder)
    config = configured("preference", models, folder)
    write_jsonl(folder / "preference.jsonl", rows)
    return {finding.code for finding in find(gather_input(config))}


def test_check_names_contradictions_lengths_and_refusals(tmp_path: Path) -> None:
    plain = [{"prompt": f"say {i}", "chosen": f"one {i}", "rejected": f"two {i}"} for i in range(40)]
    assert not {"SL044", "SL045", "SL046"} & findings(plain, tmp_path / "plain")
    longer = [row | {"chosen": f"{row['chosen']} and more"} for row in plain]
    other_way = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in longer]
    assert "SL045" in findings(longer, tmp_path / "longer")
    assert "SL044" in findings(longer + other_way, tmp_path / "both")
    refusing = [row | {"chosen": "Sorry, I cannot"} for row in plain]
    assert "SL046" in findings(refusing, tmp_path / "refusing")


# ---- answers that are good or bad ----

KTO = task_of(
    RunConfig.build(
        {"model": "-", "task": "preference", "preference": {"loss": "kto"}, "data": {"train": "-"}, "output": "-"}
    )
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "completion": GOOD, "label": True},
        {"prompt": ASKED, "completion": ANSWERS[0], "label": 1},
        {"question": Q, "answer": GOOD, "label": "true"},
        {"instruction": Q, "input": "", "output": GOOD, "kto_tag": True},
        {"messages": WHOLE[0], "label": 1.0},
        {"messages": WHOLE[0], "kto_tag": True},
    ],
)
def test_an_answer_with_a_mark(row: dict[str, Any]) -> None:
    layout, columns = find_layout("auto", row, KTO.data, Columns(), "rows.jsonl")
    found = layout.example(row, columns)
    assert isinstance(found, Rated)
    assert found == Rated((Message("user", Q),), (Message("assistant", GOOD),), True)
    assert from_json(to_json(found)) == found
    other = layout.example(row | {columns.label: "maybe"}, columns)
    assert isinstance(other, str) and "has 'maybe' in" in other and "neither true nor false" in other


def test_each_task_says_which_rows_the_other_loss_reads() -> None:
    row = {"prompt": Q, "completion": GOOD, "label": True}
    with pytest.raises(DataError, match=r"which task=preference with preference\.loss=kto learns from"):
        find_layout("auto", row, PREFERENCE.data, Columns(), "rows.jsonl")
    with pytest.raises(DataError, match=r"they are for task=preference \(with any loss but kto\), or task=reward"):
        find_layout("auto", ROWS["TRL, texts"], KTO.data, Columns(), "rows.jsonl")


def test_the_second_sequence_has_the_answer_of_the_row_before() -> None:
    examples = [
        Rated((Message("user", asked),), (Message("assistant", answer),), good)
        for asked, answer, good in (("what", "one", True), ("is", "two", False), ("say", "three", True))
    ]
    tokenizer: Any = word_tokenizer()
    rows = tokenize(examples, tokenizer, DataConfig.model_validate({"train": "-"}), KTO.data)
    answers = [[part["input_ids"][-2] for part in sequences_of(rows[i])] for i in range(3)]
    one, two, three = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("one", "two", "three"))
    assert answers == [[one, three], [two, one], [three, two]]
    assert [rows[i]["desirable"] for i in range(3)] == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]


def rated(asked: str, answer: str, good: bool = True) -> Rated:
    return Rated((Message("user", asked),), (Message("assistant", answer),), good)


def kto_rows(examples: list[Rated], **settings: Any) -> TokenSet:
    tokenizer: Any = word_tokenizer()
    return tokenize(examples, tokenizer, DataConfig.model_validate({"train": "-", **settings}), KTO.data)


def test_the_other_answer_is_one_to_another_prompt() -> None:
    """Rows with a weight stand twice, and good and bad answers to a prompt one behind the other."""
    examples = [rated("what", "one"), rated("what", "one"), rated("what", "two", False), rated("is", "three")]
    rows, tokenizer = kto_rows(examples), word_tokenizer()
    others = [sequences_of(rows[i])[1]["input_ids"][-2] for i in range(4)]
    two, three = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("two", "three"))
    assert others == [three, three, three, two]
    alone = kto_rows([rated("what", "one"), rated("what", "two")])
    assert [alone[i]["sequences"] for i in range(2)] == [[len(alone[i]["input_ids"])] for i in range(2)]


def test_another_rows_answer_neither_cuts_nor_drops_a_row() -> None:
    asked, long = " ".join(["one", "two", "three"] * 12), " ".join(["four"] * 60)
    short = sequences_of(kto_rows([rated(asked, "one"), rated("is", "two")], max_length=64)[0])[0]
    beside = kto_rows([rated(asked, "one"), rated("is", long)], max_length=64)
    assert sequences_of(beside[0])[0] == short and beside.column("lost_answer").tolist()[0] == 0
    kept = kto_rows([rated(asked, "one"), rated("is", long)], max_length=64, too_long="drop")
    assert len(kept) == 1 and sequences_of(kept[0])[0] == short
