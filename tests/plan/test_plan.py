"""siliang plan as its user meets it, and the plan in front of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import refused, run
from transformers import AutoConfig

import siliang.plan.methods
from siliang.config import RunConfig
from siliang.data.collate import PadCollator
from siliang.distributed.sharding import fake_mesh
from siliang.engine.batches import StepCollator
from siliang.engine.budget import AUTO_SHARE, trained_bytes_to_come
from siliang.hardware import Choice
from siliang.methods import METHODS
from siliang.models.weights import PIECE_BYTES
from siliang.plan import FakeRun, history, model_config, plan, target_device
from siliang.plan.device import Device
from siliang.plan.fit import MemoryLimit, estimate_recomputing, recomputed_layers
from siliang.plan.preflight import Planner, apply_plan, with_changes
from siliang.plan.rows import heaviest_step, order, synthetic_rows
from siliang.plan.shapes import shape_name
from siliang.records import Change, MethodPlan
from siliang.tasks import SEQ_2_SEQ_LM, SEQ_CLS
from siliang.train.loop import Training
from siliang.train.prepare import prepare
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import ConfigError, ModelError, PlanError

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def run_siliang(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "siliang", *arguments], capture_output=True, text=True, env=ENV)


FP32 = Choice("fp32", "as asked")


def target(memory_bytes: int | None) -> Device:
    return Device("cpu", memory_bytes, "as asked", FP32, 0, 0, here=True)


def test_all_methods_in_a_table(tmp_path: Path) -> None:
    """Of a layer as wide as the defaults of all methods need it."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 256}
    AutoConfig.for_model("bert", **sizes, vocab_size=120).save_pretrained(tmp_path)
    flags = ("--task", "seq_cls", "--device", "cuda", "--memory", "3GB", "--flops", "20e12")
    done = run_siliang("plan", "--model", str(tmp_path), *flags)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    wanted = {name for name, m in METHODS.items() if not (m.is_baseline or m.needs_settings)} | {"full"}
    assert wanted - rows == {"adaption_prompt"} and "adaption_prompt: LLaMA-Adapter knows" in done.stdout
    assert "20,000 GFLOP/s as asked" in done.stdout


def test_a_shape_by_its_name() -> None:
    done = run_siliang("plan", "--model", "bert-base-uncased", "--method", "lora", "--memory", "3GB")
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("lora"))
    assert row.split()[1] == "296,450"  # r=8 on query and value of 12 layers, and the head


def test_what_to_change_and_the_run_that_is_written(four_layers: str, tmp_path: Path) -> None:
    def on_cuda(config: RunConfig, memory_bytes: int) -> MethodPlan:
        return plan(config, target_device(config, "cuda", memory_bytes=memory_bytes), with_data=False).methods[0]

    values = {"model": four_layers, "task": "causal_lm", "data": {"train": "-"}, "output": "-"}
    roomy = on_cuda(RunConfig.build(values | {"train": {"memory_budget": None}}), 10**11)
    memory = roomy.peak_bytes - sum(roomy.activations_by_layer) // 2
    written = tmp_path / "fits.yaml"
    flags = ("--task", "causal_lm", "--method", "lora", "--device", "cuda", "--memory", f"{memory}B")
    more = ("--set", "train.memory_budget=null", "--write", str(written))
    done = run_siliang("plan", "--model", four_layers, *flags, *more)
    assert done.returncode == 1
    assert "train.batch_size: 16 ->" in done.stdout
    values = yaml.safe_load(written.read_text())
    t = values["train"]
    assert t["batch_size"] * t["gradient_accumulation"] == 16
    found = on_cuda(RunConfig.build(values), memory)
    assert found.fits and found.peak_bytes <= memory < roomy.peak_bytes


@pytest.mark.parametrize(
    ("kind", "precision", "tokens"), [("cpu", "fp32", 2048), ("cpu", "bf16", 4096), ("cuda", "bf16", 8192)]
)
def test_a_batch_on_a_cpu_has_no_more_tokens_than_pays(
    kind: Any, precision: Any, tokens: int, four_layers: str
) -> None:
    """Of 16 rows of 512 tokens; on a card the user's batches stay, and a limit that was asked for does on both."""
    values = {"model": four_layers, "task": "causal_lm", "data": {"train": "-", "max_length": 512}, "output": "-"}
    device = Device(kind, None, "as asked", Choice(precision, "as asked"), 0, 0, here=False)
    for asked, most in ((None, tokens), (1024, 1024)):
        config = RunConfig.build(values | {"train": {"tokens_at_once": asked}})
        assert plan(config, device, with_data=False, timed=False).methods[0].batch_tokens == most


def test_the_parts_add_up() -> None:
    config = RunConfig.build({"model": "gpt2", "task": "causal_lm", "data": {"train": "-"}, "output": "-"})
    device = target_device(config, "cuda", memory_bytes=10**11)
    found = plan(config, device, with_data=False).methods[0]
    assert found.peak_bytes == sum(found.parts.values()) + found.overhead_bytes
    assert found.parts["weights"] == pytest.approx(124_439_808 * 2, rel=0.01)  # bf16, rounded up in blocks
    assert found.parts["optimizer"] == pytest.approx(8 * found.trained, rel=0.05)
    assert len(found.activations_by_layer) == 12 and min(found.activations_by_layer) > 0
    assert 0 < found.evaluate_bytes < found.peak_bytes and found.generate_bytes > 0 and found.merge_bytes > 0


@pytest.mark.parametrize("start", [{"init_lora_weights": "pissa"}, {"kasa_config": {}}])
def test_a_start_that_replaces_weights_keeps_them(start: dict[str, Any], four_layers: str) -> None:
    values = {"model": four_layers, "task": "causal_lm", "data": {"train": "-"}, "output": "-"}
    methods = [{"name": "lora", "target_modules": ["c_attn"], **more} for more in ({}, start)]
    configs = [RunConfig.build(values | {"method": method}) for method in methods]
    device = target_device(configs[0], "cuda", memory_bytes=10**11)
    plain, more = (plan(config, device, with_data=False, timed=False).methods[0].parts["weights"] for config in configs)
    assert more - plain == pytest.approx(4 * 256 * 3 * 256 * 2, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "no/such/model/here"), "There is no model folder"),
        (("--model", "gpt2", "--memory", "much"), "is not a size of memory"),
        (("--model", "gpt2", "--method", "prefixtuning"), "Did you mean 'prefix_tuning'"),
        (("--model", "gpt2", "--device", "tpu"), "is not one of cpu, cuda"),
        (("--model", "gpt2", "--devices", "2", "--strategy", "deepspeed"), "Plan strategy fsdp"),
        ((), "give a model"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], words: str) -> None:
    done = run_siliang("plan", *arguments)
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.splitlines()) <= 2


def test_a_config_with_missing_fields(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7})
    )
    config = RunConfig.build({"model": str(tmp_path), "task": "causal_lm", "data": {"train": "-"}, "output": "-"})
    with pytest.raises(ModelError):
        raise_of(plan(config, target(None), with_data=False))


def raise_of(record: Any) -> None:
    raise ModelError(record.methods[0].error)


def test_a_method_that_does_not_apply_is_a_row_that_says_so() -> None:
    config = RunConfig.build({"model": "Llama-3.2-1B", "task": "causal_lm", "data": {"train": "-"}, "output": "-"})
    found = plan(config, target(None), methods=["bitfit"], with_data=False).methods[0]
    assert found.error is not None and "has none" in found.error


@pytest.mark.parametrize(("virtual", "left"), [(20, 44), (40, 24), (64, 0), (70, 0)])
def test_without_data_rows_are_as_long_as_the_positions_allow(reviews: RunConfig, virtual: int, left: int) -> None:
    values = reviews.model_dump(mode="json")
    values["method"] = {"name": "prompt_tuning", "num_virtual_tokens": virtual}
    values["data"] |= {"max_length": 512}
    values["train"] |= {"gradient_checkpointing": True}
    config = RunConfig.build(values)
    found = plan(config, target(None), with_data=False, timed=False).methods[0]
    if not left:
        assert found.error == f"method.num_virtual_tokens = {virtual} leaves no position for a row: lower it."
        return
    assert found.error is None and found.batch_tokens == found.batch_rows * left
    assert any(note.startswith(f"rows of {left} tokens: the model has {left} positions") for note in found.notes)
    # where it does not fit, what to change is looked for with rows that the model can read
    found = plan(config, target(found.peak_bytes - 2**14), with_data=False, timed=False).methods[0]
    assert found.error is None and found.fits is False and found.fit is not None and found.fit.time_factor >= 1


# ---- a run's own data ----


def test_the_order_is_the_trainers(reviews: RunConfig, tmp_path: Path) -> None:
    config = reviews.model_copy(update={"output": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    run = prepare(config, Listener(), tmp_path / "run")
    training = Training(run)
    seen = [step["rows"] for epoch in range(2) for step in training.loader(training.steps_of(epoch))]
    said = [[int(run.train_set.column("row")[i]) for i in step] for step in order(config, run.train_set)]
    assert [sorted(step) for step in said][: len(seen)] == [sorted(step) for step in seen]


def test_the_heaviest_step(reviews: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = prepare(reviews, Listener(), tmp_path / "run")
    collator = StepCollator(PadCollator(0), SEQ_CLS, reviews.train.batch_size)
    found = heaviest_step(reviews, run.train_set, collator)
    lengths = run.train_set.lengths
    brute = max(sum(lengths[i] for i in step) for step in order(reviews, run.train_set))
    assert sum(len(row["input_ids"]) for row in found.rows) == brute


def test_a_run_that_will_not_fit_is_refused(reviews: RunConfig, tmp_path: Path) -> None:
    config = reviews.model_copy(update={"output": str(tmp_path / "run")})
    with pytest.raises(PlanError, match=r"It fits .* train\.batch_size=") as caught:
        train(config, planner=Planner(tight(config)))
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "run").exists()


def test_fit_adapts_it_with_the_same_result(reviews: RunConfig, tmp_path: Path) -> None:
    plain = train(reviews.model_copy(update={"output": str(tmp_path / "a")}))
    t = reviews.train.model_copy(update={"fit": True})
    said: list[str] = []
    config = reviews.model_copy(update={"output": str(tmp_path / "b"), "train": t})
    adapted = train(config, Listener(said.append), planner=Planner(tight(config)))
    assert any("with the same result" in line for line in said)
    assert adapted.config["train"]["batch_size"] < reviews.train.batch_size
    losses = [[s.loss for s in record.steps if s.loss is not None] for record in (adapted, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 8
    assert adapted.memory.predicted_bytes is not None and plain.memory.predicted_bytes is None


def test_smaller_batches_change_the_result_of_lily(reviews: RunConfig, tmp_path: Path) -> None:
    method = {"name": "lily", "r": 2}
    config = RunConfig.build(reviews.model_dump() | {"output": str(tmp_path / "run"), "method": method})
    with pytest.raises(PlanError, match=r"It fits .*, with another result, for lily takes a mean over each batch; or"):
        train(config, planner=Planner(tight(config)))


def tight(config: RunConfig) -> Device:
    """A device that holds the model and half of what a step needs."""
    with_room = plan(config, target(None)).methods[0]
    need = with_room.loaded_bytes + (with_room.peak_bytes - with_room.loaded_bytes) // 2
    return target(need)


def test_the_past_corrects_the_constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path))
    assert history.known_work("a card") is None
    for nbytes in (10, 30, 20):
        history.record_work("a card", nbytes)
    history.record_work("another", 99)
    file = tmp_path / history.FILE
    file.write_text(file.read_text() + "not json\n")
    assert history.known_work("a card") == 20


def test_changes_are_made() -> None:
    config = RunConfig.build({"model": "gpt2", "task": "causal_lm", "data": {"train": "-"}, "output": "-"})
    changed = with_changes(config, [Change(setting="quantization", before="null", after="{bits: 4}", price="")])
    assert changed.quantization is not None and changed.quantization.bits == 4
    with pytest.raises(ConfigError):
        with_changes(config, [Change(setting="train.batch_size", before="16", after="0", price="")])


def test_t5_and_tied_shapes_are_drawn_tied() -> None:
    from siliang.plan.fake import fake_mode, make_fake_base

    with fake_mode():
        import torch

        model = make_fake_base(
            AutoConfig.for_model("t5", d_model=64, num_layers=1), SEQ_2_SEQ_LM.model, dtype=torch.float32
        )
        assert model.lm_head.weight is model.shared.weight


def test_the_estimate_of_recomputing_is_near_the_measurement(four_layers: str) -> None:
    config = RunConfig.build({"model": four_layers, "task": "causal_lm", "data": {"train": "-"}, "output": "-"})
    fake_run = FakeRun(config, model_config(config), target(None))
    batches = fake_run.batches(synthetic_rows(config).rows)
    measured = fake_run.measure(batches)
    for count in (0, 1, 2, 4):
        peak = estimate_recomputing(measured, count)
        assert peak.nbytes == pytest.approx(fake_run.measure(batches, recomputed=count).peaks["train"].nbytes, rel=0.1)
        assert sum(peak.parts.values()) == peak.nbytes


def test_the_changes_recompute_the_layers_that_the_run_will(four_layers: str) -> None:
    config = RunConfig.build({"model": four_layers, "task": "causal_lm", "data": {"train": "-"}, "output": "-"})
    fake_run = FakeRun(config, model_config(config), target(None))
    batches = fake_run.batches(synthetic_rows(config).rows)
    measured = fake_run.measure(batches)
    room = 7 * sum(measured.layer_bytes) // 8
    found = MemoryLimit(10**12, lambda run, measured: room).with_recomputing(fake_run, batches)
    assert found is not None and 0 < found[0] == recomputed_layers(measured, room) < fake_run.layers
    assert MemoryLimit(found[1].nbytes - 1, lambda run, measured: room).with_recomputing(fake_run, batches) is None


def test_a_shape_in_another_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shape_name("ChatGLM3-6B") == "chatglm3-6b"
    assert shape_name("some/other") == "some/other"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "GPT2").mkdir()
    assert shape_name("GPT2") == "GPT2"  # a folder of that name is meant


def test_a_folder_with_a_shapes_name_is_the_model(
    reviews: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(reviews.model, tmp_path / "bert-base-uncased")
    monkeypatch.chdir(tmp_path)
    config = reviews.model_copy(update={"model": "bert-base-uncased"})
    planner = Planner(target(None))
    prepare(config, Listener(), tmp_path, planner=planner)
    assert planner.last_plan is not None and planner.last_plan.total < 1e6
    done = run_siliang("plan", "--model", "bert-base-uncased", "--method", "lora", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["methods"][0]["total"] < 1e6
    assert f"as the folder {tmp_path / 'bert-base-uncased'}, not as the known model" in done.stderr


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the config of a small model whose steps take more than its weights."""
    folder = tmp_path_factory.mktemp("shape") / "model"
    AutoConfig.for_model("gpt2", n_layer=4, n_embd=256, n_head=4, vocab_size=2000).save_pretrained(folder)
    return str(folder)


def planned(model: str, budget: Any, memory_bytes: int | None) -> Any:
    values = {"model": model, "task": "causal_lm", "data": {"train": "-"}, "output": "-"}
    config = RunConfig.build(values | {"train": {"memory_budget": budget}})
    return plan(config, target(memory_bytes), with_data=False, timed=False).methods[0]


def test_a_budget_of_a_number_is_planned_as_that_much_memory_is(four_layers: str) -> None:
    """On a device with more, with less, and of unknown size."""
    none = planned(four_layers, None, 24 * 10**9)
    held = none.overhead_bytes + none.loaded_bytes + none.adapter_bytes
    rest = trained_bytes_to_come(none.adapter_bytes, 0) + 7 * sum(none.activations_by_layer) // 8
    some = int(held + rest)
    auto = planned(four_layers, "auto", int(held + rest / AUTO_SHARE) + 1)
    assert none.recomputed_layers == 0
    assert 0 < auto.recomputed_layers < 4 and auto.peak_bytes <= some and auto.fits
    assert planned(four_layers, "auto", some).recomputed_layers > auto.recomputed_layers  # a part of it stays free
    for there in (24 * 10**9, None):
        found = planned(four_layers, f"{some}B", there)
        assert (found.recomputed_layers, found.peak_bytes) == (auto.recomputed_layers, auto.peak_bytes)
        assert found.fits is (None if there is None else True)
    found = planned(four_layers, "1MB", 24 * 10**9)  # every layer recomputes, and the run goes on
    assert found.recomputed_layers == 4 and found.fits and 10**6 < found.peak_bytes < auto.peak_bytes
    found = planned(four_layers, "24GB", none.peak_bytes - 1)  # the budget asks for nothing, and the device is full
    assert found.recomputed_layers == 0 and not found.fits
    assert ("train.memory_budget", "auto") in {(c.setting, c.after) for c in found.fit.changes}


def test_on_cuda_a_budget_does_not_count_the_context() -> None:
    config = RunConfig.build({"model": "gpt2", "task": "causal_lm", "data": {"train": "-"}, "output": "-"})
    cuda, cpu = target_device(config, "cuda", memory_bytes=10**10), target(10**10)
    assert cuda.budgeted_bytes == cuda.work_bytes < cuda.overhead_bytes and cpu.budgeted_bytes == cpu.overhead_bytes


@pytest.mark.parametrize("begun", [False, True])
def test_a_process_that_uses_cuda_is_not_forked(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its children could not ask the card anything: each method would be "not planned"."""
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: begun)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    pids = set(siliang.plan.methods._in_parallel(where_it_runs, ["lora", "ia3"], lambda line: None))
    assert (pids == {os.getpid()}) is begun


def where_it_runs(method: str) -> Any:
    return os.getpid()


# ---- loading ----


WORDS = 50257 * 768
PARAMETERS = WORDS + 1024 * 768 + 12 * 768**2 + 13 * 768 + 2 * 768  # one layer, and the last norm


def large_words(tmp_path: Path, **more: Any) -> RunConfig:
    """A model that is mostly embeddings, on one short row: its steps take little beside its weights."""
    if not (tmp_path / "config.json").exists():
        AutoConfig.for_model("gpt2", n_layer=1).save_pretrained(tmp_path)
    values: dict[str, Any] = {
        "model": str(tmp_path),
        "task": "causal_lm",
        "data": {"train": "-", "max_length": 8},
        "train": {"batch_size": 1, "gradient_checkpointing": True},
        "output": "-",
    }
    return RunConfig.build(values | more)


def test_loading_is_planned_beside_the_steps(tmp_path: Path) -> None:
    config = large_words(tmp_path)
    found = plan(config, target(None), with_data=False, timed=False).methods[0]
    weights = PARAMETERS * 4
    assert weights < found.loading_bytes <= weights + 4 * PIECE_BYTES + 2**20
    assert found.needed_bytes == max(found.loading_bytes, found.peak_bytes) == found.loading_bytes > found.peak_bytes
    little = (found.loading_bytes + found.peak_bytes) // 2  # enough for the steps alone
    assert plan(config, target(little), with_data=False, timed=False).methods[0].fits is False
    assert plan(config, target(found.loading_bytes), with_data=False, timed=False).methods[0].fits
    several = plan(config, target(little), methods=["lora", "ia3"], with_data=False, timed=False).methods
    assert [one.fits for one in several] == [False, False]


def test_loading_in_few_bits_takes_more_than_the_weights_for_a_moment(tmp_path: Path) -> None:
    config = large_words(tmp_path, quantization={"bits": 4})
    AutoConfig.for_model("qwen2", num_hidden_layers=1).save_pretrained(tmp_path)
    found = plan(config, target(None), with_data=False, timed=False).methods[0]
    largest = 4096 * 22016
    assert found.loading_bytes - found.parts["weights"] == pytest.approx(16 * largest, rel=0.1)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_base_in_eight_bits_is_planned(kind: Any, four_layers: str) -> None:
    """How many inputs stay in 16 bits depends on their values, which a plan has not: none, there."""
    peaks = {}
    for bits in (None, 8):
        values = {"model": four_layers, "task": "causal_lm", "method": {"name": "lora"}, "data": {"train": "-"}}
        quantized = {} if bits is None else {"quantization": {"bits": bits}}
        config = RunConfig.build(values | quantized | {"output": "-"})
        device = target_device(config, kind, memory_bytes=10**11)
        (found,) = plan(config, device, with_data=False, timed=False).methods
        assert found.error is None
        peaks[bits] = found.parts["weights"]
    assert peaks[8] < peaks[None]


def test_new_tokens_are_loaded_beside_the_old_ones(tmp_path: Path) -> None:
    data = {"train": "-", "max_length": 8, "add_tokens": ["<a>", "<b>"]}
    plain, grown = (
        plan(large_words(tmp_path, **more), target(None), with_data=False, timed=False).methods[0].loading_bytes
        for more in ({}, {"data": data})
    )
    assert grown - plain > WORDS * 4  # the new one, and a copy from which its rows' mean is taken


def test_on_cuda_the_host_holds_what_is_loaded(tmp_path: Path) -> None:
    config, device = large_words(tmp_path), target_device(large_words(tmp_path), "cuda", memory_bytes=10**10)
    found = plan(config, device, with_data=False, timed=False).methods[0]
    weights = PARAMETERS * 2
    assert found.host_bytes > device.host_bytes + weights
    assert found.loading_bytes == device.process_bytes + found.loaded_bytes


def test_every_rank_loads_the_model_whole(tmp_path: Path) -> None:
    config = large_words(tmp_path).with_strategy("fsdp")
    with fake_mesh(2) as mesh:
        found = plan(config, target(None), with_data=False, timed=False, mesh=mesh).methods[0]
    assert found.loaded_bytes < 0.6 * PARAMETERS * 4 and found.loading_bytes > PARAMETERS * 4


def test_what_is_said_where_loading_takes_more() -> None:
    config = RunConfig.build({"model": "gpt2", "task": "causal_lm", "data": {"train": "-"}, "output": "-"})
    said: list[str] = []
    found = MethodPlan(
        method="lora", loading_bytes=8 * 10**9, peak_bytes=6 * 10**9, parts={"weights": 5 * 10**9}, fits=True
    )
    apply_plan(config, found, target(9 * 10**9), said.append)
    assert said == ["memory     about 8 GB of 9 GB as asked (loading 8 GB, the steps 6 GB: weights 5 GB)"]
    needed = "needs about 8 GB, and the device has 7 GB as asked: loading 8 GB, the steps 6 GB"
    with pytest.raises(PlanError, match=needed):
        apply_plan(config, found.model_copy(update={"fits": False}), target(7 * 10**9), said.append)


def test_predicted_and_measured_peaks_are_of_loading_and_of_the_steps(reviews: RunConfig, tmp_path: Path) -> None:
    planner = Planner()
    memory = train(reviews.model_copy(update={"output": str(tmp_path / "run")}), planner=planner).memory
    assert memory.peak_bytes == max(memory.loading_bytes, memory.steps_bytes)
    assert (
        0 < memory.loaded_bytes <= memory.steps_bytes and memory.above_bytes == memory.steps_bytes - memory.loaded_bytes
    )
    steps = sum(memory.predicted_parts.values())
    assert memory.predicted_loading_bytes is not None
    assert memory.predicted_bytes == max(memory.predicted_loading_bytes, steps)
    assert planner.last_plan is not None and planner.last_plan.needed_bytes == memory.predicted_bytes


def test_a_comparison(model_folders: dict[str, Path], review_file: Path, tmp_path: Path) -> None:
    """Each of its methods, with its own settings, and what a search tries of them."""
    settings = tmp_path / "compare.yaml"
    settings.write_text(
        f"model: {model_folders['bert']}\ntask: seq_cls\ndata: {{train: {review_file}}}\noutput: {tmp_path / 'out'}\n"
        "methods: [full, bitfit, {name: lora, r: 4}, {name: lora, label: wide, r: 16}, "
        "{name: ia3, learning_rate: 1e-2}]\n"
        "seeds: 2\nsearch: {learning_rate: [1e-3, 1e-4]}\n"
    )
    ended = run("plan", settings, "--memory", "64GB", "--device", "cpu", "--json")
    assert ended.code == 0, ended
    methods = {m["method"]: m for m in json.loads(ended.out)["methods"]}
    assert list(methods) == ["full", "bitfit", "ia3", "lora r=4", "wide"]
    assert all(m["error"] is None and m["fits"] for m in methods.values())
    assert methods["full"]["trained"] == methods["full"]["total"]
    head = 32 * 2 + 2
    assert methods["wide"]["trained"] - head == 4 * (methods["lora r=4"]["trained"] - head)
    some = run(
        "plan", settings, "--memory", "64GB", "--device", "cpu", "--method", "lora", "--set", "search={r: [2, 8]}"
    )
    assert some.code == 0 and "lora r=4, r=2" in some.out and "wide" in some.out and "bitfit" not in some.out, some
    assert "this is a comparison" in refused("plan", settings, "--write", tmp_path / "fits.yaml")
    assert "does not compare it" in refused("plan", settings, "--method", "prefix")
