"""Where the data is, and how its rows become what the model sees."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo

from siliang.config.section import Name, Names, Section, Seed, as_name, is_recorded
from siliang.files import restore_name
from siliang.language import Bilingual
from siliang.types import ConfigError

LayoutName = Literal[
    "messages",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "input-output",
    "text",
    "text-label",
    "sentence-pair",
    "tokens-tags",
    "squad",
    "source-target",
    "prepared",
]
LAYOUT_NAMES: tuple[LayoutName, ...] = get_args(LayoutName)  # how rows may be laid out; data/layouts.py reads each


def _template(value: object, info: ValidationInfo) -> object:
    from siliang.data.templates import find_template

    if isinstance(value, str) and not (is_recorded(info) and value.endswith((".yaml", ".yml"))):
        value = restore_name(value)
        find_template(value)
    return value


def _encoding(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        try:
            known = codecs.lookup(value)
            "a".encode(known.name)
        except (LookupError, UnicodeError, TypeError):
            raise ConfigError(
                Bilingual(
                    f"data.encoding = {value!r} is not a text encoding. Use auto, utf-8, utf-16, gb18030, big5, "
                    "cp1252 ...",
                    f"data.encoding = {value!r} 不是文本编码。可用 auto、utf-8、utf-16、gb18030、big5、cp1252 等。",
                )
            ) from None
    return value


def _separator(value: object) -> object:
    if not isinstance(value, str) or value == "auto":
        return value
    named = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}.get(value, value)
    if len(named) != 1 or named in '"\r\n':
        raise ConfigError(
            Bilingual(
                f"data.separator = {value!r}: must be one character, such as ';', or tab, or auto.",
                f"data.separator = {value!r}：应为一个字符（如 ';'）、tab 或 auto。",
            )
        )
    return named


def _as_sources(value: str | list[str | Source]) -> list[Source]:
    values = value if isinstance(value, list) else [value]
    return [Source(path=v) if isinstance(v, str) else v for v in values]


class Columns(Section):
    """The names of the data's columns, where they are not the usual ones."""

    instruction: str = "instruction"
    """What is asked of the model.

    向模型提出的要求。"""
    input: str = "input"
    """What the instruction is about; may be absent or empty.

    指令所针对的内容；可以没有，也可以为空。"""
    output: str = "output"
    """The answer that is learned.

    要学习的回答。"""
    prompt: str = "prompt"
    """What stands in front of a completion.

    补全之前的文本。"""
    completion: str = "completion"
    """What is learned to follow a prompt.

    接在提示之后、要学习的文本。"""
    messages: str = "messages"
    """A conversation: a list of {role, content}, or of ShareGPT's {from, value}.

    一段对话：{role, content} 的列表，或 ShareGPT 的 {from, value} 的列表。"""
    system: str = "system"
    """A system message beside the other columns; may be absent or empty.

    与其他列并列的系统消息；可以没有，也可以为空。"""
    tools: str = "tools"
    """Tools that the model may call, as a list or as JSON text; may be absent or empty.

    模型可以调用的工具，是列表或 JSON 文本；可以没有，也可以为空。"""
    text: str = "text"
    """A text to classify, or, in a causal run, to learn whole.

    要分类的文本；在 causal 任务中则是整段学习的文本。"""
    text_pair: str = "text_pair"
    """The second text of a sentence pair.

    句对中的第二段文本。"""
    label: str = "label"
    """The class of a text.

    文本的类别。"""
    tokens: str = "tokens"
    """The words (or characters) of a sentence, for token_cls.

    一个句子的词（或字），用于 token_cls。"""
    tags: str = "tags"
    """The tag of each token.

    每个词的标签。"""
    source: str = "source"
    """What is translated, summarized or asked, for seq_2_seq_lm.

    要翻译、摘要或回答的文本，用于 seq_2_seq_lm。"""
    target: str = "target"
    """What is to be written from the source.

    应当由源文本写出的文本。"""
    context: str = "context"
    """The passage that holds the answer, for question_ans.

    包含答案的段落，用于 question_ans。"""
    question: str = "question"
    """The question on the context.

    针对该段落的问题。"""
    answers: str = "answers"
    """The answer's text and start: {text: [...], answer_start: [...]}, as in SQuAD.

    答案的文本和起始位置：{text: [...], answer_start: [...]}，与 SQuAD 相同。"""


class Source(Section):
    """One source of several, and how often its rows are used."""

    path: Name
    """A file, a folder, a pattern such as data/*.jsonl, or a name on the hub.

    文件、文件夹、data/*.jsonl 这样的通配模式，或 Hub 上的名称。"""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is used in an epoch: 2 for twice, 0.5 for a random half. Held-out rows have no weight.

    每条样本在一轮中使用的次数：2 是两次，0.5 是随机的一半。对验证集无效。"""


class DataConfig(Section):
    """Where the data is and how its rows become what the model sees."""

    train: Annotated[str | list[str | Source], BeforeValidator(as_name)]
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .txt, .bmes, .bio, .conll), a pattern of files, a folder
    (from Dataset.save_to_disk, or of such files), or a name on the hub (owner/name, owner/name:config); or a list of
    these, each a name or {path, weight}.

    文件（.json、.jsonl、.csv、.tsv、.parquet、.arrow、.txt、.bmes、.bio、.conll）、文件的通配模式、文件夹（由
    Dataset.save_to_disk 保存，或装有上述文件），或 Hub 上的名称（owner/name、owner/name:config）；也可以是它们的列表，
    每项是名称或 {path, weight}。"""
    eval: Annotated[str | list[str | Source] | None, BeforeValidator(as_name)] = None
    """The same, held out. Without it, test_size of the training rows is held out.

    同上，用作验证集。没有设置时，从训练样本中留出 test_size。"""
    test_size: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the rows that is held out where `eval` is not given; 0 for none.

    没有设置 `eval` 时，从训练样本中留作验证集的比例；0 为不留。"""
    validation_size: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the training rows that is held out in place of the others, which are then not looked at: for choosing
    settings. None: train on all of them, and evaluate on what `eval` or test_size holds out.

    从训练样本中另外留出的比例，代替原来的验证集，后者此时完全不看：用于选择设置。None：用全部训练样本训练，在 `eval`
    或 test_size 留出的样本上评估。"""
    seed: Seed | None = None
    """Of the split: with test_size the same rows as Dataset.train_test_split(test_size, seed). None: train.seed.

    划分所用的种子：配合 test_size，与 Dataset.train_test_split(test_size, seed) 留出的样本相同。None：train.seed。"""
    stratify: bool = False
    """Hold out the same share of every class. Off, the split is that of Dataset.train_test_split.

    每个类别按相同比例留出。关闭时与 Dataset.train_test_split 的划分相同。"""
    layout: Literal["auto"] | LayoutName = "auto"
    """How the rows are laid out. auto: by their columns.

    样本的格式。auto：根据列名判断。"""
    columns: Columns = Field(default_factory=Columns)
    """The names of the columns.

    各列的名称。"""
    header: Names | None = None
    """The column names of a csv or tsv file whose first line is data already.

    csv 或 tsv 文件的第一行已经是数据时，在这里给出列名。"""
    encoding: Annotated[str, BeforeValidator(_encoding)] = "auto"
    """The encoding of text files, such as utf-8, gb18030 or utf-16. auto: by the byte order mark, or UTF-8, or gb18030
    where the whole file decodes as that and is Chinese; the log tells which.

    文本文件的编码，如 utf-8、gb18030 或 utf-16。auto：先看字节顺序标记，再试 UTF-8；若整个文件能按 gb18030 解码并且是中
    文，则用 gb18030；日志会写明用了哪一种。"""
    separator: Annotated[str, BeforeValidator(_separator)] = "auto"
    """What separates the columns of a csv or tsv file: one character, or tab. auto: a comma (in .tsv a tab), or what
    the header line shows without doubt; the log tells which.

    csv 或 tsv 文件的列分隔符：一个字符，或 tab。auto：逗号（.tsv 用制表符），或表头行明确显示的那一种；日志会写明用了哪
    一种。"""
    template: Annotated[str, BeforeValidator(_template)] = "human-assistant"
    """How a conversation becomes text: human-assistant, alpaca, llama2, chatml, chatglm3, zephyr, vicuna, plain; chat
    for the tokenizer's own chat template; or a .yaml file of your own.

    把对话变成文本的模板：human-assistant、alpaca、llama2、chatml、chatglm3、zephyr、vicuna、plain；chat 表示用分词器自
    带的对话模板；也可以是你自己的 .yaml 文件。"""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns are learned.

    学习助手的哪些轮次：all 是每一轮，last 是最后一轮。"""
    labels: Names | None = None
    """The classes or tags, in the order of their numbers. Found in the training rows where it is not given.

    类别或标签，按编号排列。没有设置时从训练样本中得出。"""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of a row; of a longer one see too_long.

    一条样本的词元数上限；超过时见 too_long。"""
    max_target_length: Annotated[int, Field(ge=2)] = 128
    """Tokens of a target, for seq_2_seq_lm.

    目标文本的词元数上限，用于 seq_2_seq_lm。"""
    stride: Annotated[int, Field(ge=0)] = 128
    """Tokens that neighbouring windows of a long context share, for question_ans.

    长段落的相邻窗口重叠的词元数，用于 question_ans。"""
    too_long: Literal["cut", "drop"] = "cut"
    """A row longer than max_length: cut, or dropped. Cutting takes the oldest rounds of a conversation first, then the
    beginning of the question, then the end of the answer; the end-of-sequence token stays.

    样本超过 max_length 时：cut 是截断，drop 是丢弃。截断时先去掉对话中最早的轮次，再去掉问题的开头，最后去掉回答的末
    尾；结束符总会保留。"""
    long_text: Literal["window", "cut"] = "window"
    """A plain text longer than max_length: window, trained whole, in windows that follow on from each other; or cut as
    too_long says. too_long=drop leaves it out either way.

    纯文本超过 max_length 时：window 是切成前后相接的窗口，全部用于训练；cut 是按 too_long 截断。too_long=drop 时两种情
    况都会丢弃。"""
    add_tokens: Names = Field(default_factory=list)
    """New tokens for the vocabulary; the embeddings grow by them. LoRA trains their rows alone, unless
    method.modules_to_save names the embeddings.

    加入词表的新词元；嵌入矩阵随之增大。LoRA 只训练它们的行，除非 method.modules_to_save 写了嵌入层。"""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes that tokenize. None: one for small data, all cores for large.

    分词的进程数。None：数据少时用一个，数据多时用全部核心。"""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, counted and listed, instead of stopping.

    跳过无法使用的样本，计数并列出，而不是停止。"""

    @property
    def train_sources(self) -> list[Source]:
        """The training data, one source an entry."""
        return _as_sources(self.train)

    @property
    def eval_sources(self) -> list[Source]:
        """The held-out data; empty where a share of the training rows is held out instead."""
        return _as_sources(self.eval or [])
