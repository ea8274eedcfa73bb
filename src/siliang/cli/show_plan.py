"""The output of `siliang plan`: the table, the bars, and the changes with which a run fits."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from siliang.cli.console import rich_console
from siliang.cli.show import duration, size
from siliang.language import Bilingual, both, local
from siliang.records import Category, Fit, MethodPlan, PlanRecord
from siliang.terminal import one_line, shell_command

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# the pieces of the bar, in order; the last one is the overhead
PIECES: tuple[tuple[Bilingual, tuple[Category, ...], str, str], ...] = (
    (Bilingual("weights", "权重"), ("weights",), "█", "blue"),
    (
        Bilingual("trained, gradients, optimizer", "可训练参数、梯度、优化器"),
        ("trained", "gradients", "optimizer"),
        "▓",
        "magenta",
    ),
    (Bilingual("activations, cached outputs", "激活值、缓存的输出"), ("activations", "frozen"), "▒", "green"),
    (Bilingual("logits, workspace", "logits、临时张量"), ("logits", "workspace"), "░", "yellow"),
    (Bilingual("outside the tensors", "张量以外"), (), "·", "bright_black"),
)
BAR, SHORTEST_BAR = 24, 4  # columns
SOURCES = {
    "free here": Bilingual("free here", "本机可用"),
    "as asked": Bilingual("as asked", "按设置"),
    "unknown": Bilingual("unknown", "未知"),
}


def show(record: PlanRecord) -> None:
    """Prints the table, the bars, and what to change."""
    console = rich_console(width=None if sys.stdout.isatty() else 120)
    for line in headline(record):
        console.print(line, markup=False)
    _show_table(console, record)
    console.print("  ".join(f"{glyph} {local(name)}" for name, _, glyph, _ in PIECES), style="dim", markup=False)
    for m in record.methods:
        for line in [*([m.error] if m.error else []), *m.notes]:
            text = local(line)
            console.print(both(f"{m.method}: {text}", f"{m.method}：{text}"), markup=False)
    if any(m.recomputed_layers for m in record.methods if not m.error):
        twice = both(
            "recomputed: the number of layers that recompute their activations in the backward pass",
            "重算：在反向传播时重新计算激活值的层数",
        )
        console.print(twice, style="dim")
    _show_changes(console, record)


def headline(record: PlanRecord) -> list[str]:
    """The model, device, batch and speed of the plan, one line each."""
    base, base_zh = "", ""
    if record.quantization != "none":
        base, base_zh = f", base in {record.quantization}", f"，基座模型为 {record.quantization}"
    amount, amount_zh = "of unknown size", "内存大小未知"
    if record.memory_bytes:
        memory, source = size(record.memory_bytes), SOURCES[record.memory_source]
        amount, amount_zh = f"{memory} {source}", f"{source.zh} {memory}"
    more, more_zh = "", ""
    if record.devices > 1:
        more = f"; {record.devices} devices, the plan is for each of them"
        more_zh = f"；共 {record.devices} 个，以下是每个设备的用量"
    rows = Bilingual("no data given: rows of data.max_length tokens", "没有给出数据，按 data.max_length 的长度计")
    if record.batch_source == "data":
        rows = Bilingual("the longest batch of the data", "数据中最长的批次")
    lines = [
        both(
            f"model      {record.model}, {record.task}, {record.precision}{base}",
            f"模型       {record.model}，{record.task}，{record.precision}{base_zh}",
        ),
        both(f"device     {record.device}, {amount}{more}", f"设备       {record.device}，{amount_zh}{more_zh}"),
        both(
            f"batch      {record.batch_rows} rows, {record.batch_tokens:,} tokens ({rows})",
            f"批次       {record.batch_rows} 条样本，{record.batch_tokens:,} 个词元（{rows.zh}）",
        ),
    ]
    lines += _kept(record)
    if record.rate:
        lines.append(both("speed      ", "速度       ") + local(record.rate))
    return lines


def _kept(record: PlanRecord) -> list[str]:
    """The line of frozen weights that are not converted, of the method that has most of them; none without such."""
    planned = [m for m in record.methods if not m.error]
    kept = max((m.kept_weights for m in planned if m.kept_weights), key=lambda kept: kept.saved_bytes, default=None)
    if kept is None:
        return []
    others = [m.method for m in planned if m.kept_weights is None]
    but, but_zh = "", ""
    if others:
        but, but_zh = "; not with " + ", ".join(others), "；" + "、".join(others) + " 除外"
    return [both(f"weights    {kept.in_words}{but}", f"权重       {kept.in_words.zh}{but_zh}")]


def _show_table(console: Console, record: PlanRecord) -> None:
    """Prints the table. Its bars become shorter where the console is too narrow; numbers are cut last."""
    table = _table(record, BAR)
    for bar in range(BAR - 2, SHORTEST_BAR - 1, -2):
        if console.measure(table, options=console.options.update(max_width=1000)).maximum <= console.width:
            break
        table = _table(record, bar)
    console.print(table)


def _table(record: PlanRecord, bar: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    planned = [m for m in record.methods if not m.error]
    timed = any(m.tokens_per_s for m in planned)
    compared = any(m.baseline_bytes for m in planned)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(both("method", "方法"), no_wrap=True)
    names = [
        both("trained", "可训练参数"),
        both("share", "占比"),
        both("on disk", "磁盘"),
        both("loading", "加载时"),
        both("peak", "峰值"),
    ]
    for name in [*names, *([both("baseline", "基线")] if compared else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if record.memory_bytes is not None:
        table.add_column(both("fits", "放得下"), no_wrap=True)
    if record.devices > 1:
        table.add_column(both("strategy", "并行策略"), no_wrap=True)
    if timed:
        time = both("an epoch", "每个 epoch") if record.tokens_per_epoch else both("tokens/s", "词元/秒")
        table.add_column(time, justify="right", no_wrap=True)
    widest = max([m.peak_bytes for m in planned] + [1])
    for m in planned:
        cells: list[Text | str] = [
            Text(one_line(m.method)),
            f"{m.trained:,}",
            f"{100 * m.trained / m.total:.3g}%",
            size(m.adapter_bytes),
            size(m.loading_bytes),
            size(m.peak_bytes),
        ]
        if compared:
            cells.append(size(m.baseline_bytes) if m.baseline_bytes else "")
        cells.append(_bar(m, widest, bar))
        if record.memory_bytes is not None:
            cells.append(_fits(m))
        if record.devices > 1:
            cells.append(m.strategy or "")
        if timed and m.tokens_per_s:
            cells.append(duration(m.epoch_s) if m.epoch_s else f"{m.tokens_per_s:,.3g}")
        table.add_row(*cells)
    return table


def _bar(m: MethodPlan, widest: int, longest: int) -> Text:
    from rich.text import Text

    text = Text()
    for _, names, glyph, style in PIECES:
        part = sum(m.parts.get(name, 0) for name in names) if names else m.overhead_bytes
        text.append(glyph * round(longest * part / widest), style=style)
    return text


def _fits(m: MethodPlan) -> str:
    if not m.fits:
        return both("no", "否")
    n, of = m.recomputed_layers, m.layers
    return both(f"yes, {n}/{of} recomputed", f"是，{n}/{of} 层重算") if n else both("yes", "是")


def _show_changes(console: Console, record: PlanRecord) -> None:
    alone = len(record.methods) == 1
    for m in record.methods:
        if m.error or m.fits is not False:
            continue
        if m.fit is not None:
            _show_fit(console, m.method, m.fit)
        elif alone:
            console.print(
                both(f"\n{m.method} does not fit with any change.", f"\n{m.method} 怎样调整设置都放不下。"),
                markup=False,
            )
    if not alone and (left := [m.method for m in record.methods if m.fits is False]):
        method = shell_command("--method", left[0].replace(",", " ").split()[0])
        console.print(
            both(
                f"\nto see the changes with which it fits: siliang plan ... {method}",
                f"\n怎样调整才放得下：siliang plan ... {method}",
            ),
            markup=False,
        )


def _show_fit(console: Console, method: str, fit: Fit) -> None:
    slower, slower_zh = "", ""
    more = 100 * (fit.time_factor - 1)
    if more > 0.5:
        slower, slower_zh = f", {more:.0f}% more time", f"，用时增加 {more:.0f}%"
    memory = size(fit.peak_bytes)
    console.print(
        both(f"\n{method} fits with {memory}{slower}:", f"\n{method} 这样调整后放得下，需要 {memory}{slower_zh}："),
        markup=False,
    )
    for change in fit.changes:
        line, price = f"  {change.setting}: {change.before} -> {change.after}", local(change.price)
        console.print(both(f"{line}   ({price})", f"{line}   （代价：{price}）"), markup=False)
