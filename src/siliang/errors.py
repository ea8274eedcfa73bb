"""The meaning of each error and its remedy, in English and Chinese. `python -m siliang.errors` makes docs/errors.md.

The message of an error says what happened in one case. This catalogue has the general cause and remedy, by the code of
the error's class.
"""

from __future__ import annotations

from dataclasses import dataclass

from siliang.language import Bilingual, Language
from siliang.secrets import shortened
from siliang.types import ConfigError, SiliangError, nearest

LONGEST_LINE = 1000


@dataclass(frozen=True)
class Page:
    """One error in one language."""

    title: str
    cause: str
    remedy: str


@dataclass(frozen=True)
class Entry:
    """One error."""

    en: Page
    zh: Page

    def page(self, language: Language) -> Page:
        return self.zh if language == "zh" else self.en


CATALOGUE: dict[str, Entry] = {
    "SLE01": Entry(
        Page(
            "a setting is wrong",
            "A setting is unknown, missing, has a value that is not allowed, or conflicts with another one.",
            "The message names the setting, its value and what is allowed. `siliang config` lists every setting.",
        ),
        Page(
            "配置有误",
            "某个配置项不存在、缺失、取值不被允许，或与其他配置冲突。",
            "按提示修改该项；`siliang config` 会列出全部配置项、默认值和含义。",
        ),
    ),
    "SLE02": Entry(
        Page(
            "nothing in the model to tune",
            "The modules or parameters that the method should tune are not in this model: the names belong to another "
            "architecture, or BitFit is used on a model without biases.",
            "Use one of the names in the message, leave target_modules out, or choose another method.",
        ),
        Page(
            "模型中没有可微调的部分",
            "该方法要微调的模块或参数不在这个模型里：名称属于别的结构，或对没有偏置的模型用了 BitFit。",
            "改用提示中给出的模块名，或去掉 target_modules 用默认值，或换一种方法。",
        ),
    ),
    "SLE03": Entry(
        Page(
            "the data cannot be used",
            "A file is missing, has an unknown format, or has rows that do not fit the task.",
            "Correct the rows in the message, by file and line, or skip them with data.skip_bad_rows=true. "
            "`siliang check` shows all of them, and what would be learned.",
        ),
        Page(
            "数据无法使用",
            "文件不存在、格式无法读取，或其中有些行不符合任务要求。",
            "按提示的文件和行号修正，或用 data.skip_bad_rows=true 跳过；`siliang check` 会列出所有问题。",
        ),
    ),
    "SLE04": Entry(
        Page(
            "the base model cannot be loaded",
            "The folder has no transformers model, the hub did not return it, weights are missing or damaged, it "
            "needs to run its own code, a link leads out of the folder, or its files are not those that a run was "
            "trained on.",
            "Check the name and the network, download the model again, or use one that transformers supports itself. "
            "For a run: restore its base model, give its present place with --base, or continue with --force.",
        ),
        Page(
            "基座模型无法加载",
            "文件夹中没有 transformers 模型、无法从 Hub 下载、权重缺失或损坏、模型要求运行自带代码，"
            "其中的链接指向文件夹之外，或其文件已不是训练时的那些。",
            "检查名称和网络，重新下载模型，或改用 transformers 自身支持的模型。"
            "对训练结果：放回原来的基座模型，用 --base 指明位置，或加 --force 继续。",
        ),
    ),
    "SLE05": Entry(
        Page(
            "the adapter cannot be used",
            "The adapter's files are damaged or incomplete, or belong to another base model or to a method that "
            "siliang does not have.",
            "Copy or download the adapter again, check that it belongs to this base model, or use a checkpoint of the "
            "run: each is an adapter folder.",
        ),
        Page(
            "适配器无法使用",
            "适配器文件损坏或不完整，或属于别的基座模型，或是 siliang 不支持的方法。",
            "重新复制或下载适配器，确认它与基座模型一致；也可以使用运行文件夹中的检查点，每个检查点都是一个适配器文件夹。",
        ),
    ),
    "SLE06": Entry(
        Page(
            "the merged model has other outputs",
            "Merging rounds the weights: with a quantized base, or in 16 bits with a small update, the difference "
            "matters.",
            "Merge in a wider --dtype, merge into the unquantized base model, or use the adapter without merging.",
        ),
        Page(
            "合并后的模型输出不一致",
            "合并时权重会舍入：在量化的权重上，或 16 位权重加上很小的更新时，误差会显现。",
            "用更宽的 --dtype 合并，合并到未量化的基座模型，或不合并、直接使用适配器。",
        ),
    ),
    "SLE07": Entry(
        Page(
            "training cannot continue",
            "The loss or the gradient is nan or infinite, or exactly zero for many steps: no more would be learned.",
            "The message has the step, the rows and the likely cause. Usually a lower train.learning_rate, precision "
            'bf16 or fp32 instead of fp16, or corrected data helps; train.on_nan="skip 5" skips a few bad steps.',
        ),
        Page(
            "训练无法继续",
            "损失或梯度为 nan、无穷大，或连续多步恰为零：继续训练学不到任何东西。",
            "提示中有步数、数据行和可能的原因。通常应降低 train.learning_rate、用 bf16 或 fp32 代替 fp16，"
            "或检查数据；"
            'train.on_nan="skip 5" 可跳过少数坏步。',
        ),
    ),
    "SLE08": Entry(
        Page(
            "out of memory",
            "A step needs more memory than the device has left.",
            "Set train.fit=true, which splits the batches, or train.tokens_at_once, "
            "train.gradient_checkpointing=true, a smaller data.max_length, or quantization.bits=4. Smaller batches "
            "give the same result, except with LILY and LoRA's velora_config, which take a mean over each batch.",
        ),
        Page(
            "显存或内存不足",
            "一步训练所需的内存超过设备剩余的内存。",
            "设置 train.fit=true（自动拆分批次），或使用 train.tokens_at_once、"
            "train.gradient_checkpointing=true、更小的 data.max_length、quantization.bits=4。拆分批次不改变结果，"
            "但 LILY 和 LoRA 的 velora_config 除外，它们对每个批次取平均。",
        ),
    ),
    "SLE09": Entry(
        Page(
            "the output folder cannot be used",
            "It is not empty, was removed, may not be written to, or the disk is full.",
            "Choose another with --output, free some space, or continue an interrupted run with --resume. Everything "
            "saved before is intact.",
        ),
        Page(
            "输出文件夹不可用",
            "文件夹非空、已被删除、不可写，或磁盘已满。",
            "用 --output 换一个文件夹，清理磁盘空间，或用 --resume 继续中断的训练。此前保存的内容是完整的。",
        ),
    ),
    "SLE10": Entry(
        Page(
            "the run was stopped",
            "The run got Ctrl-C or SIGTERM, or train.max_time is nearly over; it saved the step.",
            "Continue with `siliang train --resume RUN`: the result is that of a run that was never stopped.",
        ),
        Page(
            "训练已中断",
            "收到 Ctrl-C 或 SIGTERM，或 train.max_time 即将用完；当前步已保存。",
            "用 `siliang train --resume RUN` 继续，结果与从未中断的训练相同。",
        ),
    ),
    "SLE11": Entry(
        Page(
            "the run will not fit",
            "By its plan, which is made before anything is loaded, the run needs more memory than is available.",
            "The message has settings with which it fits. train.fit=true makes the changes that keep the result. "
            "`siliang plan run.yaml` shows what takes the memory, and `--method all` the memory of other methods.",
        ),
        Page(
            "内存（显存）不够",
            "加载模型之前的预估表明，这次训练需要的内存超过了可用的数量。",
            "按提示修改配置即可放下；不改变结果的修改可以用 train.fit=true 自动完成。`siliang plan run.yaml` "
            "会列出各部分占用，`--method all` 会列出其他方法的需要。",
        ),
    ),
    "SLE12": Entry(
        Page(
            "a process of the training has ended",
            "A training on several devices needs all of its processes. One was killed (often because memory was full), "
            "crashed, or can no longer be reached; the others ended with it.",
            "Checkpoints are intact: continue with `siliang train --resume RUN`, with the same number of devices or "
            "another. If it happens again, check that machine's memory and network. With `torchrun --max-restarts 3` "
            "the run continues by itself.",
        ),
        Page(
            "训练的某个进程已退出",
            "多设备训练需要所有进程同时在线。其中一个进程被杀死（常因内存不足）、出错退出或网络不可达，其余进程随之结束。",
            "已保存的检查点是完整的：运行 `siliang train --resume RUN` 继续，设备数可以相同也可以不同。"
            "若反复发生，请检查那台机器的内存和网络。使用 `torchrun --max-restarts 3` 可自动恢复。",
        ),
    ),
    "SLE13": Entry(
        Page(
            "the cluster cannot be used",
            "`--ray` needs the package ray. With an address, it needs a Ray cluster there that includes this machine, "
            "and the same siliang on all machines.",
            "Run `pip install 'siliang[cluster]'` on every machine, `ray start --head` on one, and `ray start "
            "--address HOST:6379` on the others, including this one. `--ray` without an address starts Ray on this "
            "machine, and `--jobs N` uses processes of this machine.",
        ),
        Page(
            "集群无法使用",
            "`--ray` 需要安装 ray；给出地址时，该地址须有正在运行的 Ray 集群，本机须已加入其中，"
            "且各台机器上的 siliang 版本相同。",
            "在每台机器上运行 `pip install 'siliang[cluster]'`；在一台机器上运行 `ray start --head`，"
            "其余机器（包括本机）运行 `ray start --address HOST:6379`。不带地址的 `--ray` 在本机启动 Ray；"
            "`--jobs N` 则使用本机的进程。",
        ),
    ),
    "SLE14": Entry(
        Page(
            "a model needs to run its own code",
            "The model's folder names Python files that would run in this process, with all your permissions. No file "
            "can allow them: only you can, on this machine, for exactly this code.",
            "Use a model that transformers or siliang supports itself; ChatGLM3's folders open without their code. Or "
            "read the code, and add --allow-code with the hash in the message; in a terminal, the command asks once, "
            "and stores the answer. In Python: siliang.allow_code(hash). Any changed byte in the folder changes the "
            "hash.",
        ),
        Page(
            "模型要求运行自带的代码",
            "模型文件夹指定了要在本进程中运行的 Python 文件。这些代码能做你能做的一切；任何文件都不能替你授权，"
            "只有你本人能在这台机器上为这份代码授权。",
            "请改用 transformers 或 siliang 本身支持的模型（ChatGLM3 的文件夹无需自带代码即可打开）；或阅读代码之后，"
            "用 --allow-code 加上提示中的哈希授权。在终端中命令会询问一次并记住回答；"
            "在 Python 中用 siliang.allow_code(hash)。文件夹中任何一个字节改变，哈希就不同。",
        ),
    ),
    "SLE15": Entry(
        Page(
            "a record is damaged",
            "A file that siliang writes (run.json, comparison.json, answers.json, the state of a checkpoint) is "
            "damaged, was changed, or was written by a later version.",
            "The message has the file, the field and the allowed values. Restore the file from a backup, or repeat the "
            "run; a file of a later version needs that version.",
        ),
        Page(
            "记录已损坏",
            "siliang 自己写的文件（run.json、comparison.json、answers.json、检查点的状态）已损坏、被改动，"
            "或由更新的版本写成。",
            "提示中有文件、字段和允许的取值。请从备份恢复该文件，或重新运行；更新版本写的文件需要用该版本打开。",
        ),
    ),
}


def find_entry(code: str) -> Entry:
    """The entry of an error's code.

    Raises:
        ConfigError: There is no such code.
    """
    try:
        return CATALOGUE[code.upper()]
    except KeyError:
        first, last, alike = min(CATALOGUE), max(CATALOGUE), nearest(code.upper(), CATALOGUE)
        raise ConfigError(
            Bilingual(
                f"error {code} does not exist; the codes are {first} to {last}.{alike}",
                f"错误 {code} 不存在；代码从 {first} 到 {last}。{alike.zh}",
            )
        ) from None


def explain(code: str, language: Language) -> str:
    """An error's page."""
    page = find_entry(code).page(language)
    cause, remedy = ("原因：", "办法：") if language == "zh" else ("Cause: ", "Remedy: ")
    return f"{code.upper()}: {page.title}\n\n{cause}{page.cause}\n\n{remedy}{page.remedy}"


def as_shown(error: SiliangError, language: Language) -> str:
    """An error as the command prints it: its message, and in Chinese also its title; with the remedy of its kind where
    the message is in English alone."""
    # the message may quote a file with lines of any length
    message = error.zh if language == "zh" and error.zh else str(error)
    words = "\n".join(shortened(line, LONGEST_LINE, " ...") for line in message.split("\n"))
    if language == "en":
        return f"error[{error.code}]: {words}"
    page = CATALOGUE[error.code].zh
    remedy = "" if error.zh else f"\n办法：{page.remedy}"
    return f"错误[{error.code}] {page.title}：{words}{remedy}"


def as_markdown() -> str:
    """docs/errors.md."""
    parts = [
        "# Errors\n\nMade by `make docs` from `src/siliang/errors.py`. Each error has a class, which code can catch, "
        "and a code, which `siliang explain CODE` explains; `SILIANG_LANG=zh`, or a Chinese locale, shows the title "
        "and the remedy in Chinese.\n"
    ]
    classes = {kind.code: kind for kind in _classes(SiliangError) if "code" in vars(kind)}  # others inherit theirs
    for code, entry in CATALOGUE.items():
        parts.append(
            f"## {code} `{classes[code].__name__}`: {entry.en.title} · {entry.zh.title}\n\n"
            f"{entry.en.cause}\n{entry.en.remedy}\n\n{entry.zh.cause}{entry.zh.remedy}\n"
        )
    return "\n".join(parts)


def _classes(kind: type[SiliangError]) -> list[type[SiliangError]]:
    return [found for sub in kind.__subclasses__() for found in (sub, *_classes(sub))]


if __name__ == "__main__":
    print(as_markdown(), end="")
