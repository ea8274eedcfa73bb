"""What a run prints of its data and model before the first step, and why it ends early; in both languages."""

from __future__ import annotations

from collections.abc import Callable

from siliang.config import RunConfig
from siliang.data.design_effect import harmful_effect
from siliang.data.prepared import PreparedData
from siliang.data.row_beginnings import row_beginnings
from siliang.data.tokens import TokenSet
from siliang.hardware import Choice
from siliang.language import both, local
from siliang.methods import Method
from siliang.records import KeptWeights
from siliang.tasks import task_of

ADAM_EPS = 1e-8  # torch's own


def say_data(data: PreparedData, say: Callable[[str], None]) -> None:
    """Rows, columns, and what was noticed while they were read."""
    examples, train_set = data.examples, data.train
    truncated, skipped = train_set.truncated, data.skipped
    parts = [both(f"data       {len(train_set):,} training rows", f"数据       {len(train_set):,} 条训练样本")]
    if examples.shares is not None:
        n = len(train_set)
        parts = [both(f"data       streamed, the first {n:,} rows checked", f"数据       数据流，检查前 {n:,} 条")]
    if not train_set.last_windows.all():
        n = len(examples.train)
        if examples.layout == "text":
            parts[0] += both(f" (windows of {n:,})", f"（由 {n:,} 条文本切成的窗口）")
        elif data.spec.windows:
            parts[0] += both(f" (windows of {n:,} questions)", f"（由 {n:,} 个问题切成的窗口）")
        elif data.template_in_words is not None:
            parts[0] += both(f" (made of {n:,} conversations)", f"（来自 {n:,} 段对话）")
        else:
            parts[0] += both(f" (entries of {n:,} rows of the data)", f"（来自数据中 {n:,} 条样本的条目）")
    parts.append(both(f"{len(data.eval):,} held-out rows", f"{len(data.eval):,} 条验证样本"))
    if skipped:
        parts.append(both(f"{len(skipped):,} skipped", f"跳过 {len(skipped):,} 条"))
    if truncated:
        longest = data.settings.max_length
        parts.append(both(f"{truncated:,} cut to {longest} tokens", f"{truncated:,} 条截断到 {longest} 个词元"))
    say(both(", ", "，").join(parts))
    columns = examples.says_columns
    say(both(f"columns    {columns}", f"列         {local(columns)}"))
    if (template := data.template_in_words) is not None:
        say(both(f"template   {template}", f"模板       {template.zh}"))
    for line in examples.notes:
        say(f"           {local(line)}")
    for line in skipped:
        say(both(f"           skipped {line}", f"           跳过 {local(line)}"))


def say_order(config: RunConfig, tokens: TokenSet, say: Callable[[str], None]) -> None:
    """Why rows of similar length are not trained together, where that is usual, and what rows that begin alike do."""
    if config.train.group_by_beginnings and config.train.rows_per_step > 1:
        order = row_beginnings(tokens).order
        if (n := harmful_effect(tokens, config.train.rows_per_step, order)) is not None:
            say(
                both(
                    f"warning    with rows that begin alike in a step, labels vary {n:.1f} times as much from step to "
                    "step, since they depend on the beginning; less may be learned (train.group_by_beginnings)",
                    f"警告       标签与样本的开头有关：同一步的样本开头相同时，各步标签的方差是 {n:.1f} 倍，"
                    "学到的可能更少（train.group_by_beginnings）",
                )
            )
    if not task_of(config).counts_rows or config.train.group_by_length is not None:
        return
    if (n := harmful_effect(tokens, config.train.rows_per_step)) is not None:
        say(
            both(
                f"order      random: with rows of similar length in a step, labels would vary {n:.1f} times as much, "
                "since they depend on the length (train.group_by_length)",
                f"顺序       随机：标签与文本长度有关，若同一步的样本长度相近，各步标签的方差将是 {n:.1f} 倍"
                "（train.group_by_length）",
            )
        )


def say_texts(config: RunConfig, written: int, rows: int, say: Callable[[str], None]) -> None:
    """For how many of the held-out rows texts are written, if for any."""
    if written:
        names = task_of(config).measures
        say(
            both(
                f"texts      written for {written:,} of {rows:,} held-out rows at each evaluation (evaluation.rows): "
                f"{', '.join(names)}",
                f"文本       每次评估为 {rows:,} 条验证样本中的 {written:,} 条生成文本（evaluation.rows）："
                f"{'、'.join(names)}",
            )
        )


def say_model(
    config: RunConfig,
    method: Method,
    precision: Choice,
    trained: int,
    total: int,
    device: str,
    kept: KeptWeights | None,
    say: Callable[[str], None],
) -> None:
    """The model and what is trained of it, the number formats, the device."""
    share = 100 * trained / total
    say(
        both(
            f"model      {config.model}: {total:,} parameters, {method.name} trains {trained:,} ({share:.3g}%)",
            f"模型       {config.model}：{total:,} 个参数，{method.name} 训练其中 {trained:,} 个（{share:.3g}%）",
        )
    )
    reason = precision.reason
    say(
        both(
            f"precision  {precision.precision} ({reason}), on {device}",
            f"精度       {precision.precision}（{local(reason)}），设备 {device}",
        )
    )
    if kept is not None:
        say(both(f"weights    {kept.in_words}", f"权重       {kept.in_words.zh}"))
    if precision.adam_eps != ADAM_EPS:
        say(
            both(
                f"           Adam's eps is {precision.adam_eps:g}, at some cost of stability: "
                f"the default {ADAM_EPS:g} is 0 in fp16, and would divide by zero",
                f"           Adam 的 eps 设为 {precision.adam_eps:g}，会损失一些稳定性："
                f"通常的 {ADAM_EPS:g} 在 fp16 中为 0，会导致除以零",
            )
        )


def no_better(step: int, n: int, best: int) -> str:
    """Of a run that train.patience ends.

    Args:
        n: Evaluations that were no better.
        best: The step of the best one.
    """
    return both(
        f"stops      step {step:,}: {n} evaluations were no better than that of step {best:,} (train.patience)",
        f"提前停止   第 {step:,} 步：连续 {n} 次评估不优于第 {best:,} 步（train.patience）",
    )
