"""Every method, at its default learning rate, through `siliang train` on real data. Long: `make test-long` runs it."""

from pathlib import Path
from typing import Any

import pytest

from siliang.config import RunConfig
from siliang.methods import METHODS
from siliang.run_folder import open_run
from siliang.train.run import train
from siliang.use.evaluate import evaluate

pytestmark = [pytest.mark.long, pytest.mark.shared, pytest.mark.filterwarnings("ignore:.*pin_memory.*")]
PROMPTS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 20},
    "p_tuning": {"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    "prefix_tuning": {"num_virtual_tokens": 20},
}


NEED_SETTINGS = ("trainable_tokens", "cpt", "xlora")


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("head", *NEED_SETTINGS)])
def test_classes(method: str, shared: Path, encoder: Path, tmp_path: Path) -> None:
    """A frozen encoder with an untrained head is right on half of SST-2's reviews."""
    sst2 = shared / "data" / "sst2"
    settings = {
        "model": str(encoder),
        "task": "seq_cls",
        "method": {"name": method, **PROMPTS.get(method, {})},
        "data": {
            "train": str(sst2 / "train.tsv"),
            "eval": str(sst2 / "dev.tsv"),
            "header": ["text", "label"],
            "max_length": 48,
        },
        "train": {"max_steps": 300, "batch_size": 16},
        "output": str(tmp_path / "run"),
    }
    record = train(RunConfig.build(settings))
    print(f"{method}: {record.final['accuracy']:.3f}")
    assert record.final["accuracy"] > 0.65


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("head", "bitfit", *NEED_SETTINGS)])
def test_text(method: str, shared: Path, tmp_path: Path) -> None:
    """Without BitFit: this Llama has no biases. The prefix starts from zero: at random it harms so small a model."""
    start = {"init_weights": "zero"} if method == "prefix_tuning" else {}
    settings = {
        "model": str(shared / "weights" / "stories260K"),
        "task": "causal_lm",
        "method": {"name": method, **PROMPTS.get(method, {}), **start},
        "data": {"train": str(shared / "data" / "instruct" / "alpaca_en_demo.json"), "max_length": 128},
        "train": {"max_steps": 200, "batch_size": 8},
        "output": str(tmp_path / "run"),
    }
    record = train(RunConfig.build(settings))
    print(f"{method}: held-out loss {record.final['eval_loss']:.3f}")
    if method == "full":
        assert record.final["eval_loss"] < 4.2
        return
    run = open_run(tmp_path / "run")
    with run.model.disable_adapter():
        base = evaluate(run)["loss"]
    assert evaluate(run)["loss"] < base - 0.2
