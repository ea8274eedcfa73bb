"""What turns a conversation into text: the named templates, and the user's own.

A named template is a chat template (Jinja), in a file of named/ or in a few fields here; the user's own is either, too.
All of them, and the tokenizer's own, go the same way (chat.py): they write *pieces*, text of the template, in which
markers such as <|user|> become single tokens, and text of the data, which is never a marker.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from siliang.language import Bilingual
from siliang.safety.safe_yaml import read_yaml
from siliang.types import ConfigError, first_line, nearest

AUTO = "auto"  # the tokenizer's own where it has one, otherwise DEFAULT
CHAT = "chat"  # the tokenizer's own
DEFAULT = "human-assistant"
FILES = (".yaml", ".yml", ".jinja")  # of the user's own templates
BORDER = "\uf8f2"  # a private character between texts that are tokenized apart
NAMED = Path(__file__).with_name("named")


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
class FieldTemplate:
    """A template in a few fields. Each is text with {placeholders}; {bos} and {eos} are the tokenizer's own tokens.

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


@dataclass(frozen=True)
class JinjaTemplate:
    """A template in Jinja, as a tokenizer's chat template is.

    Attributes:
        end: The marker that ends an answer. A tokenizer that does not have it has its end of sequence there.
    """

    name: str
    text: str
    end: str = ""


Template = FieldTemplate | JinjaTemplate


HUMAN_ASSISTANT = FieldTemplate(
    name="human-assistant",  # the tutorials of bloom-1b4-zh
    user="Human: {content}\n\n",
    assistant="Assistant: ",
)

ALPACA = FieldTemplate(
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

LLAMA2 = FieldTemplate(
    name="llama2",  # meta-llama/llama, generation.py; the space in front of </s> is left out: it would not be learned
    begin="",
    system="<<SYS>>\n{content}\n<</SYS>>\n\n",
    system_inside=True,
    user="{bos}[INST] {content} [/INST]",
    assistant=" ",
    between="",
)

CHATML = FieldTemplate(
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

CHATGLM3 = FieldTemplate(
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

ZEPHYR = FieldTemplate(
    name="zephyr",
    begin="",
    system="<|system|>\n{content}{eos}\n",
    user="<|user|>\n{content}{eos}\n",
    assistant="<|assistant|>\n",
    between="\n",
)

VICUNA = FieldTemplate(
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

PLAIN = FieldTemplate(name="plain", user="{content}", assistant="", between="\n", system="{content}\n")

FIELDS = (HUMAN_ASSISTANT, ALPACA, LLAMA2, CHATML, CHATGLM3, ZEPHYR, VICUNA, PLAIN)

# The model families whose official template is in named/, and what ends an answer there
FAMILIES = {
    "qwen2": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3.1": "<|eot_id|>",
    "mistral": "",
    "mistral-nemo": "",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "glm4": "<|user|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "deepseek-r1": "<｜end▁of▁sentence｜>",
    "phi3": "<|end|>",
    "phi4": "<|im_end|>",
    "yi": "<|im_end|>",
    "internlm": "<|im_end|>",
    "minicpm": "<|im_end|>",
}

TEMPLATES: dict[str, Template] = {t.name: t for t in FIELDS} | {
    name: JinjaTemplate(name, (NAMED / f"{name}.jinja").read_text(encoding="utf-8"), end)
    for name, end in FAMILIES.items()
}


def template_for(name: str, own: object) -> str:
    """The name of the template that is used: `auto` is the tokenizer's own, or the default.

    Args:
        own: The tokenizer's chat template, if it has one.
    """
    return (CHAT if own else DEFAULT) if name == AUTO else name


def is_file(name: str) -> bool:
    """The template is a file of the user's own."""
    return name.endswith(FILES)


def find_template(name: str) -> Template | None:
    """The template of that name, or in that file; None for `chat`, the tokenizer's own, and for `auto`.

    Raises:
        ConfigError: There is none, or the file does not hold one.
    """
    if name in (CHAT, AUTO):
        return None
    if is_file(name):
        return read_template(Path(name))
    if name not in TEMPLATES:
        names = [AUTO, CHAT, *TEMPLATES]
        allowed = ", ".join(names)
        raise ConfigError(
            Bilingual(
                f"template {name!r} is not one of {allowed}, nor a .yaml or .jinja file.{nearest(name, names)}",
                f"模板 {name!r} 不是 {allowed} 之一，也不是 .yaml 或 .jinja 文件。{nearest(name, names).zh}",
            )
        )
    return TEMPLATES[name]


def read_template(path: Path) -> Template:
    """A template of the user's own: Jinja; or `user` and `assistant`, and any other field that differs.

    Raises:
        ConfigError: The file is not there, or does not hold a template.
    """
    stamp = path.stat().st_mtime_ns if path.is_file() else 0
    return _read_template(path, stamp)


@lru_cache(maxsize=8)
def _read_template(path: Path, stamp: int) -> Template:
    if path.suffix == ".jinja":
        return JinjaTemplate(path.stem, _read_jinja(path))
    values = read_yaml(path)
    fields = {f.name: f for f in dataclasses.fields(FieldTemplate) if f.name != "name"}
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
    return FieldTemplate(name=path.stem, **values)


def _read_jinja(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            Bilingual(f"{path}: cannot be read: {first_line(error)}", f"{path}：无法读取：{first_line(error)}")
        ) from None
