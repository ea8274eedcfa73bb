"""A named template served as Jinja writes what training wrote; the families' are in test_named.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import SHARED, word_tokenizer
from transformers import AutoTokenizer, BertTokenizer, LlamaTokenizer

from siliang.data.conversations import prompt_tokens, writer
from siliang.data.encode import Encoder
from siliang.data.jinja import as_jinja, with_chat_template
from siliang.data.messages import Call, Conversation, Message
from siliang.data.templates import FIELDS, TEMPLATES


def tokenizer(name: str) -> Any:
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("needs ../shared, which is not there")
    if name == "bert-zh":
        return BertTokenizer(vocab=str(folder / "vocab.txt"))
    if name == "llama2":
        return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    return AutoTokenizer.from_pretrained(folder)


OWN = [template.name for template in FIELDS]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"城": "x"}}}]
TALKS = {
    "one": [("user", "hello {content} 'it' \\n\n"), ("assistant", "yes\n")],
    "system": [("system", 'be\n"brief"'), ("user", "hello"), ("assistant", "yes"), ("user", "a"), ("assistant", "b")],
    "turns": [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")],
}


def written(template: str, talk: Conversation, encoder: Encoder, *, prompt: bool = False) -> str:
    """The text of the pieces that training makes tokens of."""
    write = writer(template, encoder)
    pieces = write.prompt(talk) if prompt else write.entries([talk])[0][-1].pieces
    eos = encoder.tokenizer.convert_ids_to_tokens(encoder.need_eos())
    return "".join(eos if piece.end and encoder.marker(piece.text) is None else piece.text for piece in pieces)


@pytest.mark.parametrize("template", OWN)
@pytest.mark.parametrize("talk", list(TALKS))
def test_every_named_template(template: str, talk: str) -> None:
    tok: Any = word_tokenizer()
    encoder = Encoder(tok)
    tok.chat_template = as_jinja(TEMPLATES[template], encoder, served=True)
    messages = [{"role": role, "content": text} for role, text in TALKS[talk]]
    conversation = Conversation(tuple(Message(role, text) for role, text in TALKS[talk]))  # type: ignore[arg-type]
    assert tok.apply_chat_template(messages, tokenize=False) == written(template, conversation, encoder)
    asked = Conversation(conversation.messages[:-1])
    prompt = tok.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt == written(template, asked, encoder, prompt=True)


@pytest.mark.parametrize("template", OWN)
def test_tools_and_calls(template: str) -> None:
    tok: Any = word_tokenizer()
    encoder = Encoder(tok)
    tok.chat_template = as_jinja(TEMPLATES[template], encoder, served=True)
    call = {"name": "weather", "arguments": {"city": "北京", "n": 1}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "clear"},
        {"role": "assistant", "content": "Clear."},
    ]
    talk = Conversation(
        (
            Message("user", "weather?"),
            Message("assistant", "", calls=(Call("weather", json.dumps(call["arguments"], ensure_ascii=False)),)),
            Message("tool", "clear"),
            Message("assistant", "Clear."),
        ),
        json.dumps(TOOLS, ensure_ascii=False),
    )
    assert tok.apply_chat_template(messages, tools=TOOLS, tokenize=False) == written(template, talk, encoder)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["minimind", "bert-zh", "llama2"])
@pytest.mark.parametrize("template", OWN)
def test_the_prompts_tokens_are_those_of_training(name: str, template: str) -> None:
    """Where the space in front of an answer is the answer's, the served prompt ends before it."""
    served: Any
    served, said = with_chat_template(tokenizer(name), template, ["alpaca"])
    asked = [{"role": "user", "content": "hello"}]
    ids = served.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert said.startswith(template)
    if name != "llama2":  # a whole text has other tokens behind <s> there than one that begins anew
        assert ids == prompt_tokens("hello", tokenizer(name), template=template)


def test_what_was_not_written_in_a_template_gets_none(tmp_path: Path) -> None:
    tok: Any = word_tokenizer()
    assert with_chat_template(tok, "alpaca", ["text"]) == (tok, "")
    assert with_chat_template(tok, "chat", ["messages"])[0] is tok
    mine = tmp_path / "mine.yaml"
    mine.write_text('user: "Q: {content}\\n"\nassistant: "A: "\n')
    served: Any
    served, _ = with_chat_template(tok, str(mine), ["text", "messages"])
    assert served.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "Q: a\n"
