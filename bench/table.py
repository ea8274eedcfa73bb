"""From records to the report: medians, ratios with their spread, targets, the gate, the settings tried."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from statistics import median
from typing import Any

from bench.gate import compare
from bench.record import NAMES, Measurement, Setting
from bench.workloads import WORKLOADS, Library, Target

ROWS = 1_000  # of the reader's own data
AGAINST = {
    "best": "the fastest peer",
    "padded": "the fastest peer on padded rows",
    "flat": "the fastest peer on rows laid end to end",
}
NO_SEARCH = "None: the settings of the peers were given."
Key = tuple[str, str]  # (workload, method)
Entries = dict[tuple[Library, str], list[Measurement]]  # by library and setting, round after round


def render(records: list[Measurement]) -> str:
    """The report in Markdown."""
    head = next((r for r in records if r.job.library == "siliang"), records[0])
    lines = ["# siliang and its peers", ""]
    device = head.device
    lines += [
        f"- {device.name}, {device.threads} threads, {device.memory_bytes / 2**30:.0f} GiB"
        + (f", {head.instructions}" if head.instructions else "")
        + f"; {_versions(head.versions)}",
        *_other_versions(records, head),
        f"- {min(r.started_at for r in records)} to {max(r.started_at for r in records)}",
        *(f"- `{command}`" for command in dict.fromkeys(r.command for r in records)),
        "- tokens/s: without padding, after the warm-up steps; memory: peak above the loaded weights; eta: share of",
        "  the speed at which the matrix products of the usual step alone would run (with shared beginnings fewer are",
        "  needed, and eta can be above 1); siliang's speed and memory: divided by those of the line, median",
        "  [least, most] over the rounds: 2 is twice as fast, or twice the memory",
        f"- {ROWS:,} rows: seconds of a process that trains so many, once: imports, data, model (siliang: also its",
        "  checks and its plan), and what is compiled, from the measured runs, and the steps at their measured speed;",
        "  outside of steps: the share of them that is no step. The peers' rows and weights are read by siliang's",
        "  functions (Unsloth's weights by its own)",
    ]
    lines += [
        f"- {w}: {note}" for w in dict.fromkeys(r.job.workload for r in records) if (note := WORKLOADS[w].excluded)
    ]
    lines += ["", *_times(records), "", "## Targets", "", *(_targets(records) or ["No timed rounds."])]
    lines += ["", "## Gate", "", *([line for _, line in gates(records)] or ["Not run: no losses were compared."])]
    lines += ["", "## Settings tried", "", *(_searches(records) or [NO_SEARCH])]
    return "\n".join(lines) + "\n"


def gates(records: list[Measurement]) -> list[tuple[bool, str]]:
    """(passed, line) of each comparison of losses."""
    found: list[tuple[bool, str]] = []
    for (workload, method), runs in _by_method(records, "gate"):
        ours = next(r for r in runs if r.job.library == "siliang")
        for peer in (r for r in runs if r.job.library != "siliang"):
            verdict = compare(ours, peer)
            steps = ours.job.warmup + ours.job.steps
            found.append(
                (
                    not verdict.problems,
                    f"- {workload} {method}: {NAMES[peer.job.library]} ({peer.job.setting}), {steps} steps: {verdict}, "
                    f"largest difference of a loss {verdict.difference:.1e}",
                )
            )
    return found


def _times(records: list[Measurement]) -> list[str]:
    lines = [
        "| workload | method | library | setting | tokens/s | eta | memory, MB | siliang's speed | siliang's memory "
        f"| {ROWS:,} rows, s | outside of steps |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    timed = {key for key, _ in _by_method(records, "time")}
    rest = [r for r in records if (r.job.workload, r.job.method) not in timed]  # in --smoke the gate's runs serve
    for (workload, method), runs in [*_by_method(records, "time"), *_by_method(rest, "gate")]:
        entries = _entries(runs)
        ours = entries.get(("siliang", str(Setting())), [])
        limit = median([r.limit_tokens_per_s for r in ours if r.limit_tokens_per_s] or [0.0])
        for (library, setting), found in entries.items():
            speed = median(r.tokens_per_s for r in found)
            eta = f"{speed / limit:.2f}" if limit else ""
            memory = median(r.above_bytes for r in found) / 1e6
            ratios = ["", ""] if library == "siliang" else [_spread(x) for x in _ratios(ours, found)]
            own = ", ".join([ours[0].precision, *_flat(ours[0].job.extra)]) if library == "siliang" else setting
            lines.append(
                f"| {workload} | {method} | {NAMES[library]} | {own} | {speed:,.0f} | {eta} | {memory:,.0f} | "
                + " | ".join([*ratios, *_of_rows(found)])
                + " |"
            )
    return lines


def _of_rows(found: list[Measurement]) -> tuple[str, str]:
    """Seconds of a process that trains `ROWS` rows, and the share of them outside of steps."""
    batch = WORKLOADS[found[0].job.workload].batch
    values = [r.seconds_of_rows(ROWS, batch) for r in found if r.imports_s]
    if not values:
        return "", ""
    return f"{median(whole for whole, _ in values):,.0f}", f"{median(1 - steps / w for w, steps in values):.0%}"


def _targets(records: list[Measurement]) -> list[str]:
    lines: list[str] = []
    for (workload, method), runs in _by_method(records, "time"):
        if runs[0].job.smoke:  # so small that speed means nothing
            continue
        entries = _entries(runs)
        ours = entries.pop(("siliang", str(Setting())), [])
        for target in WORKLOADS[workload].targets:
            lines += [f"- {workload} {method}: {line}" for line in _judge(target, ours, entries)]
    return lines


def _judge(target: Target, ours: list[Measurement], peers: Entries) -> Iterable[str]:
    """A line for each part of a target."""
    fitting = [r for r in peers.values() if target.against in ("best", r[0].job.setting.layout)]
    if not ours or not fitting:
        who = "a peer of this kind" if ours else "siliang"
        yield f"not judged: speed >= {target.speed}x of {AGAINST[target.against]}: no timed run of {who}"
        return
    peer = max(fitting, key=lambda r: median(m.tokens_per_s for m in r))
    name = f"{NAMES[peer[0].job.library]} ({peer[0].job.setting})"
    speed, memory = _ratios(ours, peer)
    ok = median(speed) >= target.speed
    yield _verdict(f"speed relative to {name}", ok, f">= {target.speed}x", f"{_spread(speed)}x")
    if target.memory:
        ok = median(memory) <= target.memory
        yield _verdict(f"memory relative to {name}", ok, f"<= {target.memory}x", f"{_spread(memory)}x")
    shares = [r.tokens_per_s / r.limit_tokens_per_s for r in ours if r.limit_tokens_per_s]
    if target.eta and shares:
        reached = median(shares)
        yield _verdict("eta", reached >= target.eta, f">= {target.eta}", f"{reached:.2f}")


def _verdict(what: str, met: bool, target: str, reached: str) -> str:
    return f"{'met' if met else 'MISSED'}: {what}, target {target}, reached {reached}"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _other_versions(records: list[Measurement], head: Measurement) -> list[str]:
    """A line for each library that is measured with other versions."""
    found = {r.job.library: r.versions for r in records}
    return [
        f"- {name}: {_versions({k: v for k, v in found[library].items() if head.versions.get(k) != v})}"
        for library, name in NAMES.items()
        if library in found and found[library] != head.versions
    ]


def _searches(records: list[Measurement]) -> list[str]:
    lines: list[str] = []
    for (workload, method), runs in _by_method(records, "search"):
        for r in runs:
            what = r.error or f"{r.tokens_per_s:,.0f} tokens/s, {r.above_bytes / 1e6:,.0f} MB"
            lines.append(f"- {workload} {method}: {NAMES[r.job.library]} ({r.job.setting}): {what}")
    return lines


def _by_method(records: list[Measurement], purpose: str) -> list[tuple[Key, list[Measurement]]]:
    chosen = [r for r in records if r.job.purpose == purpose]
    order = {(w.name, m.label): i for i, (w, m) in enumerate((w, m) for w in WORKLOADS.values() for m in w.methods)}
    libraries = list(NAMES)

    def key(r: Measurement) -> Key:
        return r.job.workload, r.job.method

    chosen.sort(key=lambda r: (order[key(r)], libraries.index(r.job.library), str(r.job.setting), r.job.round))
    return [(k, list(found)) for k, found in groupby(chosen, key)]


def _entries(runs: list[Measurement]) -> Entries:
    """The runs of each library and setting, round after round, without those that failed."""
    found: Entries = {}
    for r in runs:
        if not r.error:
            found.setdefault((r.job.library, str(r.job.setting)), []).append(r)
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings as the command line has them."""
    found: list[str] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [f"{name}={value}"]
    return found


def _ratios(ours: list[Measurement], peer: list[Measurement]) -> tuple[list[float], list[float]]:
    """Speed and memory, ours to the peer's, of each round that both finished."""
    theirs = {r.job.round: r for r in peer}
    pairs = [(r, theirs[r.job.round]) for r in ours if r.job.round in theirs]
    speed = [a.tokens_per_s / b.tokens_per_s for a, b in pairs]
    return speed, [a.above_bytes / max(b.above_bytes, 1) for a, b in pairs]


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
