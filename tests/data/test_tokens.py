"""Tokens and labels: the answer and its end are trained, and nothing else."""

from hypothesis import given
from hypothesis import strategies as st
from tiny import WORDS, word_tokenizer

from siliang.data.examples import Labelled, Turn
from siliang.data.templates import human_assistant
from siliang.data.tokens import IGNORED, PadCollator, prompt_tokens, tokenise

TOKENIZER = word_tokenizer()
texts = st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join)
CHAT = (
    "{% for m in messages %}<s> {{ m.role }} : {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant :{% endif %}"
)


def test_the_tutorials_template() -> None:
    assert human_assistant("say", "one") == "Human: say\none\n\nAssistant: "
    assert human_assistant("say") == "Human: say\n\nAssistant: "


@given(instruction=texts, input=texts, output=texts.filter(bool), max_length=st.integers(8, 80))
def test_labels_are_the_answer_and_its_end(instruction: str, input: str, output: str, max_length: int) -> None:
    turn = Turn(output, instruction or "say", input)
    row = tokenise([turn], TOKENIZER, template="human-assistant", max_length=max_length).rows[0]
    assert isinstance(row.labels, list)
    assert len(row.input_ids) == len(row.labels) <= max_length
    trained = [t for t in row.labels if t != IGNORED]
    assert row.input_ids[len(row.input_ids) - len(trained) :] == trained
    assert trained[-1] == TOKENIZER.eos_token_id
    answer = TOKENIZER(output, add_special_tokens=False)["input_ids"]
    assert trained[:-1] == answer[: len(trained) - 1]
    prompt = prompt_tokens(turn, TOKENIZER, template="human-assistant")
    if not row.truncated:
        assert row.input_ids == [*prompt, *answer, TOKENIZER.eos_token_id]
    else:
        kept = row.input_ids[: len(row.input_ids) - len(trained)]
        assert prompt[len(prompt) - len(kept) :] == kept
        assert len(trained) >= min(len(answer) + 1, max_length // 2)


def test_chat_template_trains_the_assistants_turn() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    row = tokenise([Turn("one two", "say")], tokenizer, template="chat", max_length=64).rows[0]
    assert isinstance(row.labels, list)
    trained = [t for t in row.labels if t != IGNORED]
    assert tokenizer.decode(trained) == "one two </s>"
    assert tokenizer.decode(row.input_ids).startswith("<s>")


def test_plain_text_is_trained_whole() -> None:
    row = tokenise([Turn("one two")], TOKENIZER, template="human-assistant", max_length=64).rows[0]
    assert row.labels == row.input_ids


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_padding_carries_no_label_and_no_attention(lengths: list[int]) -> None:
    rows = [{"input_ids": list(range(1, n + 1)), "labels": list(range(1, n + 1))} for n in lengths]
    padded = PadCollator(pad_token_id=2)(rows)
    for i, n in enumerate(lengths):
        assert padded["attention_mask"][i].sum() == n
        assert padded["labels"][i, :n].tolist() == rows[i]["labels"]
        assert (padded["labels"][i, n:] == IGNORED).all()
        assert (padded["input_ids"][i, n:] == 2).all()


def test_a_text_to_classify_is_cut_by_the_tokenizer() -> None:
    row = tokenise([Labelled("one " * 50, 1)], TOKENIZER, template="human-assistant", max_length=10).rows[0]
    assert (len(row.input_ids), row.labels, row.truncated) == (10, 1, True)
