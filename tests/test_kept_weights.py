"""Frozen weights that stay in the format of their file: the same bits everywhere as with converted ones."""

from __future__ import annotations

import copy
import gc
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import every_task
import pytest
import ranked
import torch
from every_task import TASKS, make_models
from safetensors.torch import load_file, save_file
from test_methods_everywhere import EVERY, configured, losses_of, saved, some_of
from torch import Tensor, UntypedStorage, nn
from torch.nn.functional import linear

from faults.runs import Place, make_place
from siliang.cli.show_plan import headline
from siliang.compare.base import CachedBase
from siliang.config import RunConfig
from siliang.hardware import Choice
from siliang.models.load import load_model
from siliang.ops import stored
from siliang.ops.stored import StoredWeight, as_kept, plain
from siliang.plan import Device, plan
from siliang.plan.preflight import Planner
from siliang.records import Record
from siliang.run_folder.kept_format import stored_format
from siliang.tasks import CAUSAL_LM
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.types import Listener, Run
from siliang.types import InterruptedRunError

PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")
OFTEN = ("lora", "loha", "oft", "osf", "vera", "prefix_tuning")  # the others run in `make test-long` alone


@pytest.fixture(autouse=True)
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the matrices of tiny models are kept, too."""
    monkeypatch.setattr(stored, "LEAST_NUMBERS", 1)


@pytest.fixture(scope="module")
def half(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models in bf16."""
    return {name: in_half(folder, tmp_path_factory.mktemp("half") / name) for name, folder in model_folders.items()}


def in_half(folder: Path, to: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A copy of a model with weights in half precision."""
    if not to.is_dir():
        to.mkdir()
        for file in folder.iterdir():
            (to / file.name).write_bytes(file.read_bytes())
        weights = {key: t.to(dtype) for key, t in load_file(folder / "model.safetensors").items()}
        save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def kept(model: nn.Module) -> int:
    return sum(isinstance(p, StoredWeight) for p in model.parameters())


def trained(config: RunConfig) -> tuple[int, list[float], bytes]:
    """The number of kept weights, the losses, and the adapter's file."""
    counts: list[int] = []

    def count(run: Run) -> None:
        counts.append(kept(run.model))

    record = train(config, Listener(trained=count))
    return counts[0], losses_of(record), saved(Path(config.output))


def both_ways(config: RunConfig, folder: Path) -> None:
    """Trains with kept weights and with converted ones."""
    values = config.model_dump(mode="json")
    converted = RunConfig.build(
        values | {"train": values["train"] | {"frozen_weights": "converted"}, "output": str(folder / "converted")}
    )
    number, *found = trained(RunConfig.build(values | {"output": str(folder / "kept")}))
    none, *expected = trained(converted)
    assert number > 0 and none == 0
    assert found == expected


@pytest.mark.parametrize("method", [*some_of(EVERY, OFTEN), *some_of(PROMPTS, OFTEN)])
def test_every_method_learns_the_same(
    method: str, half: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    both_ways(configured(half, instruction_file, tmp_path, method), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        pytest.param({"init_lora_weights": "olora"}, marks=pytest.mark.long),
        pytest.param({"init_lora_weights": "orthogonal"}, marks=pytest.mark.long),
        pytest.param({"init_lora_weights": "mica"}, marks=pytest.mark.long),
        pytest.param({"init_lora_weights": "eva", "eva_config": {"use_label_mask": False}}, marks=pytest.mark.long),
        pytest.param({"init_lora_weights": "corda"}, marks=pytest.mark.long),
        {"init_lora_weights": "lora_ga"},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"trainable_token_indices": [8, 10]},
    ],
    ids=str,
)
def test_every_start_of_lora(
    settings: dict[str, Any], half: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    config = configured(half, instruction_file, tmp_path, "lora")
    values = config.model_dump(mode="json") | {"method": {"name": "lora", "r": 4, **settings}}
    both_ways(RunConfig.build(values), tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["bitfit", "head"])
def test_matrices_beside_trained_biases(
    method: str, precision: str, half: dict[str, Path], review_file: Path, tmp_path: Path
) -> None:
    """Their weights are loaded in fp32 also where they compute in bf16, which then takes the numbers of the file."""
    both_ways(configured(half, review_file, tmp_path, method, base="bert", precision=precision), tmp_path)


@pytest.mark.parametrize("task", some_of(TASKS, ("seq_cls", "preference", "seq_2_seq_lm")))
def test_every_task(task: str, models: dict[str, Path], tmp_path: Path) -> None:
    both_ways(every_task.configured(task, models, tmp_path, log_every=1), tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each task, in fp16."""
    folder = tmp_path_factory.mktemp("tasks")
    made = make_models(folder)
    return {task: in_half(path, folder / f"half-{path.name}", torch.float16) for task, path in made.items()}


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"packing": False}, {"label_smoothing": 0.1}])
def test_other_ways_of_a_step(
    settings: dict[str, Any], half: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    both_ways(configured(half, instruction_file, tmp_path, "lora", **settings), tmp_path)


def test_stopped_and_resumed(half: dict[str, Path], instruction_file: Path, tmp_path: Path) -> None:
    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step == 2 and not stopped:  # a second signal would not wait for the checkpoint
            stopped.append(2)
            signal.raise_signal(signal.SIGTERM)

    _, *whole = trained(configured(half, instruction_file, tmp_path / "whole", "lora"))
    config = configured(half, instruction_file, tmp_path / "run", "lora")
    with pytest.raises(InterruptedRunError):
        train(config, Listener(progress=stop))
    assert [losses_of(train(config, resume=True)), saved(tmp_path / "run")] == whole


def test_two_ranks_learn_as_one(tmp_path: Path) -> None:
    place = make_place(tmp_path, dropout=0.0)
    place = Place(in_half(place.model, tmp_path / "half"), place.data)
    one = ranked.configured(place, tmp_path / "one")
    assert trained(one)[0] > 0
    endings = ranked.train_on(ranked.changed(one, tmp_path / "two"), 2)
    assert [e.code for e in endings] == [0, 0], endings[0].output
    ranked.assert_same(tmp_path / "one", tmp_path / "two")


def test_a_comparison_uses_the_base_again(half: dict[str, Path], instruction_file: Path, tmp_path: Path) -> None:
    base, models = CachedBase(), list[Any]()
    for name in ("lora", "ia3", "vera"):
        config = configured(half, instruction_file, tmp_path / name, name)
        train(config, Listener(trained=lambda run: models.append(run.model)), base=base)
        base.store(models.pop(), config)
        assert base.loads == 1
    train(configured(half, instruction_file, tmp_path / "bitfit", "full"), base=base)  # trains the weights: in fp32
    assert base.loads == 2


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"precision": "bf16"}, "they are computed in their own format"),
        ({"frozen_weights": "converted"}, "the settings say so"),
        ({"method": "full"}, "they are trained"),
    ],
)
def test_where_nothing_is_kept(
    settings: dict[str, Any], why: str, half: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    config = configured(half, instruction_file, tmp_path, settings.pop("method", "lora"))
    values = config.model_dump(mode="json")
    counts: list[int] = []
    values["train"] |= settings
    train(RunConfig.build(values), Listener(trained=lambda run: counts.append(kept(run.model))))
    assert counts == [0], why


def test_what_is_kept_is_said_planned_and_recorded(
    half: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    counts, lines, planner = list[int](), list[str](), Planner()
    config = configured(half, instruction_file, tmp_path / "run", "lora")
    record = train(config, Listener(lines.append, trained=lambda run: counts.append(kept(run.model))), planner=planner)
    found = record.memory.kept_weights
    assert found == Record.read(tmp_path / "run").memory.kept_weights
    assert planner.last_plan is not None and planner.last_plan.kept_weights == found
    assert found is not None and (found.format, found.matrices) == ("bf16", counts[0])
    weights = load_file(half["llama"] / "model.safetensors")
    assert found.saved_bytes == 2 * sum(w.numel() for w in weights.values() if w.dim() == 2)
    said = f"weights    {counts[0]} frozen matrices stay in bf16, as in the model's files: "
    assert sum(line.startswith(said) for line in lines) == 1
    device = Device("cpu", None, "unknown", Choice("fp32", "as asked"), 0, 0, here=False)
    planned = plan(config, device, methods=["lora", "full"], timed=False)
    assert any(line.startswith(said) and line.endswith("; not with full") for line in headline(planned))


def test_the_format_is_that_of_all_large_matrices(model_folders: dict[str, Path], tmp_path: Path) -> None:
    assert stored_format(str(model_folders["llama"])) is None
    assert stored_format(str(in_half(model_folders["llama"], tmp_path / "bf16"))) is torch.bfloat16
    fp16 = in_half(model_folders["llama"], tmp_path / "fp16", torch.float16)
    assert stored_format(str(fp16)) is torch.float16
    weights = load_file(fp16 / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"].float()}, fp16 / "model.safetensors")
    assert stored_format(str(fp16)) is None
    assert stored_format("no/such-model") is None


def test_a_kept_model_is_the_converted_one(half: dict[str, Path]) -> None:
    load = lambda kept: load_model(str(half["llama"]), CAUSAL_LM.model, dtype=torch.float32, kept=kept)  # noqa: E731
    model, converted = load(torch.bfloat16), load(None)
    assert kept(model) > 0 and kept(converted) == 0
    for (name, p), q in zip(model.named_parameters(), converted.parameters(), strict=True):
        assert p.dtype is torch.float32 and torch.equal(plain(p), q), name
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids).logits, converted(ids).logits)
    copied = copy.deepcopy(model)  # a copy may be trained
    assert kept(copied) == 0 and torch.equal(copied(ids).logits, converted(ids).logits)


def test_products_and_their_gradients() -> None:
    torch.manual_seed(0)
    W = torch.randn(7, 5).half()
    kept, wide = nn.Parameter(StoredWeight(W), requires_grad=False), W.float()
    x = torch.randn(2, 3, 5, requires_grad=True)
    for f in (linear, lambda x, w: x @ w.T, lambda x, w: x @ w[1:4].T, lambda x, w: x * w[1]):
        found, expected = f(x, kept), f(x, wide)
        assert torch.equal(found, expected) and type(found) is torch.Tensor
        for a, b in zip(*(torch.autograd.grad(out.sum(), x) for out in (found, expected)), strict=True):
            assert torch.equal(a, b)


def test_the_memory_is_about_half(half: dict[str, Path]) -> None:
    """Of all weights, the small vectors included, which are converted; nothing else holds a converted matrix."""

    def live_bytes(kept: torch.dtype | None) -> int:
        def storages() -> dict[int, UntypedStorage]:
            every = (as_kept(x).untyped_storage() for x in gc.get_objects() if issubclass(type(x), Tensor))
            return {storage._cdata: storage for storage in every}

        gc.collect()
        before = storages()  # which stay, so that no new one has the address of one of them
        model = load_model(str(half["llama"]), CAUSAL_LM.model, dtype=torch.float32, kept=kept)
        model(torch.arange(12).view(2, 6))
        gc.collect()
        return sum(storage.nbytes() for key, storage in storages().items() if key not in before)

    found, converted = live_bytes(torch.bfloat16), live_bytes(None)
    assert 0.5 <= found / converted < 0.55


@pytest.mark.parametrize("inference", [False, True])
def test_conversions_of_a_kept_weight(inference: bool) -> None:
    """In inference mode `to` reaches the weight as one operator, which looks like a view."""
    kept = StoredWeight(torch.randn(4, 4).bfloat16())
    wide = plain(kept)
    with torch.inference_mode(inference):
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
            for found in (kept.to(dtype), kept.to(torch.ones(1, dtype=dtype)), kept.type(dtype)):
                assert found.dtype is dtype and torch.equal(plain(found), wide.to(dtype))


def test_a_kept_weight_has_no_memory_of_fp32(half: dict[str, Path], tmp_path: Path) -> None:
    """Its bits and its address would be others; libraries take weights at one address for tied."""
    kept = StoredWeight(torch.randn(4, 4).bfloat16())
    refused = partial(pytest.raises, RuntimeError, match=r"kept as its file has it, in torch\.bfloat16\.\nTake a copy")
    for ask in (lambda: kept.view(torch.int32), lambda: kept.view(torch.bfloat16), kept.data_ptr):
        with refused():
            ask()
    model = load_model(str(half["llama"]), CAUSAL_LM.model, dtype=torch.float32, kept=torch.bfloat16)
    for save in (model.save_pretrained, lambda to: save_file(dict(model.state_dict()), to / "model.safetensors")):
        with refused():  # and not a file without these weights
            save(tmp_path)
        assert not list(tmp_path.glob("*.safetensors"))
    copy.deepcopy(model).save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(found[name], plain(p)), name


def test_tied_weights_stay_tied(model_folders: dict[str, Path], tmp_path: Path) -> None:
    tied = in_half(model_folders["llama"], tmp_path / "tied")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(tied / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    model = load_model(str(tied), CAUSAL_LM.model, dtype=torch.float32, kept=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight and isinstance(model.lm_head.weight, StoredWeight)
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() == weights.keys()


def test_nothing_writes_into_a_kept_weight() -> None:
    kept = StoredWeight(torch.ones(4, 4).bfloat16())
    for write in (kept.zero_, lambda: kept.copy_(torch.ones(4, 4)), lambda: kept[0].fill_(2.0), lambda: kept.mul_(2)):
        with pytest.raises(RuntimeError, match="would write into"):
            write()
