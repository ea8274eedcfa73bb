"""The page of --help in the reader's language: the commands' texts, and the parser's own words and lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from siliang.language import filled, language, padded, width

COMMANDS_ZH = {
    "siliang": "在自己的机器上对 transformers 模型进行参数高效微调。\n\n--allow-code 和 --debug 也可以写在命令之后。",
    "demo": "在自带的影评上比较五种方法：5 分钟之内得到一张表和一个页面，不需要网络，也不需要 GPU。",
    "plan": "按方法给出一次运行需要的内存和时间，以及为了放得下最少要改什么。\n\n"
    "不加载任何内容：用假张量执行运行自己的一步。所问的方案都放不下时退出码为 1。",
    "check": "不训练，只检查数据、模板和设置：要学习的词元，以及所有已知的陷阱。\n\n"
    "有错误时退出码为 1（用 --strict 时警告也算），否则为 0；数据无法读取时为 2。",
    "train": "训练：把一种方法加到基座模型上，用你的数据微调，结果保存在运行的文件夹中。",
    "compare": "用多个种子在相同的样本上训练多种方法，给出哪种最好：一张表，一个页面。\n\n"
    "中断之后，用同一条命令继续。没有任何运行完成时退出码为 1。",
    "report": "根据记录生成一次比较的表和页面，也可用于相同数据上的任何几次运行。",
    "eval": "评估一次运行：在留出样本或 --data 上的损失，以及准确率或困惑度。",
    "predict": "用训练好的运行预测：文本的类别、其中标注的片段，或问题的答案。\n\n"
    "读取文件时使用训练时的那些列。句对的两段文本之间、问题与段落之间，用制表符分隔。"
    "空行或没有文本的样本输出为空行，位置不变。",
    "generate": "用训练好的运行生成文本。",
    "chat": "向基座模型和任意几次运行提出同样的问题，并排显示逐步写出的回答。\n\n"
    "每行一个问题，彼此独立；不在终端中时从标准输入读取。空行结束。",
    "merge": "把运行的适配器合并到基座模型，验证两者输出一致，并保存为普通模型。",
    "methods": "列出各种方法：训练什么，默认学习率及其来源。",
    "config": "列出每个配置项的类型、默认值和含义。",
    "explain": "说明一个错误或发现的含义、原因和办法。",
}
HEADINGS = {"Arguments": "参数", "Options": "选项", "Commands": "命令"}
WORDS = {
    "Show this message and exit.": "显示本说明并退出。",
    "[default: ": "[默认：",
    "; default: ": "；默认：",
    "required]": "必需]",
}


class ChinesePage(typer.Context.formatter_class):
    """Lines of Chinese, by the columns that they take."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        super().write_usage(prog, args, prefix or "用法：")

    def write_heading(self, heading: str) -> None:
        self.write(f"{HEADINGS.get(heading, heading)}：\n")

    def write_text(self, text: str) -> None:
        self.write(
            "\n\n".join(filled(part, self.width, " " * self.current_indent) for part in text.split("\n\n")) + "\n"
        )

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        left = " " * self.current_indent
        first = min(max((width(name) for name, _ in rows), default=0), col_max) + col_spacing
        for name, text in rows:
            for english, chinese in WORDS.items():
                text = text.replace(english, chinese)
            lines = filled(text, max(self.width - first - 2, 10)).split("\n")
            head = padded(name, first) if width(name) + col_spacing <= first else f"{name}\n{left}{' ' * first}"
            self.write(f"{left}{head}{lines[0]}".rstrip() + "\n")
            for line in lines[1:]:
                self.write(f"{left}{' ' * first}{line}\n")


class ChineseContext(typer.Context):
    formatter_class = ChinesePage


def in_the_readers_language(group: Any) -> Any:
    """The commands, as typer's `get_command` makes them, with their --help in the reader's language."""
    if language() == "zh":
        for name, command in {"siliang": group, **group.commands}.items():
            command.context_class = ChineseContext
            command.help = COMMANDS_ZH[name]
            command.short_help = COMMANDS_ZH[name].partition("\n")[0].removesuffix("。")
    return group
