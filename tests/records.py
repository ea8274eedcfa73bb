"""Hand-written records of runs and comparisons: no model is trained for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from siliang.config import RunConfig
from siliang.config.comparison import CompareConfig
from siliang.methods import METHODS
from siliang.records import (
    Answer,
    Answers,
    Comparison,
    Counts,
    Device,
    Memory,
    Record,
    Rows,
    Seconds,
    StepMetrics,
    Trial,
    metrics_of,
)

MB = 1_000_000
EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


def settings(method: str, seed: int) -> dict[str, Any]:
    """The settings of a run of `record`."""
    known = method if method in METHODS else "lora"
    data = {"train": "reviews.csv", "test_size": 0.2, "seed": 1}
    values = {"model": "base", "task": "seq_cls", "data": data, "output": "out"}
    return RunConfig.build(values | {"method": known, "train": {"seed": seed}}).model_dump(mode="json")


def record(score: float, *, trained: int, memory: int, seed: int, method: str, seconds: float = 60.0) -> Record:
    """A finished run of a classifier of a million parameters."""
    return Record(
        status="completed",
        started_at="2026-01-01T00:00:00+00:00",
        config=settings(method, seed),
        seed=seed,
        versions={"siliang": "0.1.0"},
        device=Device(kind="cpu", name="a CPU", threads=2, memory_bytes=2**33),
        precision="fp32",
        learning_rate=1e-3,
        model_sha256="0" * 64,
        data_sha256="1" * 64,
        labels=["bad", "good"],
        parameters=Counts(trained=trained, total=max(1_000_000, trained), adapter_bytes=4 * trained),
        rows=Rows(train=80, eval=20),
        seconds=Seconds(train=seconds, steps=seconds / 2, eval=2.0),
        tokens_trained=6000,
        memory=Memory(
            loaded_bytes=100 * MB, steps_bytes=memory * MB, peak_bytes=memory * MB, predicted_bytes=abs(memory - 5) * MB
        ),
        steps=[StepMetrics(step=s, epoch=s / 10, loss=1 / s) for s in (10, 20, 30)],
        final={"accuracy": score, "eval_loss": 1 - score, "f1": score},
    )


def comparison(folder: Path, scores: dict[str, tuple[list[float], int, int]], **answers: list[str]) -> Path:
    """A comparison's folder: for each method its scores by seed, trained parameters and memory in MB."""
    trials = []
    for method, (found, trained, memory) in scores.items():
        for seed, score in enumerate(found):
            run = folder / "runs" / method / f"seed-{seed}"
            run.mkdir(parents=True)
            written = record(score, trained=trained, memory=memory, seed=seed, method=method)
            written.write(run)
            given = answers.get(method, ["bad", "good", "good"])
            rows = [
                Answer(
                    where=f"reviews.csv:{i}",
                    input=f"{EVIL} {i}",
                    expected=right,
                    predicted=said,
                    correct=right == said,
                    probability=0.9,
                )
                for i, (right, said) in enumerate(zip(["bad", "good", "bad"], given, strict=True))
            ]
            said = Answers(prompts=[Answer(input="was it?", predicted=EVIL)], rows=rows, majority=0.6, classes=2)
            said.save(run / "answers.json")
            trials.append(
                Trial(
                    method=method,
                    seed=seed,
                    purpose="test",
                    folder=str(run.relative_to(folder)),
                    status="completed",
                    metrics=metrics_of(written),
                )
            )
    trials.append(
        Trial(method="gone", seed=0, purpose="test", folder="runs/gone", status="failed", error=f"no room {EVIL}")
    )
    given = {
        "model": "base",
        "task": "seq_cls",
        "data": {"train": "reviews.csv", "test_size": 0.2, "seed": 1},
        "methods": [{"name": m if m in METHODS else "lora", "label": m} for m in [*scores, "gone"]],
        "prompts": [EVIL],
        "output": "out",
    }
    Comparison(
        status="completed",
        started_at="2026-01-01T00:00:00+00:00",
        config=CompareConfig.build(given).as_dict(),
        given=given,
        trials=trials,
    ).save(folder / "comparison.json")
    return folder


SCORES = {
    "full": ([0.90, 0.92, 0.91], 1_000_000, 900),
    "lora": ([0.89, 0.90, 0.91], 10_000, 400),
    "ia3": ([0.87, 0.88, 0.86], 1_000, 395),
    "wide": ([0.80, 0.81, 0.82], 50_000, 800),
    "stuck": ([0.60, 0.60, 0.60], 2_000, 300),
}
