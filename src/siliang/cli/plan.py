"""siliang plan: what each method will need, before anything is loaded, and what to change so that it fits."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siliang.cli.console import command_line, print_json, rich_console
from siliang.environment import importing
from siliang.terminal import bare, one_line, pasted

if TYPE_CHECKING:
    from rich.console import Console

    from siliang.config import RunConfig
    from siliang.plan import MethodPlan, PlanRecord

NO_DATA = "(no data)"  # stands where a run's data would; nothing reads it
# what the bar shows, in the order of its pieces
PIECES: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("weights", ("weights",), "█", "blue"),
    ("trained, gradients, optimiser", ("trained", "gradients", "optimizer"), "▓", "magenta"),
    ("activations", ("activations",), "▒", "green"),
    ("logits, workspace", ("logits", "workspace"), "░", "yellow"),
    ("beside the tensors", (), "·", "bright_black"),
)
BAR = 24


def plan(
    settings: Annotated[
        Path | None, typer.Argument(help="run.yaml, as for `siliang train`, or compare.yaml, for each of its methods.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder, a name on the hub, or a shape by name: `--model list` shows those.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Training data: the plan is then for its longest batch.")] = None,
    task: Annotated[
        str | None, typer.Option(help="causal_lm, seq_cls, token_cls, seq_2_seq_lm or question_ans.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="A method, several with commas, or all.")] = None,
    memory: Annotated[str | None, typer.Option(help="What there is: 8GB. Without it, what is free here.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, which need not be here.")] = None,
    devices: Annotated[
        int, typer.Option(min=1, help="Of how many devices; the plan is of each, and --memory is what each has.")
    ] = 1,
    strategy: Annotated[
        str | None, typer.Option(help="How they share the model: ddp, fsdp, or auto (distributed.strategy).")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="What the device computes in a second, such as 65e12, for the times.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting by name: --set train.batch_size=4")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also what PEFT with transformers.Trainer would need.")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="Write a run.yaml that fits.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what memory and time a run will take, by method, and the smallest changes with which it fits.

    Nothing is loaded: the run's own step is made on paper. Exit code 1 where nothing of what was asked fits.
    """
    from siliang.cli.show import quiet_loading
    from siliang.cli.train import gather, with_adapter
    from siliang.units import parse_bytes

    memory_bytes = parse_bytes(memory) if memory else None
    with importing():
        from siliang.config import RunConfig
        from siliang.methods import METHODS, find_method, whole_name
        from siliang.types import ConfigError

    if model == "list":
        _list_shapes()
        return
    if memory_bytes == 0:
        raise ConfigError(f"--memory {memory}: must be more than 0, such as 8GB.")
    if flops is not None and not 0 < flops < math.inf:
        raise ConfigError(f"--flops {flops}: must be a number above 0, such as 65e12.")
    values = with_adapter(gather(settings, {"model": model, "task": task}, data, set_ or []))
    if "model" not in values:
        raise ConfigError("say which model: siliang plan run.yaml, or --model DIR, NAME, or a shape (--model list).")
    comparison = _comparison_in(values)
    if comparison and write is not None:
        raise ConfigError("--write writes a run of one method, and this is a comparison: leave it out.")
    chosen = values.get("method", "lora")
    own = whole_name(str(chosen.get("name", "lora") if isinstance(chosen, dict) else chosen))
    if method in (None, "all"):
        names = [own] if settings and method is None else [name for name, m in METHODS.items() if not m.is_baseline]
    else:
        names = [whole_name(name) for name in method.split(",")]
    for name in names:
        find_method(name)
    if own not in names:
        values["method"] = names[0]
    with_data = isinstance(values.get("data"), dict) and bool(values["data"].get("train"))
    if not with_data:
        section = values.setdefault("data", {})
        if isinstance(section, dict):
            section["train"] = NO_DATA
    values.setdefault("output", "siliang-run")
    if strategy is not None:
        values["distributed"] = {"strategy": strategy}
    with importing():
        from siliang.distributed.sharding import fake_mesh
        from siliang.plan import find_target, model_config
        from siliang.plan import plan as make
        from siliang.plan.device import shared_by
        from siliang.plan.shapes import SHAPES, shape_name, task_of

        quiet_loading()
    values["model"] = shape_name(str(values["model"]))
    base_config = None
    if "task" not in values:
        probe = RunConfig.build(values | {"task": "causal_lm"}, source=str(settings or "the flags"))
        base_config = model_config(probe)
        values["task"] = task_of(values["model"], base_config).title
    config = RunConfig.build(values, source=str(settings or "the flags"))
    if with_data and config.model in SHAPES and not Path(config.model).is_dir():
        raise ConfigError(
            f"{config.model} is a shape, without the tokenizer that the data needs: give the model's folder, "
            "or leave the data away and say data.max_length."
        )
    target = find_target(config, device, memory_bytes=memory_bytes, flops=flops)
    source = str(settings or "the flags")
    runs = {"": (config, names)}
    if comparison:
        runs = _runs_of(values, comparison, names if method not in (None, "all") else None, source)
    with fake_mesh(devices) as mesh:
        plans = {
            label: make(
                run,
                shared_by(target, devices),
                methods=methods,
                with_data=with_data,
                base_config=base_config,
                baseline=baseline,
                mesh=mesh,
                say=_Say(not json),
            )
            for label, (run, methods) in runs.items()
        }
    record = _together(plans)
    if json:
        print_json(record.model_dump(mode="json"), indent=1)
    else:
        show(record)
    if write is not None:
        _write(config, record, write)
    if not any(m.fits is not False and not m.error for m in record.methods):
        raise typer.Exit(1)


def _comparison_in(values: dict[str, Any]) -> dict[str, Any]:
    """Takes what is a comparison's out of the settings, and returns it."""
    from siliang.config.comparison import CompareSettings

    return {key: values.pop(key) for key in CompareSettings.model_fields if key in values}


def _runs_of(
    values: dict[str, Any], comparison: dict[str, Any], only: list[str] | None, source: str
) -> dict[str, tuple[RunConfig, list[str]]]:
    """The runs of a comparison whose memory may differ, by label: methods without settings of their own are planned in
    one go, under "".

    Args:
        only: These methods; None for all.
    """
    from siliang.config import RunConfig
    from siliang.config.comparison import CompareConfig
    from siliang.types import ConfigError

    given = {key: value for key, value in values.items() if key != "method"}
    settings = CompareConfig.build(given | comparison, source=source).settings
    entries = [entry for entry in settings.methods if only is None or entry.name in only]
    if not entries:
        raise ConfigError(f"--method {','.join(only or [])}: {source} compares no such method.")
    plain: list[str] = []
    found: dict[str, tuple[RunConfig, list[str]]] = {}
    for entry in entries:
        for choice in settings.choices(entry) or [{}]:
            tried = {key: value for key, value in choice.items() if key != "learning_rate"}  # which takes no memory
            arguments = entry.arguments | tried
            if not arguments and entry.label == entry.name:
                plain += [entry.name] * (entry.name not in plain)
                continue
            label = ", ".join([entry.label, *(f"{key}={value}" for key, value in tried.items())])
            config = RunConfig.build(given | {"method": {"name": entry.name, **arguments}}, source=source)
            found[label] = (config, [entry.name])
    return ({"": (RunConfig.build(given, source=source), plain)} if plain else {}) | found


def _together(plans: dict[str, PlanRecord]) -> PlanRecord:
    """The plans of a comparison in one, each method under its label."""
    first = next(iter(plans.values()))
    for label, plan in plans.items():
        if label:
            plan.methods[0].method = label
    first.methods = [method for plan in plans.values() for method in plan.methods]
    return first


class _Say:
    """What is being planned, on a terminal, gone when it is done."""

    def __init__(self, on: bool) -> None:
        self._on = on and sys.stderr.isatty()

    def __call__(self, what: str) -> None:
        if self._on:
            said = f"planning {one_line(what)} ..." if what else ""
            print(f"\r\033[K{said}", end="", file=bare(sys.stderr), flush=True)


def show(record: PlanRecord) -> None:
    """The table, the bars, and what to change."""
    from rich.table import Table
    from rich.text import Text

    from siliang.cli.show import duration, size

    wide = {} if sys.stdout.isatty() else {"width": 120}
    console = rich_console(**wide)
    for line in headline(record):
        console.print(line, markup=False)
    planned = [m for m in record.methods if not m.error]
    timed = any(m.tokens_per_s for m in planned)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", no_wrap=True)
    for name in (
        "trained",
        "share",
        "on disk",
        "loading",
        "peak",
        *(("baseline",) if any(m.baseline_bytes for m in planned) else ()),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if record.memory_bytes is not None:
        table.add_column("fits", no_wrap=True)
    if record.devices > 1:
        table.add_column("shared by", no_wrap=True)
    if timed:
        table.add_column("an epoch" if record.tokens_per_epoch else "tokens/s", justify="right", no_wrap=True)
    widest = max([m.peak_bytes for m in planned] + [1])
    for m in planned:
        cells: list[Any] = [
            Text(one_line(m.method)),
            f"{m.trained:,}",
            f"{100 * m.trained / m.total:.3g}%",
            size(m.adapter_bytes),
            size(m.loading_bytes),
            size(m.peak_bytes),
        ]
        if any(x.baseline_bytes for x in planned):
            cells.append(size(m.baseline_bytes) if m.baseline_bytes else "")
        cells.append(_bar(m, widest))
        if record.memory_bytes is not None:
            cells.append(_fits(m))
        if record.devices > 1:
            cells.append(m.strategy)
        if timed and m.tokens_per_s:
            cells.append(duration(m.epoch_s) if m.epoch_s else f"{m.tokens_per_s:,.3g}")
        table.add_row(*cells)
    console.print(table)
    console.print("  ".join(f"{glyph} {name}" for name, _, glyph, _ in PIECES), style="dim", markup=False)
    for m in record.methods:
        if m.error:
            console.print(f"{m.method}: {m.error}", markup=False)
        for note in m.notes:
            console.print(f"{m.method}: {note}", markup=False)
    if any(m.recomputed_layers for m in planned):
        console.print("twice: so many layers compute their activations again in the backward pass", style="dim")
    _show_changes(console, record)


def headline(record: PlanRecord) -> list[str]:
    """What was planned, in a few lines."""
    from siliang.cli.show import size

    base = f", base in {record.quantization}" if record.quantization != "none" else ""
    there = f"{size(record.memory_bytes)} {record.memory_source}" if record.memory_bytes else "of unknown size"
    source = (
        "the longest batch of the data" if record.batch_source == "data" else "rows of data.max_length: no data given"
    )
    lines = [
        f"model      {record.model}, {record.task}, {record.precision}{base}",
        f"device     {record.device}, {there}"
        + (f"; {record.devices} of them, of each of which this is the plan" if record.devices > 1 else ""),
        f"batch      {record.batch_rows} rows, {record.batch_tokens:,} tokens ({source})",
    ]
    if record.rate:
        lines.append(f"speed      {record.rate}")
    return lines


def _bar(m: MethodPlan, widest: int) -> Any:
    from rich.text import Text

    text = Text()
    for _, names, glyph, style in PIECES:
        part = sum(m.parts.get(name, 0) for name in names) if names else m.overhead_bytes  # type: ignore[call-overload]
        text.append(glyph * round(BAR * part / widest), style=style)
    return text


def _fits(m: MethodPlan) -> str:
    if m.fits:
        return f"yes, {m.recomputed_layers}/{m.layers} twice" if m.recomputed_layers else "yes"
    return "no"


def _show_changes(console: Console, record: PlanRecord) -> None:
    from siliang.cli.show import size

    for m in record.methods:
        if m.error or m.fits is not False:
            continue
        if m.fit is None and len(record.methods) > 1:
            continue
        if m.fit is None:
            console.print(f"\n{m.method} does not fit, whatever is changed.", markup=False)
            continue
        slower = f", {100 * (m.fit.time_factor - 1):.0f}% more time" if m.fit.time_factor > 1.005 else ""
        console.print(f"\n{m.method} fits with {size(m.fit.peak_bytes)}{slower}:", markup=False)
        for change in m.fit.changes:
            console.print(f"  {change.setting}: {change.before} -> {change.after}   ({change.price})", markup=False)

    if len(record.methods) > 1 and (left := [m.method for m in record.methods if m.fits is False]):
        method = left[0].replace(",", " ").split()[0]
        console.print(
            f"\nwhat to change so that it fits: siliang plan ... {pasted('--method', method)}",
            markup=False,
        )


def _write(config: RunConfig, record: PlanRecord, path: Path) -> None:
    """The run of the first method that fits, changed where it needs to be."""
    from siliang.files import write_text
    from siliang.safe_yaml import dump_yaml, parse_yaml
    from siliang.types import ConfigError

    able = [m for m in record.methods if not m.error and (m.fits is not False or m.fit is not None)]
    if not able:
        raise ConfigError(f"nothing fits, so {path} is not written.")
    if os.path.lexists(path):  # a link that leads nowhere too
        raise ConfigError(f"{path} is there already: choose another name for --write.")
    best = next((m for m in able if m.method == config.method.name), able[0])
    values = config.model_dump(mode="json", exclude_defaults=True)
    values["task"] = config.task.lower()
    if best.method != config.method.name:
        values["method"] = best.method
    if values["data"]["train"] == NO_DATA:
        values["data"]["train"] = "data.jsonl"
    for change in best.fit.changes if best.fit and not best.fits else []:
        *sections, last = change.setting.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = parse_yaml(change.after)
    write_text(path, dump_yaml(values))
    print(f"written    {path} ({best.method}); start it with: {command_line('train', path)}")


def _list_shapes() -> None:
    from siliang.plan.shapes import SHAPES

    for name, shape in SHAPES.items():
        print(f"{name:<26}{shape.parameters:>16,}  {shape.task.title}")
