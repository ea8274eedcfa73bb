"""How a conversation becomes text: named templates, and the user's own in a few lines of yaml.

A template writes a conversation as *pieces*: text of the template, in which markers such as <|user|> or {eos} become
single tokens, and text of the data, which is never a marker. Each piece has a flag whether it is learned.
The tokenizer's own chat template, which comes as Jinja, is in chat.py and writes the same pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from siliang.data.examples import Call, Conversation, Message
from siliang.language import Bilingual
from siliang.safety.safe_json import JsonError, parse_json
from siliang.safety.safe_yaml import read_yaml
from siliang.types import ConfigError, DataError, nearest

CHAT = "chat"


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation.

    Attributes:
        data: These are words of the data: nothing in them is a marker.
        trained: The model learns to write it.
        answer: The assistant wrote it, now or earlier; the text around it never shares a token with it, so that an
            answer in the history has the tokens that it had when it was learned.
        alone: It is tokenized by itself, not with the piece before it.
        end: It ends an answer, and must be one token: the marker that it holds, or the tokenizer's end of sequence.
    """

    text: str
    data: bool = False
    trained: bool = False
    answer: bool = False
    alone: bool = False
    end: bool = False


@dataclass(frozen=True)
class Template:
    """A named template. Each field is text with {placeholders}; {bos} and {eos} are the tokenizer's own tokens.

    Attributes:
        begin: Text at the beginning. {start}: the tokens that the tokenizer adds before every text.
        system: A system message, {content}.
        default_system: The system message where the conversation has none.
        default_system_with_input: The same, where the first question has an input.
        system_inside: The system message is inside the first question.
        user: A question, {content}.
        user_with_input: A question with {instruction} and {input} apart; without it they are joined by a line break.
        assistant: Between a question and its answer; not learned.
        lead: In front of an answer, and written by the model itself, so learned. {name}: of the tool that is called.
        end: What ends an answer: one token, learned.
        between: Between an answer and the next question.
        tool: What a tool answered, {content}.
        tools: The description of the available tools in the system message: {tools}.
        call: How the assistant calls a tool: {name}, {arguments}.
        reasoning: How the assistant thinks in front of an answer: {reasoning}. Without it, a row that has reasoning of
            its own cannot be written.
        apart: Every piece is tokenized by itself, as ChatGLM3 does.
    """

    name: str
    user: str
    assistant: str
    begin: str = "{start}"
    system: str = "{content}\n\n"
    default_system: str = ""
    default_system_with_input: str = ""
    system_inside: bool = False
    user_with_input: str = ""
    lead: str = ""
    end: str = "{eos}"
    between: str = "\n\n"
    tool: str = ""
    tools: str = "You may call these tools:\n{tools}"
    call: str = '{"name": "{name}", "arguments": {arguments}}'
    reasoning: str = ""
    apart: bool = False

    def pieces(
        self, talk: Conversation, *, train_on: Literal["all", "last"] = "all", prompt: bool = False
    ) -> list[Piece]:
        """The conversation as pieces.

        Args:
            prompt: Stop where the assistant's next answer would begin.

        Raises:
            DataError: The template has no place for something in the conversation.
        """
        out = [Piece(self.begin)]
        self._refuse(talk)
        system, turns = self._system(talk)
        inside: list[Piece] = []
        if system:
            written = self._fill(self.system, content=system)
            if self.system_inside:
                inside = written
            else:
                out += written
        last = max((i for i, m in enumerate(turns) if m.role == "assistant"), default=-1)
        for i, message in enumerate(turns):
            before = turns[i - 1].role if i else None
            if message.role == "assistant":
                if before == "assistant":
                    out.append(Piece(self.between))
                trained = message.trained and (train_on == "all" or i == last)
                out += [Piece(self.assistant), *self._answer(message, trained)]
                continue
            if before == "assistant":
                out.append(Piece(self.between))
            if message.role == "tool":
                out += self._fill(self.tool or self.user, content=message.content)
            elif self.user_with_input and message.input:
                out += self._fill(self.user_with_input, instruction=message.content, input=message.input)
            else:
                out += self._fill(self.user, inside, content=message.text)
                inside = []
        if prompt:
            out.append(Piece(self.assistant))
        out = [p for p in out if p.text or p.end]
        return [dataclasses.replace(p, alone=True) for p in out] if self.apart else out

    def _refuse(self, talk: Conversation) -> None:
        spoken = [m.role for m in talk.messages]
        first = next((i for i, role in enumerate(spoken) if role != "system"), len(spoken))
        if "system" in spoken[first:]:
            raise DataError(
                Bilingual(
                    f"has a system message in turn {spoken.index('system', first) + 1}, and the template "
                    f"{self.name} has a "
                    "place for it in front of the conversation only",
                    f"的第 {spoken.index('system', first) + 1} 轮是系统消息，而模板 {self.name} 只在对话开头有它的位置",
                )
            )
        if not self.reasoning and any(m.reasoning for m in talk.messages):
            raise DataError(
                Bilingual(
                    f"has reasoning with an answer, which the template {self.name} does not support: use "
                    "data.template=chat with a reasoning model, or your own template with `reasoning`",
                    f"的答案带有思考过程，而模板 {self.name} 不支持："
                    "请用推理模型和 data.template=chat，或自己写含 `reasoning` 的模板",
                )
            )

    def _system(self, talk: Conversation) -> tuple[str, list[Message]]:
        given = [m.content for m in talk.messages if m.role == "system"]
        turns = [m for m in talk.messages if m.role != "system"]
        with_input = bool(turns) and bool(turns[0].input) and bool(self.default_system_with_input)
        system = "\n".join(given) or (self.default_system_with_input if with_input else self.default_system)
        if talk.tools:
            system = "\n\n".join(filter(None, [system, self.tools.replace("{tools}", talk.tools)]))
        return system, turns

    def _answer(self, message: Message, trained: bool) -> list[Piece]:
        call = message.calls[0] if message.calls else None
        lead = Piece(self.lead.replace("{name}", call.name if call else ""), trained=trained, answer=True)
        words = "\n".join([*filter(None, [message.content]), *(self._call(c) for c in message.calls)])
        thought = self._fill(self.reasoning, reasoning=message.reasoning) if message.reasoning else []
        before = [dataclasses.replace(p, trained=trained, answer=True) for p in thought]
        return [
            lead,
            *before,
            Piece(words, data=True, trained=trained, answer=True),
            Piece(self.end, trained=trained, end=True),
        ]

    def _call(self, call: Call) -> str:
        arguments = call.arguments
        if "{arguments_python}" in self.call:
            return self.call.replace("{name}", call.name).replace("{arguments_python}", _as_python(arguments))
        return self.call.replace("{name}", call.name).replace("{arguments}", arguments)

    def _fill(self, text: str, inside: Iterable[Piece] = (), **words: str) -> list[Piece]:
        """A field's text as pieces, with the data's words in the placeholders; `inside` goes in front of the first."""
        pieces: list[Piece] = []
        rest = text
        while rest:
            places = [(rest.find("{" + name + "}"), name) for name in words]
            at, name = min((p for p in places if p[0] >= 0), default=(-1, ""))
            if at < 0:
                pieces.append(Piece(rest))
                break
            if at:
                pieces.append(Piece(rest[:at]))
            pieces += inside
            inside = ()
            pieces.append(Piece(words[name], data=True))
            rest = rest[at + len(name) + 2 :]
        return pieces


def _as_python(arguments: str) -> str:
    """{"a": 1} as a='...' for ChatGLM3, whose calls look like Python."""
    try:
        values = parse_json(arguments, foreign=True)
    except JsonError:
        return arguments
    return ", ".join(f"{k}={v!r}" for k, v in values.items()) if isinstance(values, dict) else arguments


HUMAN_ASSISTANT = Template(
    name="human-assistant",  # the tutorials of bloom-1b4-zh
    user="Human: {content}\n\n",
    assistant="Assistant: ",
)

ALPACA = Template(
    name="alpaca",  # tatsu-lab/stanford_alpaca
    default_system=(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    ),
    default_system_with_input=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    ),
    user="### Instruction:\n{content}\n\n",
    user_with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n",
    assistant="### Response:\n",
)

LLAMA2 = Template(
    name="llama2",  # meta-llama/llama, generation.py; the space in front of </s> is left out: it would not be learned
    begin="",
    system="<<SYS>>\n{content}\n<</SYS>>\n\n",
    system_inside=True,
    user="{bos}[INST] {content} [/INST]",
    assistant=" ",
    between="",
)

CHATML = Template(
    name="chatml",
    begin="",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>",
    between="\n",
    tool="<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n",
    tools=(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        "function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\nFor each function call, "
        "return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    ),
    call='<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>',
    reasoning="<think>\n{reasoning}\n</think>\n\n",
)

CHATGLM3 = Template(
    name="chatglm3",  # THUDM/ChatGLM3: the model writes the line break in front of its answer, after a tool's name
    begin="[gMASK]sop",
    system="<|system|>\n{content}",
    user="<|user|>\n{content}",
    assistant="<|assistant|>",
    lead="{name}\n",
    between="",
    tool="<|observation|>\n{content}",
    tools=("Answer the following questions as best as you can. You have access to the following tools:\n{tools}"),
    call="```python\ntool_call({arguments_python})\n```",
    apart=True,
)

ZEPHYR = Template(
    name="zephyr",
    begin="",
    system="<|system|>\n{content}{eos}\n",
    user="<|user|>\n{content}{eos}\n",
    assistant="<|assistant|>\n",
    between="\n",
)

VICUNA = Template(
    name="vicuna",  # lm-sys/FastChat, vicuna_v1.1
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    system="{content} ",
    user="USER: {content} ",
    assistant="ASSISTANT: ",
    between="",
)

PLAIN = Template(name="plain", user="{content}", assistant="", between="\n", system="{content}\n")

TEMPLATES: dict[str, Template] = {
    t.name: t for t in (HUMAN_ASSISTANT, ALPACA, LLAMA2, CHATML, CHATGLM3, ZEPHYR, VICUNA, PLAIN)
}


def find_template(name: str) -> Template | None:
    """The template of that name, or in that .yaml file; None for `chat`, the tokenizer's own.

    Raises:
        ConfigError: There is none, or the file does not hold one.
    """
    if name == CHAT:
        return None
    if name.endswith((".yaml", ".yml")):
        return read_template(Path(name))
    if name not in TEMPLATES:
        allowed = ", ".join([*TEMPLATES, CHAT])
        raise ConfigError(
            Bilingual(
                f"template {name!r} is not one of {allowed}, nor a .yaml file.{nearest(name, [*TEMPLATES, CHAT])}",
                f"模板 {name!r} 不是 {allowed} 之一，也不是 .yaml 文件。{nearest(name, [*TEMPLATES, CHAT]).zh}",
            )
        )
    return TEMPLATES[name]


def read_template(path: Path) -> Template:
    """A template of the user's own: `user` and `assistant`, and any other field of `Template` that differs.

    Raises:
        ConfigError: The file is not there, or does not hold a template.
    """
    stamp = path.stat().st_mtime_ns if path.is_file() else 0
    return _read_template(path, stamp)


@lru_cache(maxsize=8)
def _read_template(path: Path, stamp: int) -> Template:
    values = read_yaml(path)
    fields = {f.name: f for f in dataclasses.fields(Template) if f.name != "name"}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(
                Bilingual(
                    f"{path}: {key} is not part of a template.{nearest(key, fields)} Allowed: {', '.join(fields)}.",
                    f"{path}：{key} 不是模板的字段。{nearest(key, fields).zh}可用：{'、'.join(fields)}。",
                )
            )
        wanted = bool if fields[key].type == "bool" else str
        if not isinstance(value, wanted):
            raise ConfigError(
                Bilingual(
                    f"{path}: {key} = {value!r} must be {'true or false' if wanted is bool else 'text'}.",
                    f"{path}：{key} = {value!r} 应为{'true 或 false' if wanted is bool else '文本'}。",
                )
            )
    for key in ("user", "assistant"):
        if key not in values:
            raise ConfigError(
                Bilingual(
                    f"{path}: {key} is missing. A template needs user: 'Q: {{content}}\\n' and assistant: 'A: '.",
                    f"{path}：缺少 {key}。模板需要 user: 'Q: {{content}}\\n' 和 assistant: 'A: '。",
                )
            )
    places = {"user": "content", "system": "content", "tool": "content", "reasoning": "reasoning"}
    for key, place in places.items():
        if values.get(key) and f"{{{place}}}" not in values[key]:
            raise ConfigError(
                Bilingual(
                    f"{path}: {key} = {values[key]!r} must say where the words go, with {{{place}}}.",
                    f"{path}：{key} = {values[key]!r} 须用 {{{place}}} 指明文字的位置。",
                )
            )
    return Template(name=path.stem, **values)
