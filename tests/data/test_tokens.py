"""Tokens, labels and batches: what is cut, and what never is; the cache; the other tasks."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, word_tokenizer
from tokenizers import normalizers

from siliang.config import DataConfig
from siliang.data import example_set, token_key
from siliang.data import tokens as tokens_module
from siliang.data.collate import PadCollator
from siliang.data.conversations import prompt_tokens, shared_tokens, windows
from siliang.data.encode import IGNORED
from siliang.data.entries import token_labels
from siliang.data.example_set import ExampleSet
from siliang.data.examples import Labelled, Prepared, SourceTarget, Span, Tagged, Text, from_json, to_json
from siliang.data.messages import Conversation, Message, conversation
from siliang.data.small_table import SmallTable
from siliang.data.tokens import tokenize, usable
from siliang.tasks import CAUSAL_LM, QUESTION_ANS, SEQ_2_SEQ_LM, SEQ_CLS, TASKS, TOKEN_CLS
from siliang.types import DataError

TOKENIZER = word_tokenizer()
texts = st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join)
CAUSAL = CAUSAL_LM.data


def config(**values: object) -> DataConfig:
    return DataConfig.model_validate({"train": "x"} | values)


@settings(deadline=None)
@given(instruction=texts, input=texts, output=texts.filter(bool), max_length=st.integers(8, 80))
def test_labels_are_the_answer_and_its_end(instruction: str, input: str, output: str, max_length: int) -> None:
    talk = conversation(instruction or "say", output, input)
    made = tokenize([talk], TOKENIZER, config(max_length=max_length), CAUSAL)
    ids, labels = made[0]["input_ids"], made[0]["labels"]
    assert len(ids) == len(labels) <= max_length
    trained = [t for t in labels if t != IGNORED]
    assert ids[len(ids) - len(trained) :] == trained
    assert trained[-1] == TOKENIZER.eos_token_id
    answer = TOKENIZER(output, add_special_tokens=False)["input_ids"]
    assert trained[:-1] == answer[: len(trained) - 1]
    prompt = prompt_tokens(instruction or "say", TOKENIZER, template="human-assistant", input=input)
    lost = int(made.column("lost")[0])
    assert lost == len(prompt) + len(answer) + 1 - len(ids)
    assert int(made.column("lost_answer")[0]) == len(answer) + 1 - len(trained)
    if not lost:
        assert ids == [*prompt, *answer, TOKENIZER.eos_token_id]
    else:
        kept = ids[: len(ids) - len(trained)]
        assert prompt[len(prompt) - len(kept) :] == kept
        assert len(trained) >= min(len(answer) + 1, max_length // 2)


def test_the_oldest_rounds_go_first() -> None:
    system = Message("system", "I")
    rounds = [
        m for word in ("one", "two", "three") for m in (Message("user", f"say {word}"), Message("assistant", word))
    ]
    talk = Conversation((system, *rounds))
    made = tokenize([talk], TOKENIZER, config(max_length=16), CAUSAL)
    text = TOKENIZER.decode(made[0]["input_ids"])
    assert text == "I Human : say three Assistant : three </s>"
    dropped = tokenize([talk, conversation("a", "one")], TOKENIZER, config(max_length=16, too_long="drop"), CAUSAL)
    assert (len(dropped), dropped.dropped) == (1, 1)
    assert dropped.column("row").tolist() == [1]


def test_plain_text_is_trained_whole() -> None:
    made = tokenize([Text("one two")], TOKENIZER, config(), CAUSAL)[0]
    assert made["labels"] == made["input_ids"]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_padding_carries_no_label_and_no_attention(lengths: list[int]) -> None:
    rows = [{"input_ids": list(range(1, n + 1)), "labels": list(range(1, n + 1))} for n in lengths]
    padded = PadCollator(pad_token_id=2)(rows)  # 2 is also a word of every row of two and more
    for i, n in enumerate(lengths):
        assert padded["attention_mask"][i].sum() == n
        assert padded["labels"][i, :n].tolist() == rows[i]["labels"]
        assert (padded["labels"][i, n:] == IGNORED).all()
        assert (padded["input_ids"][i, n:] == 2).all()


def test_a_text_to_classify_is_cut_by_the_tokenizer() -> None:
    made = tokenize([Labelled("one " * 50, "b")], TOKENIZER, config(max_length=10), SEQ_CLS.data, labels=["a", "b"])
    assert (len(made[0]["input_ids"]), made[0]["labels"], made.column("lost").tolist()) == (10, 1, [40])
    assert "token_type_ids" not in made[0]


def test_tags_stand_on_the_first_piece_of_a_word() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "Wang": 3, "##lin": 4, "lives": 5}, unk_token="[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[UNK]"
    )
    sentence = Tagged(("Wanglin", "lives", "Wang"), ("S-NAME", "O", "S-NAME"))
    made = tokenize([sentence], tok, config(), TOKEN_CLS.data, labels=["O", "S-NAME"])[0]
    assert made == {"input_ids": [1, 3, 4, 5, 3, 2], "labels": [IGNORED, 1, IGNORED, 0, 1, IGNORED]}
    cut = tokenize([Tagged(("lives",) * 20, ("O",) * 20)], tok, config(max_length=8), TOKEN_CLS.data, labels=["O"])
    assert cut[0]["input_ids"] == [1, *[5] * 6, 2]
    assert (cut.column("lost").tolist(), cut.column("lost_answer").tolist()) == ([14], [14])


def test_sources_and_targets_end_with_the_end() -> None:
    made = tokenize([SourceTarget("one two", "two " * 9)], TOKENIZER, config(max_target_length=4), SEQ_2_SEQ_LM.data)
    assert TOKENIZER.decode(made[0]["labels"]) == "two two two </s>"
    assert made.column("lost_answer").tolist() == [6]
    batch = PadCollator(0)([made[0], {"input_ids": [1], "labels": [2]}])
    assert batch["input_ids"].shape == (2, 2) and batch["labels"].shape == (2, 4)


def test_windows_of_a_long_context() -> None:
    context = " ".join(WORDS[:24])
    answer = " ".join(WORDS[10:12])
    span = Span("say it", context, (answer,), (context.index(answer),))
    made = tokenize([span], TOKENIZER, config(max_length=12, stride=4), QUESTION_ANS.data)
    assert len(made) > 2 and set(made.column("row").tolist()) == {0}
    found = 0
    for i in range(len(made)):
        start, end = made[i]["start_positions"], made[i]["end_positions"]
        if end:
            assert TOKENIZER.decode(made[i]["input_ids"][start : end + 1]) == answer
            found += 1
        assert "offsets" not in made[i]
    assert found


def test_prepared_rows_stay_as_they_are() -> None:
    made = tokenize([Prepared((5, 6, 7), (IGNORED, 6, 7))], TOKENIZER, config(), CAUSAL)[0]
    assert made == {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}


@pytest.mark.parametrize(
    "example",
    [
        conversation("a", "b", "c", "d"),
        Text("x\n\u2028"),
        Labelled("a", "b", "c"),
        Tagged(("a",), ("O",)),
        Span("q", "c", ("a",), (0,)),
        SourceTarget("s", "t"),
        Prepared((1, 2), (3, 4)),
    ],
)
def test_examples_survive_the_table(example: object) -> None:
    assert from_json(to_json(example)) == example  # type: ignore[arg-type]
    assert ExampleSet.build([("here", example)])[0] == example  # type: ignore[list-item]


def test_more_than_memory_goes_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_set, "SPILL_BYTES", 2000)
    many = ExampleSet.build((f"f:{i}", Text(f"row {i}")) for i in range(300))
    assert many.table.cache_files  # memory-mapped
    assert [e.text for e in many] == [f"row {i}" for i in range(300)]  # type: ignore[union-attr]
    assert many.where(299) == "f:299"


def test_tokens_are_kept_by_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path))
    monkeypatch.setattr(tokens_module, "CACHED_ROWS", 10)
    calls = 0
    real: Callable[..., object] = tokens_module._batch

    def counting(*args: object) -> object:
        nonlocal calls
        calls += 1
        return real(*args)

    monkeypatch.setattr(tokens_module, "_batch", counting)
    rows = ExampleSet.build((str(i), conversation("say", WORDS[i % 9])) for i in range(20))
    first = tokenize(rows, TOKENIZER, config(), CAUSAL)
    n = calls
    again = tokenize(ExampleSet.build((f"elsewhere {i}", e) for i, e in enumerate(rows)), TOKENIZER, config(), CAUSAL)
    assert calls == n > 0
    assert [first[i] for i in range(20)] == [again[i] for i in range(20)]
    tokenize(rows, TOKENIZER, config(template="vicuna"), CAUSAL)
    assert calls > n
    other = word_tokenizer()
    other.add_tokens(["new"])
    n = calls
    tokenize(rows, other, config(), CAUSAL)
    assert calls > n


def test_tokens_of_other_code_are_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = token_key.code_folders(CAUSAL)
    assert [folder.name for folder in folders] == ["data", "tasks"]
    copies = [tmp_path / folder.name for folder in folders]
    for folder, copy in zip(folders, copies, strict=True):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__"))
        assert token_key.code_hash(copy) == token_key.code_hash(folder)
    monkeypatch.setattr(token_key, "code_folders", lambda spec: copies)
    rows = ExampleSet.build([("1", conversation("say", "a"))])
    arguments = (rows, TOKENIZER, config(), CAUSAL, None, True)
    before = token_key.key_of(*arguments)
    data = (
        "encode",
        "chat",
        "templates",
        "conversations",
        "pairs",
        "tokens",
        "words",
        "jinja",
        "example",
        "messages",
        "examples",
    )
    data += ("judge",)
    names = [f"data/{name}" for name in data]
    shared = ("tasks/context_windows", "tasks/preferences/ranked", "tasks/embeddings/tokens")
    for name in (*names, *(f"tasks/{task.data.name}" for task in TASKS.values()), *shared):
        with (tmp_path / f"{name}.py").open("a") as file:
            file.write("\n")
        token_key.code_hash.cache_clear()
        after = token_key.key_of(*arguments)
        assert after != before, name
        before = after


def test_pairs_and_single_texts_are_never_tokenized_together() -> None:
    with pytest.raises(AssertionError):
        tokenize([Labelled("a", "x", "one"), Labelled("is", "y")], TOKENIZER, config(), SEQ_CLS.data, labels=["x", "y"])


def test_processes_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_set, "FEW_ROWS", 5)
    rows = ExampleSet.build((str(i), conversation("say", WORDS[i % 9])) for i in range(1200))
    one = tokenize(rows, TOKENIZER, config(workers=1), CAUSAL)
    two = tokenize(rows, TOKENIZER, config(workers=2, train_on="last"), CAUSAL)
    assert one.table["input_ids"] == two.table["input_ids"]
    assert np.array_equal(one.learned, two.learned)


def test_old_entries_of_the_cache_go(tmp_path: Path) -> None:
    import os

    from siliang.data.cache import prune

    (tmp_path / "old").write_text("")
    (tmp_path / "new").write_text("")
    os.utime(tmp_path / "old", (time.time() - 40 * 86400,) * 2)
    prune(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_many_rows_at_once_are_the_rows_one_by_one() -> None:
    made = tokenize([conversation("say", w) for w in WORDS[:9]], TOKENIZER, config(), CAUSAL)
    assert made.__getitems__([3, 1]) == [made[3], made[1]]
    assert made.lengths.tolist() == [len(made[i]["input_ids"]) for i in range(9)]
    assert made.learned.tolist() == [sum(x != IGNORED for x in made[i]["labels"]) for i in range(9)]


@pytest.mark.parametrize("kept", ["in memory", "in a set", "in a file"])
def test_few_examples_have_the_tokens_of_many(kept: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few are kept in a small table, without `datasets`."""
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path))
    talks = [conversation("say", w) for w in WORDS[:9]]
    rows = ExampleSet.build((str(i), e) for i, e in enumerate(talks)) if kept != "in memory" else talks
    if kept == "in a file":
        monkeypatch.setattr(tokens_module, "CACHED_ROWS", 5)
        tokenize(rows, TOKENIZER, config(), CAUSAL)
    few = tokenize(rows, TOKENIZER, config(), CAUSAL)
    monkeypatch.setattr(example_set, "FEW_ROWS", 5)
    many = tokenize(ExampleSet.build((str(i), e) for i, e in enumerate(talks)), TOKENIZER, config(), CAUSAL)
    assert isinstance(few.table, SmallTable) and isinstance(many.table, Dataset)
    assert few.table.column_names == many.table.column_names
    assert [few[i] for i in range(9)] == [many[i] for i in range(9)]
    assert few.__getitems__([3, 1]) == many.__getitems__([3, 1])
    for numbers in ("lengths", "learned", "last_windows"):
        assert np.array_equal(getattr(few, numbers), getattr(many, numbers))
    assert [x.tolist() for x in few.lists("input_ids")] == [x.tolist() for x in many.lists("input_ids")]
    assert [few.select([4, 2])[i] for i in range(2)] == [many.select([4, 2])[i] for i in range(2)]
    assert [x.tolist() for x in few.select([4, 2]).lists("labels")] == [few[i]["labels"] for i in (4, 2)]


@pytest.mark.parametrize("damage", ["cut", "other", "text", "objects"])
def test_a_damaged_file_of_tokens_is_made_anew(damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path))
    monkeypatch.setattr(tokens_module, "CACHED_ROWS", 5)
    rows = ExampleSet.build((str(i), conversation("say", w)) for i, w in enumerate(WORDS[:9]))
    made = tokenize(rows, TOKENIZER, config(), CAUSAL)
    (file,) = (tmp_path / "tokens").iterdir()
    good = file.read_bytes()
    if damage == "objects":  # pickles
        np.savez(file, **{"input_ids.numbers": np.array([{}], object)})  # type: ignore[arg-type]
    else:
        file.write_bytes({"cut": good[:-100], "other": good[:300] + bytes(50) + good[350:], "text": b"[]"}[damage])
    again = tokenize(rows, TOKENIZER, config(), CAUSAL)
    assert [made[i] for i in range(9)] == [again[i] for i in range(9)]
    assert file.read_bytes() == good


def test_more_rows_than_a_small_table_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_set, "FEW_ROWS", 5)
    few = ExampleSet.build((str(i), conversation("say", w)) for i, w in enumerate(WORDS[:4]))
    often = few.select([0, 3] * 4)  # of a source with a weight
    assert few.few and not often.few
    assert list(often) == [few[0], few[3]] * 4 and often.where(7) == "3"


def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As the system's own out-of-memory killer ends it."""

    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    # a handler as training has: it only takes note
    before = signal.signal(signal.SIGTERM, note := lambda number, frame: None)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    monkeypatch.setattr("siliang.data.tokens._batch", die)
    rows = [Labelled(f"the film was {w}", "a") for w in WORDS] * 30
    data = DataConfig(train="d.csv", workers=2)
    with pytest.raises(DataError, match="one of 2 processes that tokenize was killed"):
        tokenize(rows, word_tokenizer(), data, SEQ_CLS.data, labels=["a"])
    assert signal.getsignal(signal.SIGTERM) is note


@given(n=st.integers(1, 300), limit=st.integers(8, 40), stride=st.none() | st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_windows_follow_on_and_every_token_is_learned_once(n: int, limit: int, stride: int | None) -> None:
    ids = list(range(1000, 1000 + n))
    shared = shared_tokens(DataConfig(train="x", max_length=limit, stride=stride))
    assert 1 <= shared <= limit // 2 and (shared == 1 or shared == stride or stride > limit // 2)
    made = windows(ids, limit, shared) if n > limit else [{"input_ids": ids, "labels": ids}]
    assert [x for row in made for x in token_labels(row) if x != IGNORED] == ids
    assert all(1 < len(row["input_ids"]) <= limit for row in made if n > 1)
    for before, row in pairwise(made):
        # the first new token is learned from the last one of the window before
        assert row["input_ids"][:shared] == before["input_ids"][-shared:]
        assert token_labels(row)[:shared] == [IGNORED] * shared
        assert row["input_ids"][shared:] == token_labels(row)[shared:] != []


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5), limit=st.integers(8, 30))
@settings(max_examples=25, deadline=None)
def test_long_texts_are_learned_whole_and_apart(lengths: list[int], limit: int) -> None:
    tok = word_tokenizer()
    texts = [" ".join(WORDS[(i + k) % len(WORDS)] for k in range(n)) for i, n in enumerate(lengths)]
    data = DataConfig(train="x", max_length=limit)
    made = tokenize([Text(text) for text in texts], tok, data, CAUSAL_LM.data)
    rows, labels = made.column("row").tolist(), [x.tolist() for x in made.lists("labels")]
    for number, text in enumerate(texts):
        learned = [x for row, row_labels in zip(rows, labels, strict=True) if row == number for x in row_labels]
        assert [x for x in learned if x != IGNORED] == [*tok(text, add_special_tokens=False)["input_ids"], 2]
    assert int(made.learned.sum()) == sum(lengths) + len(lengths) and made.column("lost").sum() == 0
    assert rows == sorted(rows) and made.lengths.max() <= limit
    assert made.last_windows.sum() == len(lengths)


def test_long_texts_may_be_cut_or_dropped() -> None:
    tok, text = word_tokenizer(), Text("one " * 100)
    cut = tokenize([text], tok, DataConfig(train="x", max_length=16, long_text="cut"), CAUSAL_LM.data)
    assert len(cut) == 1 and cut.column("lost").tolist() == [85]
    dropped = tokenize([text], tok, DataConfig(train="x", max_length=16, too_long="drop"), CAUSAL_LM.data)
    assert len(dropped) == 0 and dropped.dropped == 1


def test_tokens_that_are_a_text_become_windows_too() -> None:
    ids = tuple(range(4, 44))
    data = DataConfig(train="x", max_length=16)
    made = tokenize([Prepared(ids, ()), Prepared(ids, (-100, *ids[1:]))], word_tokenizer(), data, CAUSAL_LM.data)
    assert made.column("row").tolist() == [0, 0, 0, 1] and made.column("lost").tolist() == [0, 0, 0, 24]
    drop = DataConfig(train="x", max_length=16, too_long="drop")
    assert tokenize([Prepared(ids, ())], word_tokenizer(), drop, CAUSAL_LM.data).dropped == 1


def test_rows_of_one_token_teach_nothing() -> None:
    made = tokenize([Prepared((5,), ())], word_tokenizer(), DataConfig(train="x"), CAUSAL_LM.data, keep_going=True)
    assert made.skipped == ["row 1 becomes 1 token, and a token is learned from those before it"]
    labelled = [Labelled("\u200b", "a"), Labelled("good", "b")]
    tok = word_tokenizer()
    tok.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")  # type: ignore[attr-defined]
    made = tokenize(labelled, tok, DataConfig(train="x"), SEQ_CLS.data, labels=["a", "b"], keep_going=True)
    assert len(made) == 1 and "becomes no token but special ones" in made.skipped[0]
    examples, kept = usable(ExampleSet.build((f"row {i}", e) for i, e in enumerate(labelled, start=1)), made)
    assert [e.text for e in examples] == ["good"] and kept.column("row").tolist() == [0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("question", "stride", "refused"),
    [
        ("is it", 128, None),
        ("is it one two three four", 8, None),  # leaves a smaller room than the stride
        ("one " * 13, 8, None),
        ("one " * 16, 8, "a question of 16 tokens, and data.max_length = 16 leaves no room for its context"),
        ("one " * 40, 8, "a question of 40 tokens"),
    ],
)
def test_a_question_as_long_as_the_window(question: str, stride: int, refused: str | None) -> None:
    context = " ".join(WORDS[:30])
    at = context.index("funny")
    span = Span(question, context, ("funny",), (at,))
    data = DataConfig(train="x", max_length=16, stride=stride)
    made = tokenize([span, span], word_tokenizer(), data, QUESTION_ANS.data, keep_going=True)
    if refused is not None:
        assert len(made.skipped) == 2 and refused in made.skipped[0]
        return
    assert not made.skipped and made.lengths.max() <= 16
    assert (made.column("end_positions") > 0).sum() >= 2


def test_an_answer_in_no_window_is_not_learned_as_none() -> None:
    context = " ".join(WORDS[:30])
    span = Span("is it", context, (context[:60],), (0,))
    made = tokenize([span], word_tokenizer(), DataConfig(train="x", max_length=12), QUESTION_ANS.data, keep_going=True)
    assert "has an answer that no window of 12 tokens holds" in made.skipped[0]
