"""The bench itself: the gate lets nothing through that differs, missed targets are told, and it all runs."""

import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.environments import ENVIRONMENTS, wanted
from bench.gate import compare
from bench.methods_page import BEGIN, DOCS, END, RECORD, Line, read_lines, tables
from bench.methods_table import ENTRIES, chosen_rate, climb
from bench.predictions import by_length
from bench.record import Job, Measurement, Setting, read_records
from bench.settings import DEFAULT, chosen, search, trains
from bench.steps import set_start, start_sha256
from bench.table import render
from bench.unsloth_settings import variables_of
from bench.workloads import WORKLOADS
from siliang.methods import METHODS
from siliang.records import Device

ROOT = Path(__file__).resolve().parents[1]


def measurement(library: Any, purpose: Any = "gate", number: int = 0, **values: Any) -> Measurement:
    """A record of five steps that went well."""
    setting = Setting() if library == "siliang" else Setting(dtype="fp32", layout="padded")
    job = Job(
        workload="W1", method="lora", library=library, setting=setting, purpose=purpose, round=number, steps=4, warmup=1
    )
    usual: dict[str, Any] = {
        "precision": "fp32" if library == "siliang" else "",
        "trained": 10,
        "start_sha256": "a",
        "tokens": 400,
        "seconds": 2.0,
        "peak_bytes": 1_000_000,
        "losses": [5.0, 4.0, 3.0, 2.0, 1.0],
        "grad_norms": [1.0] * 5,
        "step_tokens": [100] * 5,
    }
    return Measurement(
        job=job,
        started_at="2026-01-01T00:00:00+00:00",
        command="python -m bench",
        device=Device(kind="cpu", name="a CPU", threads=2, memory_bytes=2**33),
        versions={},
        **(usual | values),
    )


def test_equal_runs_pass_the_gate() -> None:
    verdict = compare(measurement("siliang"), measurement("peft", losses=[5.0, 4.0, 3.0, 2.0, 1.009]))
    assert not verdict.problems
    assert verdict.difference == pytest.approx(0.009, rel=0.01)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"losses": [5.0, 4.0, 3.0, 2.0, 1.02]}, "losses differ by 1.96% in step 5"),
        ({"losses": [5.0, float("nan"), 3.0, 2.0, 1.0]}, "losses differ"),
        ({"losses": [5.0]}, "logged 1 losses in 5 steps"),
        ({"grad_norms": [1.0, 0.0, 1.0, 1.0, 1.0]}, "gradient norm of PEFT + Trainer is 0.0 in step 2"),
        ({"step_tokens": [100, 100, 90, 110, 100]}, "data order differs from step 3"),
        ({"start_sha256": "b"}, "weights differ before the first step"),
        ({"trained": 11}, "10 parameters are trained by us, 11 by the peer"),
        ({"error": "RuntimeError: no"}, "PEFT + Trainer gave no result: RuntimeError: no"),
    ],
)
def test_the_gate_says_what_differs(values: dict[str, Any], words: str) -> None:
    assert words in str(compare(measurement("siliang"), measurement("peft", **values)))


def test_a_record_keeps_what_is_no_number(tmp_path: Path) -> None:
    measurement("peft", losses=[float("nan")] * 5).write(tmp_path)
    (again,) = read_records(tmp_path)
    assert all(math.isnan(x) for x in again.losses)


def test_a_missed_target_is_told() -> None:
    records = [measurement("siliang"), measurement("peft")]
    for number, ours in enumerate((7.0, 5.0, 6.0), start=1):
        records.append(measurement("siliang", "time", number, tokens=800, seconds=ours, limit_tokens_per_s=150.0))
        records.append(measurement("peft", "time", number, tokens=800, seconds=15.0, peak_bytes=3_000_000))
    text = render(records)
    assert "MISSED: speed relative to PEFT + Trainer (fp32, padded), target >= 3.0x, reached 2.50 [2.14, 3.00]x" in text
    assert "met: memory relative to PEFT + Trainer (fp32, padded), target <= 0.4x, reached 0.33 [0.33, 0.33]x" in text
    assert "met: eta, target >= 0.8, reached 0.89" in text


def test_the_seconds_of_rows_are_those_of_a_whole_process() -> None:
    values = {"before_s": 10.0, "warmup_s": 7.5, "imports_s": 6.0, "seconds": 2.0}  # 4 steps of 0.5 s, after one
    record = measurement("peft", "time", 1, **values)
    assert record.seconds_of_rows(1_000, 8) == (10.0 + 7.0 + 125 * 0.5, 125 * 0.5)
    with_first_pass = record.model_copy(update={"first_pass_s": 1.0})  # a quarter of a second for each of 5 steps
    assert with_first_pass.seconds_of_rows(1_000, 8) == (10.0 - 1.25 + 7.0 + 125 * 0.75, 125 * 0.75)
    assert "| 80 | 21% |" in render([measurement("siliang", "time", 1), record])


def test_the_best_setting_is_found_part_by_part() -> None:
    speeds = {"fp32, grouped": 3.0, "bf16 storage, grouped": 4.0, "bf16 storage, padded": 2.0}
    speeds |= {"bf16 storage, grouped, compiled": 5.0}
    seen: list[str] = []

    def speed(setting: Setting) -> float | None:
        seen.append(str(setting))
        return speeds[str(setting)]

    tried = search("unsloth", WORKLOADS["W1"], speed, bf16=False)
    assert seen == list(speeds)
    assert chosen(WORKLOADS["W1"], tried, ["unsloth"]) == [
        *(("unsloth", setting) for *_, setting in tried[:2]),
        ("unsloth", DEFAULT),
    ]
    assert str(tried[0][2]) == "bf16 storage, grouped, compiled"
    assert Setting.parse(str(tried[0][2])) == tried[0][2]


def test_a_library_is_measured_on_the_methods_that_it_has() -> None:
    labels = {(w, m.label) for w in ("W2", "W4") for m in WORKLOADS[w].methods if trains("unsloth", m)}
    assert labels == {("W2", "lora"), ("W4", "qlora")}
    assert all(trains("peft", m) for w in WORKLOADS.values() for m in w.methods)
    assert not trains("swift", WORKLOADS["W4"].method("qlora"))


def test_a_peer_of_its_own_environment_is_given_its_settings() -> None:
    job = measurement("unsloth").job.model_copy(update={"setting": Setting.parse("bf16 storage, grouped, compiled")})
    found = variables_of(job, native_bf16=False)
    assert (found["UNSLOTH_CPU_FROZEN_BF16"], found["UNSLOTH_CPU_COMPILE"], found["UNSLOTH_CPU_BF16"]) == (
        "1",
        "1",
        "0",
    )
    requirements = wanted(ENVIRONMENTS["unsloth"])
    assert requirements[0] == "torch==2.13.0"  # another would be a download of gigabytes
    assert [r for r in requirements if r.startswith("transformers")] == ["transformers==5.17.0"]


def test_the_start_depends_on_names_alone() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    first, second = Adapter(), nn.Module()
    second.base_model = nn.Module()
    second.base_model.model = Adapter()
    for model in (first, second):
        set_start(model)
    assert start_sha256(first) == start_sha256(second)
    assert first.lora_A.weight.std() > 0
    assert torch.count_nonzero(first.lora_B.weight) == 0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_every_method_runs_beside_peft(tmp_path: Path) -> None:
    done = run("--smoke", "--peers", "peft", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    pairs = sum(len(WORKLOADS[name].methods) for name in ("W1", "W2", "W3", "W4", "W6"))
    assert f"gate: {pairs} passed" in done.stdout
    assert (tmp_path / "README.md").read_text(encoding="utf-8").strip() in done.stdout


@pytest.mark.slow
def test_pairs_run_beside_trl_and_a_stopped_bench_goes_on(tmp_path: Path) -> None:
    pinned = ("--only", "W7", "W6", "--peers", "trl", "--pin", "trl: fp32, grouped, reference first")
    done = run("--smoke", *pinned, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gate: 3 passed" in done.stdout  # of pairs one, and of rows that are padded and laid end to end
    timed = [r for r in read_records(tmp_path / "records") if r.job.purpose == "time"]
    assert {r.job.library: r.first_pass_s > 0 for r in timed} == {"siliang": False, "trl": True}
    again = run("--smoke", *pinned, "--output", str(tmp_path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("(kept)") == 7


@pytest.mark.slow
def test_a_run_that_differs_fails_the_gate(tmp_path: Path) -> None:
    settings = ("--only", "W3", "--methods", "lora", "--parts", "gate", "--set", "train.learning_rate=0.1")
    done = run("--smoke", "--peers", "peft", *settings, "--output", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the losses differ by" in done.stdout
    assert "gate: 1 of 1 comparisons FAILED" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_there_is_one_line() -> None:
    done = run("--gpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["bench: W5 needs a CUDA device, and there is none here: nothing was measured."]


def test_the_tables_of_the_methods_are_those_of_the_record() -> None:
    page = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert page == tables(read_lines(RECORD), [entry.label for entry in ENTRIES])


def test_every_method_is_in_the_tables() -> None:
    assert {entry.method for entry in ENTRIES} == set(METHODS)


@pytest.mark.parametrize(("best", "asked"), [(0, [0, 1, -1]), (2, [0, 1, 2, 3]), (-2, [0, 1, -1, -2, -3])])
def test_the_search_ends_where_both_neighbours_are_worse(best: int, asked: list[int]) -> None:
    seen: list[int] = []

    @cache
    def loss(k: int) -> float:
        seen.append(k)
        return abs(k - best)

    climb(loss, 0)
    assert seen == asked


def test_a_run_that_fails_is_not_chosen() -> None:
    lines = [Line("search", "text", "lora", 1e-2, 42, error="not finite")]
    lines += [
        Line("search", "text", "lora", rate, 42, {"eval_loss": loss}) for rate, loss in ((1e-3, 3.0), (3e-3, 2.0))
    ]
    lines += [Line("search", "text", "lora", 3e-2, 42, {"eval_loss": math.nan})]
    assert chosen_rate(lines, "text", "lora") == 3e-3


def test_texts_sorted_by_length_are_answered_in_their_order() -> None:
    seen: list[list[str]] = []
    found = by_length(["bb", "a", "cccc"], lambda texts: seen.append(texts) or [text.upper() for text in texts])
    assert seen == [["cccc", "bb", "a"]] and found == ["BB", "A", "CCCC"]
