"""siliang demo: the methods side by side on the embedded default."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from siliang.record import Record


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the runs; a number is added where it exists.")] = Path(
        "siliang-demo"
    ),
) -> None:
    """Train LoRA against full fine-tuning and a frozen encoder on reviews that come along: 3 minutes, no network."""
    from siliang.cli.show import TrainingDisplay, duration, quiet_loading
    from siliang.demo import NAMES, SAMPLES, SETTINGS, TEST, TRAIN, demo_config, encoder_folder

    quiet_loading()
    encoder_folder()
    from siliang.run_folder import open_run
    from siliang.train.run import Listener, train
    from siliang.use import predict

    started = time.perf_counter()
    folder = _fresh(output)
    n_train, n_test = (len(path.read_text(encoding="utf-8").splitlines()) for path in (TRAIN, TEST))
    print(f"Is a review positive or negative? {n_train} reviews to learn from, {n_test} to be tested on.")
    print("Base model: all-MiniLM-L6-v2, an encoder of 22.7 million parameters.\n")
    records: dict[str, Record] = {}
    for method in SETTINGS:
        print(f"{NAMES[method]} ...", flush=True)
        with TrainingDisplay() as display:
            records[method] = train(demo_config(method, folder / method), Listener(progress=display.progress))
    print(f"\n{'':<24}{'accuracy':>9}{'trained parameters':>20}{'seconds':>9}{'peak memory':>13}{'saved':>9}")
    for method, record in records.items():
        _row(NAMES[method], record)
    print("\nLoRA before and after training:")
    run = open_run(folder / "lora")
    with run.model.disable_adapter():  # the base model with its new head, untrained
        before = list(predict(run, SAMPLES))
    for was, now in zip(before, predict(run, SAMPLES), strict=True):
        print(f"  {was.label} {was.probability:.2f} -> {now.label} {now.probability:.2f}   {now.text}")
    print(f"\n{duration(time.perf_counter() - started)} in all. The runs are in {folder}; try one on your own words:")
    print(f'  {_command()} predict {folder / "lora"} "Not what I paid for."')
    print("and the same on your own data:")
    print(f"  {_command()} train --model MODEL_FOLDER --data reviews.csv --task seq_cls --method lora --output my-run")


def _row(name: str, record: Record) -> None:
    from siliang.cli.show import size

    print(
        f"{name:<24}{100 * record.final['accuracy']:>8.1f}%{record.parameters.trained:>20,}{record.seconds.train:>9.0f}"
        f"{size(record.memory.peak_bytes - record.memory.loaded_bytes):>13}{size(record.parameters.adapter_bytes):>9}"
    )


def _fresh(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist: nothing is overwritten."""
    for name in (folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000))):
        if not name.exists():
            return name
    raise AssertionError("ten thousand demos")


def _command() -> str:
    """How the user can call siliang from here: by name, or through the .venv that make made."""
    import shutil

    return "siliang" if shutil.which("siliang") else ".venv/bin/siliang"
