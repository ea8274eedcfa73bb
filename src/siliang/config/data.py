"""The settings of the data: its sources, and how a row becomes tokens."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from siliang.config.section import Names, Section, Seed, is_recorded
from siliang.config.sources import LayoutName, Source, as_sources, read_sources
from siliang.files import restore_name
from siliang.language import Bilingual
from siliang.types import ConfigError

MOST_LABELS = 100_000  # classes or tags


def _template(value: object, info: ValidationInfo) -> object:
    from siliang.data.templates import find_template, is_file

    if isinstance(value, str) and not (is_recorded(info) and is_file(value)):
        value = restore_name(value)
        find_template(value)
    return value


def _arguments(value: object) -> object:
    taken = ("messages", "tools", "documents", "add_generation_prompt", "loop", "namespace", "bos_token", "eos_token")
    for name in value if isinstance(value, dict) else ():
        if not (isinstance(name, str) and name.isidentifier()) or name in taken or name.startswith("_"):
            raise ConfigError(
                Bilingual(
                    f"template_arguments: {name!r} is not a variable that can be set: {', '.join(taken)} cannot.",
                    f"template_arguments：{name!r} 不是可以设置的变量：不能设置 {'、'.join(taken)}。",
                )
            )
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
    separator = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}.get(value, value)
    if len(separator) != 1 or separator in '"\r\n':
        raise ConfigError(
            Bilingual(
                f"data.separator = {value!r}: must be one character, such as ';', or tab, or auto.",
                f"data.separator = {value!r}：应为一个字符（如 ';'）、tab 或 auto。",
            )
        )
    return separator


def _labels(value: list[str]) -> list[str]:
    if len(value) > MOST_LABELS:
        raise ConfigError(
            Bilingual(
                f"data.labels has {len(value):,} names; at most {MOST_LABELS:,} can be learned: list the classes only.",
                f"data.labels 中有 {len(value):,} 个名称，最多可以学习 {MOST_LABELS:,} 个：请只写出类别。",
            )
        )
    return value


class Columns(Section):
    """The names of the data's columns, if they differ from the defaults."""

    instruction: str = "instruction"
    """The instruction for the model.

    给模型的指令。"""
    input: str = "input"
    """The input of the instruction; may be absent or empty.

    指令的输入内容；可以没有，也可以为空。"""
    output: str = "output"
    """The answer to learn.

    要学习的回答。"""
    prompt: str = "prompt"
    """The text before a completion.

    补全之前的文本。"""
    completion: str = "completion"
    """The text to learn after a prompt.

    接在提示之后、要学习的文本。"""
    chosen: str = "chosen"
    """The better of two answers: a text, a list of turns, or a whole conversation.

    两个回答中较好的一个：文本、若干轮对话，或整段对话。"""
    rejected: str = "rejected"
    """The worse of two answers.

    两个回答中较差的一个。"""
    responses: str = "responses"
    """Several answers to one prompt: a list of texts with `scores`, or of objects that each have a score or a rank.

    同一提问的多个回答：文本的列表（配合 `scores`），或各带分数或名次的对象的列表。"""
    scores: str = "scores"
    """The score of each of the responses; the higher, the better.

    每个回答的分数，越大越好。"""
    messages: str = "messages"
    """A conversation: a list of {role, content}, or of ShareGPT's {from, value}.

    一段对话：{role, content} 的列表，或 ShareGPT 的 {from, value} 的列表。"""
    system: str = "system"
    """A system message; may be absent or empty.

    系统消息；可以没有，也可以为空。"""
    tools: str = "tools"
    """Tools that the model may call, as a list or as JSON text; may be absent or empty.

    模型可以调用的工具，是列表或 JSON 文本；可以没有，也可以为空。"""
    text: str = "text"
    """A text to classify; for causal_lm, a text that is learned completely.

    要分类的文本；在 causal_lm 任务中则是整段学习的文本。"""
    text_pair: str = "text_pair"
    """The second text of a sentence pair.

    句对中的第二段文本。"""
    label: str = "label"
    """The class of a text; with preference.loss = kto, whether an answer is good: true or false, or 1 or 0.

    文本的类别；在 preference.loss = kto 时是回答的好坏：true 或 false，或 1 或 0。"""
    tokens: str = "tokens"
    """The words (or characters) of a sentence, for token_cls.

    一个句子的词（或字），用于 token_cls。"""
    tags: str = "tags"
    """The tag of each token.

    每个词的标签。"""
    source: str = "source"
    """The text to translate, summarize or answer, for seq_2_seq_lm.

    要翻译、摘要或回答的文本，用于 seq_2_seq_lm。"""
    target: str = "target"
    """The text to generate from the source.

    应当由源文本生成的文本。"""
    anchor: str = "anchor"
    """A text, such as a query, for embedding and reranker.

    用于 embedding 和 reranker 的锚文本（如查询）。"""
    positive: str = "positive"
    """The text, or the list of texts, that the anchor belongs to.

    与锚文本相关的文本，或其列表。"""
    negative: str = "negative"
    """A text, or a list of texts, that the anchor does not belong to; may be absent. negative_1, negative_2 ... are
    read, too.

    与锚文本不相关的文本，或其列表；可以没有。negative_1、negative_2 等列也会读取。"""
    score: str = "score"
    """How near the two texts of a pair are, as a number.

    一对文本的相似程度，是一个数。"""
    context: str = "context"
    """The passage that holds the answer, for question_ans.

    包含答案的段落，用于 question_ans。"""
    question: str = "question"
    """The question about the context.

    针对该段落的问题。"""
    answers: str = "answers"
    """The answer's text and start: {text: [...], answer_start: [...]}, as in SQuAD.

    答案的文本和起始位置：{text: [...], answer_start: [...]}，与 SQuAD 相同。"""
    task_id: str | None = None
    """The number of the row's task, from 0 on, for methods that train several tasks at once (poly,
    multitask_prompt_tuning). null: all rows are of task 0.

    样本所属任务的编号，从 0 开始，用于同时训练多个任务的方法（poly、multitask_prompt_tuning）。null：
    所有样本都属于任务 0。"""


class DataConfig(Section):
    """The sources of the data, and how a row becomes tokens."""

    train: Annotated[str | list[str | Source], BeforeValidator(read_sources)]
    """The training data: a file (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .txt, .bmes, .bio, .conll), a glob
    pattern, a folder (of Dataset.save_to_disk, or of such files), a name on the Hub (owner/name, owner/name:config),
    or a list of these, each a name or {path, weight}.

    训练数据：文件（.json、.jsonl、.csv、.tsv、.parquet、.arrow、.txt、.bmes、.bio、.conll）、文件的通配模式、文件夹（由
    Dataset.save_to_disk 保存，或装有上述文件）、Hub 上的名称（owner/name、owner/name:config），或它们的列表，每项是名称
    或 {path, weight}。"""
    mix_temperature: Annotated[float, Field(ge=1.0)] | None = None
    """Mix several sources by temperature T: a source of n rows and weight w has the share w n^(1/T) of an epoch, which
    keeps its number of rows. 1 mixes by size; the larger, the more often small sources are used. None: each row as
    often as its source's weight says.

    按温度 T 混合多个来源：有 n 条样本、权重为 w 的来源在一轮中占 w n^(1/T) 的份额，一轮的样本数不变。1 按大小混合；越
    大，小的来源用得越多。None：每条样本按其来源的权重使用。"""
    eval: Annotated[str | list[str | Source] | None, BeforeValidator(read_sources)] = None
    """The held-out data, in the same forms. None: the share test_size of the training rows is held out.

    验证数据，写法同上。None：从训练样本中按 test_size 的比例留出。"""
    test_size: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """The share of the rows to hold out if `eval` is not set; 0 for none.

    没有设置 `eval` 时，从训练样本中留作验证集的比例；0 为不留。"""
    validation_size: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The share of the training rows to hold out for choosing settings. The other held-out rows are not used then.
    None: train on all training rows, and evaluate on the held-out rows of `eval` or test_size.

    从训练样本中另外留出的比例，用于选择设置；此时不使用原来的验证集。None：用全部训练样本训练，在 `eval` 或 test_size
    给出的验证集上评估。"""
    seed: Seed | None = None
    """The seed of the split. With test_size, the rows are those of Dataset.train_test_split(test_size, seed). None:
    train.seed.

    划分所用的种子：配合 test_size，与 Dataset.train_test_split(test_size, seed) 留出的样本相同。None：train.seed。"""
    stratify: bool = False
    """Hold out the same share of every class. Without it, the split is that of Dataset.train_test_split.

    每个类别按相同比例留出。关闭时与 Dataset.train_test_split 的划分相同。"""
    layout: Literal["auto"] | LayoutName = "auto"
    """The layout of the rows. auto: detected from their columns.

    样本的格式。auto：根据列名判断。"""
    columns: Columns = Field(default_factory=Columns)
    """The names of the columns.

    各列的名称。"""
    header: Names | None = None
    """The column names of a csv or tsv file without a header line.

    csv 或 tsv 文件没有表头行时，在这里给出列名。"""
    encoding: Annotated[str, BeforeValidator(_encoding)] = "auto"
    """The encoding of text files, such as utf-8, gb18030 or utf-16. auto: by the byte order mark, or UTF-8, or gb18030
    if the whole file decodes as gb18030 and is Chinese; the log shows which.

    文本文件的编码，如 utf-8、gb18030 或 utf-16。auto：先看字节顺序标记，再试 UTF-8；若整个文件能按 gb18030 解码并且是中
    文，则用 gb18030；日志会写明用了哪一种。"""
    separator: Annotated[str, BeforeValidator(_separator)] = "auto"
    """The column separator of csv and tsv files: one character, or tab. auto: a comma (in .tsv a tab), or another one
    if the header line is unambiguous; the log shows which.

    csv 和 tsv 文件的列分隔符：一个字符，或 tab。auto：逗号（.tsv 用制表符）；表头行明确显示为另一种时用那一种；日志会写
    明用了哪一种。"""
    template: Annotated[str, BeforeValidator(_template)] = "auto"
    """The template that turns a conversation into text. auto: the tokenizer's own chat template (chat), or
    human-assistant if it has none; the run says and records which. Others: qwen2, qwen2.5, qwen3, llama3, llama3.1,
    mistral, mistral-nemo, gemma, gemma3, glm4, deepseek, deepseek-r1, phi3, phi4, yi, internlm, minicpm, alpaca,
    llama2, chatml, chatglm3, zephyr, vicuna, plain; or your own .yaml or .jinja file.

    把对话变成文本的模板。auto：使用分词器自带的对话模板（chat），没有时使用 human-assistant；运行会说明并记录用了哪一
    个。其他：qwen2、qwen2.5、qwen3、llama3、llama3.1、mistral、mistral-nemo、gemma、gemma3、glm4、deepseek、
    deepseek-r1、phi3、phi4、yi、internlm、minicpm、alpaca、llama2、chatml、chatglm3、zephyr、vicuna、plain；也可以是你
    自己的 .yaml 或 .jinja 文件。"""
    template_arguments: Annotated[dict[str, bool | int | float | str], BeforeValidator(_arguments)] = Field(
        default_factory=dict
    )
    """Values of variables of the template, such as {enable_thinking: false}; used in training and afterwards.

    模板变量的值，例如 {enable_thinking: false}；训练和之后的使用都采用。"""
    train_on: Literal["all", "last"] = "all"
    """The assistant's turns to learn: all of them, or the last one.

    学习助手的哪些轮次：all 是每一轮，last 是最后一轮。"""
    labels: Annotated[Names, AfterValidator(_labels)] | None = None
    """The classes or tags, in the order of their ids. None: found in the training rows.

    类别或标签，按编号排列。None：从训练样本中得出。"""
    max_length: Annotated[int, Field(ge=8)] = 512
    """The maximum number of tokens of a row. For longer rows, see too_long.

    一条样本的词元数上限；超过时见 too_long。"""
    max_target_length: Annotated[int, Field(ge=2)] = 128
    """The maximum number of tokens of a target, for seq_2_seq_lm.

    目标文本的词元数上限，用于 seq_2_seq_lm。"""
    stride: Annotated[int, Field(ge=0)] | None = None
    """The number of tokens that neighbouring windows of a long context (question_ans) or of a long plain text
    (causal_lm) share; at most half of max_length. The shared tokens of a text are read again, and learned and counted
    once. None: 128 for a context, 1 for a text, which is also the least there: the first new token is learned from it.

    长段落（question_ans）或长的纯文本（causal_lm）的相邻窗口重叠的词元数，至多为 max_length 的一半。纯文本中重叠的词元
    会再读一遍，但只学习和计数一次。None：段落为 128，纯文本为 1；1 也是纯文本的最小值，窗口中第一个新词元由它预测。"""
    too_long: Literal["cut", "drop"] = "cut"
    """What to do with a row longer than max_length: cut or drop it. Cutting removes the oldest rounds of a conversation
    first, then the beginning of the question, then the end of the answer; the end-of-sequence token is kept.

    样本超过 max_length 时：cut 是截断，drop 是丢弃。截断时先去掉对话中最早的轮次，再去掉问题的开头，最后去掉回答的末
    尾；结束符总会保留。"""
    long_text: Literal["window", "cut"] = "window"
    """What to do with a plain text longer than max_length. window: split it into consecutive windows and train on all
    of them. cut: cut it as too_long does. With too_long=drop, it is dropped in both cases.

    纯文本超过 max_length 时：window 是切成前后相接的窗口，全部用于训练；cut 是按 too_long 截断。too_long=drop 时两种情
    况都会丢弃。"""
    add_tokens: Names = Field(default_factory=list)
    """New tokens for the vocabulary; the embeddings are resized. LoRA trains only the rows of the new tokens, unless
    method.modules_to_save names the embeddings.

    加入词表的新词元；嵌入矩阵随之增大。LoRA 只训练新词元的行，除非 method.modules_to_save 写了嵌入层。"""
    workers: Annotated[int, Field(ge=1)] | None = None
    """The number of processes that tokenize. None: one for small data, all cores for large data.

    分词的进程数。None：数据少时用一个，数据多时用全部核心。"""
    streaming: bool = False
    """Read, tokenize and train the rows in a stream, for data larger than memory and disk: only a block of
    shuffle_buffer entries is held. Needs train.max_steps. `check` looks at the first 2,000 rows.

    以数据流的方式读取、分词和训练，用于内存和磁盘都放不下的数据：只保留 shuffle_buffer 条的一块。需要设置
    train.max_steps。`check` 只看前 2,000 条样本。"""
    shuffle_buffer: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    """The entries of a block of the stream, which are trained in random order; rounded up to whole steps.

    数据流中一块的条数，块内按随机顺序训练；向上取整到整步。"""
    held_out_rows: Annotated[int, Field(ge=0)] = 500
    """The first rows of the stream to hold out if `eval` is not set, in place of test_size; 0 for none.

    没有设置 `eval` 时，从数据流开头留作验证集的条数，代替 test_size；0 为不留。"""
    skip_bad_rows: bool = False
    """Skip, count and list rows that cannot be used, instead of stopping.

    跳过无法使用的样本，计数并列出，而不是停止。"""

    @property
    def train_sources(self) -> list[Source]:
        """The sources of the training data."""
        return as_sources(self.train)

    @property
    def eval_sources(self) -> list[Source]:
        """The sources of the held-out data; empty if a share of the training rows is held out."""
        return as_sources(self.eval or [])
