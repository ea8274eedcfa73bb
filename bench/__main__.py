"""siliang against PEFT + transformers.Trainer and TRL, on the same model, data and steps, in turn.

python -m bench [--only W1 W3] [--rounds 3]      W1 to W4, W6 and W7, on the CPU; goes on where it was stopped
python -m bench --gpu                            W5, on the CUDA device that is there
python -m bench --only W6 --pin "peft: bf16 weights, grouped"      with settings that are known, without a search
python -m bench --smoke                          everything at tiny sizes: does it run, do the losses agree
python -m bench --table docs/benchmarks/...      the table again, from its records

Start it from the folder of the repository, where bench/ is.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from bench.workloads import ON_CPU, ON_CUDA, WORKLOADS, Library
from siliang.config import RunConfig, assign

if TYPE_CHECKING:  # asks torch for devices
    from bench.record import Setting


OWN: tuple[Library, ...] = ("unsloth", "swift")  # peers that have environments of their own


def main() -> int:
    """Runs the bench; returns 1 where the gate failed."""
    options = _options()
    if options.table:
        report(options.table)
        return 0
    if not options.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the others are the CPU's; set before anything asks torch for devices
    from bench.rounds import Bench, Plan, why_missing
    from bench.rows import SHARED
    from siliang.hardware import find_device

    if options.gpu and find_device().type != "cuda":
        print("bench: W5 needs a CUDA device, and there is none here: nothing was measured.")
        return 0
    names = options.only or (ON_CUDA if options.gpu else ON_CPU)
    if not options.smoke and not SHARED.is_dir():
        print(f"bench: the data of the workloads is not at {SHARED}. --smoke needs none.", file=sys.stderr)
        return 2
    peers: list[Library] = options.peers or (["peft", "trl"] if options.smoke else ["peft", "trl", "unsloth"])
    for peer in peers:
        if reason := why_missing(peer):
            print(f"bench: {peer} is left out: {reason}")
    extra: dict[str, Any] = {}
    for assignment in options.set:
        assign(extra, assignment, RunConfig)
    plan = Plan(
        rounds=options.rounds,
        steps=options.steps,
        gate_steps=options.gate_steps,
        peers=tuple(peers),
        pinned=dict(options.pin),
        again=options.again,
        all_settings=options.all_settings,
        parts=tuple(options.parts),
        extra=extra,
    )
    if options.smoke:
        plan.smoke, plan.searched = True, names[:1]
        plan.rounds, plan.gate_steps = 1, 5
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or (Path(scratch) if options.smoke else default_folder())
        bench = Bench(plan, folder / "records", lambda line: print(line, flush=True))
        try:
            for name in names:
                bench.run(WORKLOADS[name], options.methods)
        finally:
            bench.close()
        return report(folder)


def report(folder: Path) -> int:
    """Writes and prints the table of a folder's records; returns 1 where the gate failed."""
    from bench.record import read_records
    from bench.table import gates, render

    records = read_records(folder / "records")
    if not records:
        print(f"bench: there are no records in {folder / 'records'}.", file=sys.stderr)
        return 2
    text = render(records)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    verdicts = gates(records)
    failed = sum(not passed for passed, _ in verdicts)
    print(f"gate: {failed} of {len(verdicts)} comparisons FAILED" if failed else f"gate: {len(verdicts)} passed")
    return 1 if failed or not verdicts else 0


def slug(text: str) -> str:
    """A text as a part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def default_folder() -> Path:
    """docs/benchmarks/<date>-<processor and its instructions, or card>."""
    from bench.record import instructions
    from siliang.hardware import describe_device, find_device

    device = describe_device(find_device())
    name = slug(device.name)
    name += f"-{device.threads}-threads-{slug(instructions().partition(' (')[0])}" if device.kind == "cpu" else ""
    return Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / f"{datetime.now(UTC):%Y-%m-%d}-{name}"


def _pin(text: str) -> tuple[Library, Setting]:
    """A peer and its setting, as the report prints it: "unsloth: fp32, grouped, compiled"."""
    from bench.record import Setting

    name, _, setting = text.partition(":")
    libraries: tuple[Library, ...] = get_args(Library)
    if name not in libraries:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(libraries)}")
    try:
        return libraries[libraries.index(name)], Setting.parse(setting)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not PEER: FORMAT, LAYOUT[, OPTION]: {error}") from None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=WORKLOADS,
        metavar="W",
        help=f"of {', '.join(WORKLOADS)}; default: all of the device",
    )
    parser.add_argument("--methods", nargs="+", metavar="M", help="only these of the workloads' methods")
    parser.add_argument("--peers", nargs="+", choices=("peft", "trl", *OWN), help="default: peft trl unsloth")
    parser.add_argument(
        "--pin", action="append", type=_pin, default=[], metavar="PEER: SETTING", help="no search for this peer"
    )
    parser.add_argument("--again", action="store_true", help="also what has been measured already")
    parser.add_argument("--rounds", type=int, default=2, help="default: 2")
    parser.add_argument("--steps", type=int, help="timed steps of a run, after 3 of warm-up; the workload's by default")
    parser.add_argument("--gate-steps", type=int, default=50, help="steps whose losses are compared; default: 50")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("time", "gate"),
        default=["time", "gate"],
        help="the gate needs no idle machine; default: both",
    )
    parser.add_argument("--all-settings", action="store_true", help="try bf16 even where the hardware imitates it")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, no targets")
    parser.add_argument("--gpu", action="store_true", help="the workload for CUDA")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of siliang's runs")
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks/<date>-<device>")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="only make the table again")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
