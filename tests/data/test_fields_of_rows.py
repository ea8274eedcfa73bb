"""What a row says of itself: that an answer is not to be learned, is about a picture, was thought about."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import write_jsonl
from transformers import PreTrainedTokenizerFast

from siliang.config import Columns, DataConfig
from siliang.data.encode import IGNORED
from siliang.data.examples import Prepared
from siliang.data.find_layout import find_layout
from siliang.data.load import load_examples
from siliang.data.messages import Call, Conversation, Message
from siliang.data.spec import DataSpec
from siliang.data.tokens import tokenize
from siliang.data.turns import unused_fields
from siliang.tasks import CAUSAL_LM, SEQ_2_SEQ_LM
from siliang.types import DataError

CAUSAL = CAUSAL_LM.data
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
]


def read(values: dict[str, Any], task: DataSpec = CAUSAL) -> Any:
    layout, columns = find_layout("auto", values, task, Columns(), "rows")
    return layout.example(values, columns)


def turns(at: int, **fields: Any) -> dict[str, Any]:
    return {"messages": [m | fields if i == at else m for i, m in enumerate(TALK)]}


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"loss_mask": 0}, {"loss": 0.0}]
)
def test_a_turn_that_is_marked_is_not_learned(mark: dict[str, Any]) -> None:
    talk = read(turns(1, **mark))
    assert [m.trained for m in talk.messages if m.role == "assistant"] == [False, True]


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"loss": None}, {"weight": 1.0, "train": True}])
def test_a_turn_that_is_marked_as_learned_is(mark: dict[str, Any]) -> None:
    assert all(m.trained for m in read(turns(1, **mark)).messages)


def test_marks_reach_the_labels(words: PreTrainedTokenizerFast) -> None:
    for train_on, learned in (("all", "two </s>"), ("last", "two </s>")):
        data = DataConfig(train="x", train_on=train_on)  # type: ignore[arg-type]
        row = tokenize([read(turns(1, weight=0))], words, data, CAUSAL)[0]
        assert words.decode([x for x in row["labels"] if x != IGNORED]) == learned
    with pytest.raises(DataError, match="marks its last answer as one that is not learned"):
        tokenize([read(turns(3, weight=0))], words, DataConfig(train="x", train_on="last"), CAUSAL)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (turns(1, weight=0.5), "turn 2 of 'messages' has 'weight': 0.5; allowed are true and false, or 1 and 0"),
        (turns(1, train="no"), "'train': 'no'; allowed are"),
        (turns(1, weight=1, train=False), "'weight' and 'train', which contradict each other"),
        (turns(0, train=True), "is to be learned ('train'), and is the user's"),
        (turns(1, mask=1), "has 'mask', which some programs mean as"),
        (turns(1, train_detail=[{"begin_offset": 0}]), "'train_detail': a turn is learned as a whole"),
        ({"messages": [m | {"weight": 0} if m["role"] == "assistant" else m for m in TALK]}, "marks every answer"),
        (turns(1, content={"a": 1}), "turn 2 of 'messages' has an object for its content, not text: {\"a\": 1}"),
        (turns(0, content=[{"type": "image_url", "image_url": {"url": "x"}}]), "a part of the type 'image_url'"),
        (turns(0, content="<image>\nwhat is it"), "turn 1 of 'messages' holds <image>"),
        (turns(0, images=["a.png"]), "has 'images': siliang trains on text alone"),
        (turns(0, reasoning_content="I think"), "only the assistant thinks"),
        (turns(1, thinking="a", reasoning="b"), "which are not one text"),
        (turns(1, tool_calls=[{"function": {}}]), "has a tool call without name and arguments"),
        ({"messages": TALK, "images": ["a.png"]}, "has 'images'"),
        ({"messages": TALK, "rejected_response": "no"}, "a better and a worse answer"),
        ({"conversations": TALK, "chosen": TALK[1], "rejected": TALK[3]}, "a better and a worse answer"),
        ({"prompt": "hello", "completion": "yes", "label": False}, "has 'label': False, which marks"),
        ({"prompt": "hello", "completion": "yes", "label": "false"}, "has 'label': 'false'"),
        ({"messages": TALK, "kto_tag": False}, "has 'kto_tag'"),
        ({"instruction": "hello", "output": ["yes", "no"]}, "has a list of texts in 'output': one text belongs there"),
        ({"instruction": "hello", "output": {"a": "yes"}}, "has an object in 'output'"),
        ({"instruction": "<image>what", "output": "yes"}, "holds <image>"),
        ({"instruction": "hello", "output": "yes", "history": [["a"]]}, "has a 'history' that is not a list"),
        ({"instruction": "hello", "output": "yes", "history": "none"}, "has a 'history' that is not a list"),
        ({"text": ["a", "b"]}, "has a list in 'text'"),
        ({"input_ids": [1, 2], "labels": [1, -5]}, "or -100, in 'labels'"),
        ({"input_ids": [1, -2]}, "whole numbers in 'input_ids'"),
        ({"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1]}, "several texts in one row"),
    ],
)
def test_what_cannot_be_learned_as_it_is_meant_is_refused(values: dict[str, Any], reason: str) -> None:
    found = read(values)
    assert isinstance(found, str) and reason in found


@pytest.mark.parametrize(
    "values",
    [
        turns(1, loss=True, images=[], audio=None),
        {"messages": TALK, "images": None, "chosen": "", "label": True},
        {"prompt": "hello", "completion": "yes", "label": 1},
        turns(0, content="how do I close a <video> tag in HTML"),
        turns(0, content=[{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]),
        {"messages": [{"role": "developer", "content": "I"}, *TALK]},
        {"messages": [m | {"from": m["role"], "role": None, "value": m["content"], "content": None} for m in TALK]},
    ],
)
def test_what_says_nothing_is_no_hindrance(values: dict[str, Any]) -> None:
    found = read(values)
    assert isinstance(found, Conversation)
    assert [m.content for m in found.messages if m.role == "assistant"][-1] in ("two", "yes")


def test_a_pairs_better_answer_is_learned_where_the_user_names_it() -> None:
    values = {"prompt": "hello", "chosen": "yes", "rejected": "no"}
    layout, columns = find_layout("auto", values, CAUSAL, Columns(completion="chosen"), "rows")
    assert layout.example(values, columns) == Conversation((Message("user", "hello"), Message("assistant", "yes")))


def test_conversations_in_two_columns_are_trls() -> None:
    values = {"prompt": TALK[:3], "completion": TALK[3:]}
    found = read(values)
    assert [(m.content, m.trained) for m in found.messages] == [
        ("hello", True),
        ("yes", False),
        ("one", True),
        ("two", True),
    ]


def test_calls_in_all_their_spellings() -> None:
    call = {"name": "look", "arguments": {"a": 1}}
    wanted = (Call("look", '{"a": 1}'),)
    answer = [{"role": "tool", "content": {"sky": "clear"}, "name": "look"}, TALK[3]]
    for said in (
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([{"function": call}])},
        {"role": "assistant", "content": "", "function_call": call},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "tool_call", "value": json.dumps([call])},
    ):
        found = read({"messages": [TALK[0], said, *answer]})
        assert found.messages[1].calls == wanted
        assert (found.messages[2].content, found.messages[2].name) == ('{"sky": "clear"}', "look")


def test_masks_of_prepared_rows_say_what_is_learned() -> None:
    assert read({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}) == Prepared((5, 6, 7), (-100, 6, 7))
    both = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "assistant_masks": [1, 0, 1]}
    assert read(both) == Prepared((5, 6, 7), (-100, -100, 7))
    assert "zeros and ones in 'loss_mask'" in str(read({"input_ids": [5, 6], "loss_mask": [1]}))


def test_an_encoder_decoder_has_no_place_for_a_system_message() -> None:
    found = read({"instruction": "hello", "output": "yes", "system": "I"}, SEQ_2_SEQ_LM.data)
    from siliang.tasks.seq_2_seq_lm import as_source_target

    assert "has a system message" in str(as_source_target(found))


def test_fields_that_nothing_is_made_of_are_named() -> None:
    values = {"messages": [TALK[0] | {"name": "Ann", "id": 1}, TALK[1] | {"prefix": True, "weight": 1, "name": None}]}
    assert unused_fields(values, Columns()) == {"messages[].name", "messages[].id", "messages[].prefix"}
    tool = {"messages": [{"role": "tool", "content": "a", "name": "look", "tool_call_id": "1"}]}
    assert unused_fields(tool, Columns()) == set()


def test_rows_that_are_refused_by_their_tokens_are_bad_rows(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"messages": TALK}, {"messages": [*TALK[:2], {"role": "system", "content": "I"}, *TALK[2:]]}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    data = DataConfig(train=str(path), test_size=0.0)
    examples = load_examples(data, CAUSAL, seed=0).train
    with pytest.raises(DataError, match=r"1 row is bad: .*d.jsonl:2 has a system message in turn 3"):
        tokenize(examples, words, data, CAUSAL)
    kept = tokenize(examples, words, data.model_copy(update={"skip_bad_rows": True}), CAUSAL)
    assert len(kept) == 1 and len(kept.skipped) == 1


def test_words_nobody_knows_are_a_bad_row(words: PreTrainedTokenizerFast) -> None:
    def refused(text: str) -> list[str]:
        example = Conversation((Message("user", text), Message("assistant", text)))
        return tokenize([example], words, DataConfig(train="x"), CAUSAL, keep_going=True).skipped

    assert refused("hello Σ") == []  # half of them
    assert refused("Σ Ω")[0].endswith("4 of its 4 tokens are unknown")
    assert refused("hello hello " + "Σ Ω " * 9) == [
        "row 1 is not in the tokenizer's vocabulary: 36 of its 40 tokens are unknown"
    ]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    from tiny import word_tokenizer

    return word_tokenizer()


HISTORY = [["hello", "yes"], ["one", "two"], ["three", "four"]]


@pytest.mark.parametrize("system", [{}, {"system": "be kind"}])
@pytest.mark.parametrize("history", [HISTORY, json.dumps(HISTORY)])
def test_history_is_learned_oldest_first(history: Any, system: dict[str, str]) -> None:
    talk = read({"instruction": "five", "output": "six", "history": history, **system})
    said = [m.text for m in talk.messages]
    assert said == [*system.values(), "hello", "yes", "one", "two", "three", "four", "five", "six"]
    assert [m.role for m in talk.messages][-8:] == ["user", "assistant"] * 4


def test_turns_as_json_text() -> None:
    talk = [*TALK[:3], TALK[3] | {"weight": 1, "odd": "x"}]
    for column in ("messages", "conversations"):
        assert read({column: json.dumps(talk)}) == read({column: talk})
        assert unused_fields({column: json.dumps(talk)}, Columns()) == {f"{column}[].odd"}
        assert "has no list of turns" in read({column: "[hello"})


def test_several_answers_are_no_answer() -> None:
    said = read({"instruction": "hello", "output": ["yes", "no"]})
    assert said == "has a list of texts in 'output': one text belongs there, or a list of turns {role, content}"
