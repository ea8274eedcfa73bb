"""`python -m faults.folders`: the cases one by one, to debug one."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from faults.folders.bases import make_bases
from faults.folders.grammar import make_cases
from faults.folders.sandbox import Case, Outcome, try_cases
from faults.folders.trial import BATCH, BY_HAND, Tried


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.folders", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(BY_HAND), default=list(BY_HAND), help="some kinds")
    parser.add_argument("--name", nargs="*", default=[], help="cases whose names hold one of these words")
    parser.add_argument("--made", type=int, default=0, help="so many cases of the grammar, in place of those by hand")
    parser.add_argument("--seed", type=int, default=6, help="of the grammar's")
    parser.add_argument("--lanes", type=int, default=1, help="processes at a time")
    parser.add_argument("--bases", type=Path, help="where the good folders are kept between two calls")
    parser.add_argument("--all", action="store_true", help="those that pass too")
    given = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore")
    by_hand = [case for kind in given.only for case in BY_HAND[kind]]
    cases = make_cases(given.made, given.seed) if given.made else by_hand
    cases = [case for case in cases if not given.name or any(word in case.name for word in given.name)]
    tried = Tried()

    def found(number: int, case: Case, outcome: Outcome) -> None:
        tried.take(case, outcome)
        if outcome.faults or given.all:
            print(f"{'FAILED' if outcome.faults else outcome.ending} {case.kind}: {case.name}", flush=True)
            print("".join(f"    {' '.join(fault.split())[:600]}\n" for fault in outcome.faults[:6]), end="", flush=True)
        if given.all and given.name:
            print(outcome.text)

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="siliang-folders-") as folder:
        bases = given.bases or Path(folder) / "bases"
        make_bases(bases)
        inner = Path(folder) / "cases"
        inner.mkdir()
        try_cases(cases, inner, bases, found, lanes=given.lanes, batch=BATCH if given.made else 1)
    for kind, (n, failed) in tried.by_kind().items():
        print(f"{kind}: {n} cases, {failed} failed")
    print(
        f"{tried.cases} cases in {time.perf_counter() - started:.0f} s; the slowest {tried.slowest[0]:.1f} s ", end=""
    )
    print(f"({tried.slowest[1]}), the largest {tried.largest[0] / 1e6:,.0f} MB ({tried.largest[1]})")
    return 0 if tried.passed else 1


if __name__ == "__main__":
    sys.exit(main())
