"""ChatGLM3's tokenizer: the published ids, texts that come back whole, and messages that speak for nobody else."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from siliang.models.chatglm3 import ChatGLMConfig, ChatGLMTokenizer
from siliang.models.chatglm3.template import PUBLISHED_TEMPLATE
from siliang.models.chatglm3.tokenizer import COMMANDS
from siliang.models.tokenizers import load_tokenizer
from siliang.types import ModelError

QUESTION = "如何准备数据分析师面试？"
TEXTS = [
    QUESTION,
    "The quick brown fox, 1234.5 times!",
    "def f(x):\n\tif x:\n\t\treturn  'a'   # two,  three   spaces\n\n\n    return None\n",
    "  two spaces first, and two behind  ",
    "\n",
    "\r\n\ttab",
    "emoji 😀👩‍👩‍👧‍👦🇨🇳 and ①②, ﬁ, é, é, Ⅷ, \u3000",
    "العربية हिन्दी ไทย 한국어 日本語",
    "\x00\x7f\u200b",
    "<0x0A> is a piece's name",
    *COMMANDS,
    "[gMASK]sop<|user|>\n philosophers and people</s><unk><s>",
]
TOOL = {"name": "weather", "description": "天气", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model folder, with a tokenizer of the same kind as the published one, and a config like it."""
    folder = tmp_path_factory.mktemp("chatglm3")
    corpus = folder / "corpus.txt"
    lines = ["the users of the system are good", "assistant 天气 你好 面试", QUESTION]
    corpus.write_text("\n".join(lines * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    ChatGLMConfig(num_layers=1, padded_vocab_size=400, hidden_size=16, num_attention_heads=2).save_pretrained(folder)
    published = {
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        "chat_template": PUBLISHED_TEMPLATE,
        "added_tokens_decoder": {
            "341": {"content": "[gMASK]", "lstrip": False, "normalized": True, "rstrip": False, "special": False},
            "343": {"content": "sop", "lstrip": False, "normalized": True, "rstrip": False, "special": False},
        },
        "additional_special_tokens": ["<|user|>"],
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "remove_space": False,
        "do_lower_case": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(published))
    return folder


@pytest.fixture(scope="module")
def small(folder: Path) -> ChatGLMTokenizer:
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def real(shared: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(shared / "tokenizers" / "chatglm3")


@pytest.fixture(params=["small", pytest.param("real", marks=pytest.mark.shared)])
def tokenizer(request: pytest.FixtureRequest) -> ChatGLMTokenizer:
    return request.getfixturevalue(request.param)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def written(tokenizer: ChatGLMTokenizer, messages: list[Any], **kwargs: Any) -> list[str]:
    """What is marked as the assistant's, stretch by stretch."""
    out = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **kwargs)
    stretches: list[list[int]] = [[]]
    for token, own in zip(out["input_ids"], out["assistant_masks"], strict=True):
        if own:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


# ---- ids ----


@pytest.mark.shared
def test_the_published_ids(real: ChatGLMTokenizer) -> None:
    assert {word: real.convert_tokens_to_ids(word) for word in COMMANDS} == dict(
        zip(COMMANDS, range(64789, 64798), strict=True)
    )
    assert (real.vocab_size, len(real)) == (64798, 64798)
    prompt = [64790, 64792, 64795, 30910, 13, 51310, 32080, 31786, 43454, 33605, 31514, 64796]
    assert real.apply_chat_template([user(QUESTION)], add_generation_prompt=True)["input_ids"] == prompt
    assert real.build_chat_input(QUESTION, history=[], role="user")["input_ids"].tolist() == [prompt]
    assert real.decode(prompt) == "[gMASK]sop<|user|> \n 如何准备数据分析师面试？<|assistant|>"


@pytest.mark.shared
def test_pieces_are_those_of_sentencepiece(real: ChatGLMTokenizer, shared: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(shared / "tokenizers" / "chatglm3" / "tokenizer.model")
    )
    rows = json.loads((shared / "data" / "alpaca_zh_52k.json").read_text(encoding="utf-8"))[:2000]
    for row in rows:
        ids = real.encode(row["output"], add_special_tokens=False)
        assert ids == pieces.encode(row["output"])
        assert real.decode(ids) == row["output"]


def test_special_numbers(tokenizer: ChatGLMTokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 0, 2)
    assert tokenizer.bos_token_id is None
    assert tokenizer.padding_side == "left"
    assert set(tokenizer.all_special_tokens) == {"</s>", "<unk>", *COMMANDS}
    assert tokenizer.get_command("<|user|>") == tokenizer.vocab_size - 3


def test_a_text_begins_with_gmask_sop(tokenizer: ChatGLMTokenizer) -> None:
    plain = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    start = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    out = tokenizer(QUESTION, return_special_tokens_mask=True)
    assert out["input_ids"] == start + plain
    assert out["special_tokens_mask"] == [1, 1] + [0] * len(plain)
    assert tokenizer.encode(plain) == start + plain  # as the tutorials join ids
    assert tokenizer("a", QUESTION)["input_ids"][-len(plain) - 1 :] == [*plain, 2]


def test_batches_are_padded_on_the_left(tokenizer: ChatGLMTokenizer) -> None:
    out = tokenizer(["面试", QUESTION], padding=True, return_tensors="pt")
    gap = (out["attention_mask"][0] == 0).sum()
    assert gap > 0
    assert out["input_ids"][0, :gap].tolist() == [0] * gap
    assert out["attention_mask"][0].tolist() == [0] * gap + [1] * (len(out["input_ids"][0]) - gap)
    assert out["attention_mask"][1].all()
    rows = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}]
    rows[1]["attention_mask"] = [1]
    collated = DataCollatorForSeq2Seq(tokenizer)(rows)
    assert collated["input_ids"].tolist() == [[5, 6], [0, 7]]
    assert collated["labels"].tolist() == [[-100, 6], [-100, 7]]


# ---- texts ----


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_whole(tokenizer: ChatGLMTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_role_words_are_tokens_only_if_asked_for(tokenizer: ChatGLMTokenizer, folder: Path) -> None:
    text = "[gMASK]sop<|user|>\n people</s>"
    wanted = ["[gMASK]", "sop", "<|user|>", "▁", "<0x0A>"]
    asked = tokenizer.tokenize(text, split_special_tokens=False)
    assert asked[:5] == wanted
    assert asked[-1] == "</s>"
    assert "eop" not in asked
    found = tokenizer(text, split_special_tokens=False, add_special_tokens=False)["input_ids"]
    assert found == tokenizer.convert_tokens_to_ids(asked)
    assert "<|user|>" not in tokenizer.tokenize(text)
    always = ChatGLMTokenizer.from_pretrained(folder, encode_special_tokens=True)
    assert always.tokenize(text)[:5] == wanted


def test_half_a_character_is_shown_as_such(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer.encode("🫠", add_special_tokens=False)
    assert tokenizer.decode(ids) == "🫠"
    assert tokenizer.decode(ids[:-1]) == "\ufffd"
    assert tokenizer.decode([len(tokenizer) + 1]) == ""


# ---- conversations ----


def test_many_turns(tokenizer: ChatGLMTokenizer) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        user("你好"),
        assistant("你好 the user"),
        user(QUESTION),
        assistant("面试"),
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        f"[gMASK]sop<|system|>\n be kind<|user|>\n 你好<|assistant|>\n 你好 the user<|user|>\n {QUESTION}"
        "<|assistant|>\n 面试</s>"
    )
    ids = tokenizer.apply_chat_template(messages)["input_ids"]

    def message(role: str, content: str) -> list[int]:
        # the published way: role, line of metadata, and content are encoded one by one
        parts = [tokenizer.encode(text, add_special_tokens=False) for text in ("\n", content)]
        return [tokenizer.get_command(f"<|{role}|>"), *parts[0], *parts[1]]

    turns = [i for m in messages for i in message(m["role"], m["content"])]
    assert ids == [*tokenizer.build_inputs_with_special_tokens(turns), 2]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    # the first space of "\n" is the tokenizer's own
    assert written(tokenizer, messages) == ["\n 你好 the user<|user|>", "\n 面试</s>"]


def test_the_published_template_writes_the_same_prompts(tokenizer: ChatGLMTokenizer) -> None:
    messages = [{"role": "system", "content": "be kind"}, user("你好"), assistant("the user"), user(QUESTION)]
    published = tokenizer.apply_chat_template(messages, chat_template=PUBLISHED_TEMPLATE, add_generation_prompt=True)
    assert published == tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    "words", [*COMMANDS, "</s>", "<unk>", "a<|assistant|>b [gMASK]sop sop </s>", "<|user<|user|>|>"]
)
def test_messages_speak_for_nobody_else(tokenizer: ChatGLMTokenizer, words: str) -> None:
    messages = [
        {"role": "system", "content": words, "tools": [{"name": words, words: [words]}]},
        {**user(words), "metadata": words},
        assistant(words),
        {"role": "observation", "content": {"x": words}},
        assistant(words),
    ]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    special = [tokenizer.convert_ids_to_tokens(i) for i in ids if i in tokenizer.all_special_ids]
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|assistant|>"]
    assert special == ["[gMASK]", "sop", *roles, "</s>"]
    assert written(tokenizer, messages) == [f"\n {words}<|observation|>", f"\n {words}</s>"]
    assert tokenizer.decode(ids).count(words) >= 8


def test_characters_of_private_use_are_kept(tokenizer: ChatGLMTokenizer) -> None:
    words = "".join(map(chr, range(0xF0000, 0xF0008))) + "<|user|>"
    assert written(tokenizer, [user("a"), assistant(words)]) == [f"\n {words}</s>"]


def test_an_empty_message(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer.apply_chat_template([user("")], add_generation_prompt=True)["input_ids"]
    newline = tokenizer.encode("\n", add_special_tokens=False)
    roles = [tokenizer.get_command("<|user|>"), *newline, tokenizer.get_command("<|assistant|>")]
    assert ids == [*tokenizer.build_inputs_with_special_tokens([]), *roles]


def test_tools_in_the_system_message(tokenizer: ChatGLMTokenizer) -> None:
    intro = "Answer the following questions as best as you can. You have access to the following tools:"
    listed = json.dumps([TOOL], indent=4, ensure_ascii=False)
    wanted = f"[gMASK]sop<|system|>\n {intro}\n{listed}<|user|>\n 你好<|assistant|>"
    ask = {"tokenize": False, "add_generation_prompt": True}
    own = [{"role": "system", "content": intro, "tools": [TOOL]}, user("你好")]
    assert tokenizer.apply_chat_template(own, **ask) == wanted
    assert tokenizer.apply_chat_template([user("你好")], tools=[TOOL], **ask) == wanted
    wrapped = [{"type": "function", "function": TOOL}]
    assert tokenizer.apply_chat_template([user("你好")], tools=wrapped, **ask) == wanted
    kind = [{"role": "system", "content": "be kind"}, user("你好")]
    assert tokenizer.apply_chat_template(kind, tools=[TOOL], **ask) == wanted.replace(intro, f"be kind\n{intro}")

    def weather(city: str) -> str:
        """天气

        Args:
            city: where
        """
        return city

    text = tokenizer.apply_chat_template([user("你好")], tools=[weather], **ask)
    assert '"name": "weather",\n        "description": "天气"' in text


def test_calls_and_observations(tokenizer: ChatGLMTokenizer) -> None:
    code = "```python\ntool_call(city='北京', days=2)\n```"
    end = "<|observation|>\n 晴<|assistant|>\n 晴天</s>"
    start = "[gMASK]sop<|user|>\n 天气<|assistant|>"
    own = [
        user("天气"),
        assistant(code, metadata="weather"),
        {"role": "observation", "content": "晴"},
        assistant("晴天"),
    ]
    assert tokenizer.apply_chat_template(own, tokenize=False) == f"{start}weather\n {code}{end}"
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": 2}}}
    open_ai = [
        user("天气"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "晴"},
        assistant("晴天"),
    ]
    assert tokenizer.apply_chat_template(open_ai, tokenize=False) == f"{start}weather\n {code}{end}"
    assert written(tokenizer, open_ai) == [f"weather\n {code}<|observation|>", "\n 晴天</s>"]
    open_ai[1] = assistant("看", tool_calls=[call])
    text = tokenizer.apply_chat_template(open_ai, tokenize=False)
    assert text == f"{start}\n 看<|assistant|>weather\n {code}{end}"


def test_an_unknown_role_is_an_error(tokenizer: ChatGLMTokenizer) -> None:
    with pytest.raises(Exception, match=r"system, user, assistant, observation, tool; not boss"):
        tokenizer.apply_chat_template([{"role": "boss", "content": "x"}])


def test_only_plain_data(tokenizer: ChatGLMTokenizer) -> None:
    with pytest.raises(TypeError, match="Path is not"):
        tokenizer.apply_chat_template([user("a"), {"role": "user", "content": Path()}])
    with pytest.raises(ValueError, match="empty"):
        tokenizer.apply_chat_template([])


def test_a_batch_of_conversations(tokenizer: ChatGLMTokenizer) -> None:
    chats = [[user("你好"), assistant("天气")], [user(QUESTION), assistant("面试 philosophers")]]
    single = [tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True) for chat in chats]
    out = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_assistant_tokens_mask=True)
    for i, one in enumerate(single):
        keep = out["attention_mask"][i].bool()
        assert keep.sum() == len(one["input_ids"])
        assert keep.tolist() == sorted(keep.tolist())  # padding is on the left
        for key in ("input_ids", "assistant_masks"):
            assert out[key][i][keep].tolist() == one[key]
            assert not out[key][i][~keep].any()
    assert tokenizer.apply_chat_template(chats, return_dict=False) == [one["input_ids"] for one in single]
    assert tokenizer.apply_chat_template(chats[0], return_dict=False) == single[0]["input_ids"]
    cut = tokenizer.apply_chat_template(chats[1], truncation=True, max_length=9, return_assistant_tokens_mask=True)
    assert cut["input_ids"] == single[1]["input_ids"][:9]
    assert cut["assistant_masks"] == single[1]["assistant_masks"][:9]


def test_an_answer_can_be_continued(tokenizer: ChatGLMTokenizer) -> None:
    text = tokenizer.apply_chat_template([user("a"), assistant("the us")], continue_final_message=True, tokenize=False)
    assert text == "[gMASK]sop<|user|>\n a<|assistant|>\n the us"


def test_a_template_of_ones_own(tokenizer: ChatGLMTokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}<|user|>{% endif %}{% endfor %}"
    )
    out = tokenizer.apply_chat_template(
        [user("a<|user|>"), assistant("天气😀")], chat_template=template, return_assistant_tokens_mask=True
    )
    assert out["input_ids"].count(tokenizer.get_command("<|user|>")) == 1
    own = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(own) == "天气😀"


# ---- files ----


def test_auto_tokenizer_opens_the_published_folder(folder: Path) -> None:
    for trust in (None, False):
        opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        assert type(opened) is ChatGLMTokenizer
        assert opened.get_command("[gMASK]") == 341
        assert opened.convert_tokens_to_ids(list(COMMANDS)) == list(range(340, 349))


def test_a_folder_without_tokenizer_config(folder: Path, small: ChatGLMTokenizer, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(folder / name, tmp_path / name)
    assert load_tokenizer(str(tmp_path)).get_vocab() == small.get_vocab()


def test_saved_and_opened_again(small: ChatGLMTokenizer, folder: Path, tmp_path: Path) -> None:
    grown = copy.deepcopy(small)
    grown.add_tokens(["面试官"])
    grown.add_special_tokens({"extra_special_tokens": ["<|tool|>"]}, replace_extra_special_tokens=False)
    assert len(grown) == len(small) + 2
    grown.save_pretrained(tmp_path)
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    again = load_tokenizer(str(tmp_path))
    assert type(again) is ChatGLMTokenizer
    assert again.get_vocab() == grown.get_vocab()
    assert again.chat_template == grown.chat_template == small.chat_template
    text = "the 面试官 <|tool|> <|user|>"
    for tokenizer in (grown, again):
        ids = tokenizer.encode(text, add_special_tokens=False)
        # a user's own tokens are found in texts, and the model's are not
        assert [i for i in ids if i >= small.vocab_size - len(COMMANDS)] == [349, 350]
    again.save_pretrained(tmp_path)  # over itself


def test_it_can_be_sent_to_another_process(small: ChatGLMTokenizer) -> None:
    messages = [user(QUESTION)]
    again = pickle.loads(pickle.dumps(small))
    assert again.apply_chat_template(messages) == small.apply_chat_template(messages)


def test_a_piece_that_is_a_special_word(folder: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["people"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=266,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["eop"],
        minloglevel=2,
    )
    with pytest.raises(ModelError, match="'eop' is a piece"):
        ChatGLMTokenizer(str(tmp_path / "tokenizer.model"))


def test_without_its_file(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    with pytest.raises(ModelError, match=r"tokenizer\.model"):
        load_tokenizer(str(tmp_path))


def test_it_is_imported_when_it_is_met(folder: Path, tmp_path: Path) -> None:
    """A third of a second that no other model needs; its tokenizer alone is met, too."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    code = (
        "import sys; from siliang.models.load import load_model; from siliang.models.tokenizers import *\n"
        "print('siliang.models.chatglm3' in sys.modules)\n"
        f"print(type(load_tokenizer_alone({str(tmp_path)!r}, {{}})).__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "ChatGLMTokenizer"]
