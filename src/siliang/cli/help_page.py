"""The --help page in the reader's language: the texts of the commands, and the words of the parser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from siliang.language import filled, language, padded, width

COMMANDS_ZH = {
    "siliang": "在自己的机器上对 transformers 模型进行参数高效微调。\n\n--allow-code 和 --debug 也可以写在命令之后。",
    "demo": "在自带的影评上比较五种方法：5 分钟内得到一张表和一个网页，不需要联网，也不需要 GPU。",
    "plan": "预估每种方法训练所需的内存和时间，放不下时给出最小的改动。\n\n"
    "不加载权重：用假张量执行训练的一步。所问的方案都放不下时退出码为 1。",
    "check": "不训练，只检查数据、模板和配置：显示要学习的词元，并查找所有已知的问题。\n\n"
    "有错误时退出码为 1（用 --strict 时警告也算），否则为 0；数据无法读取时为 2。",
    "train": "训练：在基座模型上用一种方法微调你的数据，结果保存在运行文件夹中。",
    "compare": "用多个随机种子在相同的样本上训练多种方法，比出最好的一种：一张表，一个网页。\n\n"
    "中断之后，用同一条命令继续。没有任何运行完成时，退出码为 1。",
    "report": "根据记录生成一次比较的表格和网页，也可用于相同数据上的任意几次运行。",
    "eval": "评估一次运行：在验证集或 --data 上的损失，以及准确率或困惑度。",
    "predict": "用训练好的运行预测：文本的类别、文本中标注的片段，或问题的答案；配合 --data 也生成文本。\n\n"
    "文件按训练时用的列读取。成对的两段文本之间、问题与上下文之间用制表符隔开。"
    "空行或没有文本的样本输出为空行，位置不变。",
    "generate": "用训练好的运行生成文本。",
    "chat": "向基座模型和若干次运行提同样的问题，边生成边并排显示回答。\n\n"
    "每个模型各自保留对话。/reset 开始新的对话，/system 文本 设置系统消息，/save 文件.jsonl 保存对话，"
    "/help 列出命令。不在终端中时从标准输入读取问题。输入空行或 /exit 结束。",
    "merge": "把适配器合并到基座模型，验证合并前后输出一致，并保存为普通模型。",
    "methods": "列出各种方法：训练什么，默认学习率及其来源。",
    "config": "列出每个配置项的类型、默认值和含义。",
    "explain": "解释一个错误或检查结果：含义、原因和办法。",
}
HEADINGS = {"Arguments": "参数", "Options": "选项", "Commands": "命令"}
WORDS = {
    "Show this message and exit.": "显示本说明并退出。",
    "[default: ": "[默认：",
    "; default: ": "；默认：",
    "; x": "；x",
    "required]": "必需]",
}
PLACEHOLDERS = {
    "[OPTIONS]": "[选项]",
    "COMMAND [ARGS]...": "命令 [参数]...",
    "<str>": "<文本>",
    "<list[str]>": "<文本>",
    "<path>": "<路径>",
    "<list[Path]>": "<路径>",
    "<int range>": "<整数>",
    "<float>": "<数>",
    "<float range>": "<数>",
    "FOLDER_OR_NAME": "<文件夹或名称>",
    "[<文件夹或名称>]": "[文件夹或名称]",
    "[ADDRESS]": "[地址]",
}


class ChinesePage(typer.Context.formatter_class):
    """A help page in Chinese, wrapped by display width."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        super().write_usage(prog, _filled_in(args, PLACEHOLDERS), prefix or "用法：")

    def write_heading(self, heading: str) -> None:
        self.write(f"{HEADINGS.get(heading, heading)}：\n")

    def write_text(self, text: str) -> None:
        self.write(
            "\n\n".join(filled(part, self.width, " " * self.current_indent) for part in text.split("\n\n")) + "\n"
        )

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        left, rows = " " * self.current_indent, [(_filled_in(name, PLACEHOLDERS), text) for name, text in rows]
        first = min(max((width(name) for name, _ in rows), default=0), col_max) + col_spacing
        for name, text in rows:
            lines = filled(_filled_in(text, WORDS), max(self.width - first - 2, 10)).split("\n")
            head = padded(name, first) if width(name) + col_spacing <= first else f"{name}\n{left}{' ' * first}"
            self.write(f"{left}{head}{lines[0]}".rstrip() + "\n")
            for line in lines[1:]:
                self.write(f"{left}{' ' * first}{line}\n")


def _filled_in(text: str, words: dict[str, str]) -> str:
    """The text with the parser's words translated to Chinese."""
    for english, chinese in words.items():
        text = text.replace(english, chinese)
    return text


class ChineseContext(typer.Context):
    formatter_class = ChinesePage


def in_the_readers_language(group: Any) -> Any:
    """Sets the help texts of typer's commands to the reader's language."""
    if language() == "zh":
        for name, command in {"siliang": group, **group.commands}.items():
            command.context_class = ChineseContext
            command.help = COMMANDS_ZH[name]
            command.short_help = COMMANDS_ZH[name].partition("\n")[0].removesuffix("。")
    return group
