"""Methods that train several tasks at once: the task of each row, from Python and from the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from commands import refused, run
from tiny import WORDS, batch, make, write_jsonl

import siliang
from siliang.config import RunConfig
from siliang.run_folder import open_run
from siliang.train.run import train
from siliang.types import AdapterError, ConfigError, DataError
from siliang.use.chat import Chat
from siliang.use.evaluate import evaluate
from siliang.use.generate import generate

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
MPT: dict[str, Any] = {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "multitask_prompt_tuning": (siliang.MultitaskPromptTuningConfig, MPT),
    "poly": (siliang.PolyConfig, {"n_tasks": 3, "n_skills": 2, "n_splits": 2, "r": 2}),
}


def with_tasks(method: str, **more: Any) -> Any:
    kind, settings = METHODS[method]
    return siliang.get_peft_model(make("llama"), kind(task_type="CAUSAL_LM", **settings | more)).eval()


@pytest.mark.parametrize("method", METHODS)
def test_each_row_is_of_its_task(method: str) -> None:
    model, inputs = with_tasks(method), batch("llama")
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape) * p.requires_grad
    together = model(**inputs, task_ids=torch.tensor([2, 0, 1])).logits
    for row, task in enumerate((2, 0, 1)):
        alone = model(input_ids=inputs["input_ids"][row : row + 1], task_ids=task).logits
        assert_close(together[row : row + 1], alone)
    assert not torch.allclose(together[0], model(**inputs, task_ids=0).logits[0])


@pytest.mark.parametrize("method", METHODS)
def test_task_ids_that_cannot_be(method: str) -> None:
    model, inputs = with_tasks(method), batch("llama")
    with pytest.raises(ConfigError, match="call the model with task_ids"):
        model(**inputs)
    with pytest.raises(ConfigError, match=r"task 3: .*tasks = 3 has tasks 0 to 2"):
        model(**inputs, task_ids=torch.tensor([0, 3, 1]))
    with pytest.raises(ConfigError, match="must be 0 or more"):
        model(**inputs, task_ids=-1)
    with pytest.raises(ConfigError, match="2 numbers for a batch of 3 rows"):
        model(**inputs, task_ids=[0, 1])
    model(**inputs, task_ids=1)
    with pytest.raises(ConfigError, match="call the model with task_ids"):  # what was given holds for its own call
        model.get_base_model()(**inputs)


@pytest.mark.parametrize(
    "ids", [torch.tensor([0.0, 1.0, 2.0]), [0.5, 1, 2], 1.0, "1", ["0", "1", "2"], [[0], [1, 2]], True, [None, 0, 1]]
)
@pytest.mark.parametrize("method", METHODS)
def test_task_ids_are_whole_numbers(method: str, ids: Any) -> None:
    model, inputs = with_tasks(method), batch("llama")
    for call in (lambda: model(**inputs, task_ids=ids), lambda: model.generate(**inputs, task_ids=ids)):
        with pytest.raises(ConfigError, match=r"task_ids = .*: must be whole numbers, the task of each row"):
            call()
    model(**inputs, task_ids=torch.tensor([0, 1, 2], dtype=torch.int32))


@pytest.mark.parametrize("method", METHODS)
def test_one_task_needs_no_ids(method: str) -> None:
    setting = "num_tasks" if "prompt" in method else "n_tasks"
    model, inputs = with_tasks(method, **{setting: 1}), batch("llama")
    assert torch.equal(model(**inputs).logits, model(**inputs, task_ids=torch.zeros(3, dtype=torch.long)).logits)


@pytest.mark.parametrize("method", METHODS)
def test_generation_by_beams(method: str) -> None:
    model, ids = with_tasks(method), batch("llama")["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(input_ids=ids, task_ids=[2, 0, 1], **settings)
    alone = [model.generate(input_ids=ids[i : i + 1], task_ids=t, **settings) for i, t in enumerate((2, 0, 1))]
    assert found.tolist() == torch.cat(alone).tolist()


def test_polys_draws_are_pefts() -> None:
    settings: dict[str, Any] = METHODS["poly"][1] | {"task_type": "CAUSAL_LM", "init_weights": False}
    ours = siliang.get_peft_model(make("llama"), siliang.PolyConfig(**settings))
    theirs = peft.get_peft_model(make("llama"), peft.PolyConfig(**settings))
    theirs.load_state_dict(ours.state_dict())
    logits = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        logits.append(model(**batch("llama"), task_ids=torch.tensor([2, 0, 1])).logits)
    assert_close(*logits)
    assert not torch.allclose(logits[0], ours.eval()(**batch("llama"), task_ids=torch.tensor([2, 0, 1])).logits)


def source_of_tasks(folder: Path) -> tuple[Any, Path]:
    """A multitask prompt of three tasks, and its folder."""
    model = with_tasks("multitask_prompt_tuning")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_starts_from_source_tasks(init: str, tmp_path: Path) -> None:
    source, folder = source_of_tasks(tmp_path)
    file = str(folder / "adapter_model.safetensors")
    start = {"prompt_tuning_init": init, "prompt_tuning_init_state_dict_path": file, "prompt_tuning_init_task": 2}
    settings: dict[str, Any] = MPT | {"num_tasks": 1, "task_type": "CAUSAL_LM"} | start
    ours = siliang.get_peft_model(make("llama"), siliang.MultitaskPromptTuningConfig(**settings))
    theirs = peft.get_peft_model(make("llama"), peft.MultitaskPromptTuningConfig(**settings))
    found, there = (model.prompt_encoder["default"].state_dict() for model in (ours, theirs))
    kept = [key for key in there if init != "ONLY_SOURCE_SHARED" or key == "embedding.weight"]
    assert all(torch.equal(found[key], there[key]) for key in kept)
    if init == "EXACT_SOURCE_TASK":
        inputs = batch("llama")
        assert_close(ours.eval()(**inputs).logits, source(**inputs, task_ids=2).logits)
    ours.save_pretrained(tmp_path / "saved")
    (folder / "adapter_model.safetensors").unlink()  # what is loaded does not read it again
    again = siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "saved")
    assert_close(again(**batch("llama")).logits, ours.eval()(**batch("llama")).logits)


def test_starts_that_cannot_be(tmp_path: Path) -> None:
    _, folder = source_of_tasks(tmp_path)
    exact: dict[str, Any] = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "num_virtual_tokens": 4, "num_ranks": 2}
    with pytest.raises(ConfigError, match="needs prompt_tuning_init_state_dict_path"):
        siliang.MultitaskPromptTuningConfig(**exact)
    exact["prompt_tuning_init_state_dict_path"] = str(folder)
    with pytest.raises(ConfigError, match=r"starts one task, and num_tasks = 3"):
        siliang.MultitaskPromptTuningConfig(**exact, num_tasks=3)
    for more, said in (
        ({"prompt_tuning_init_task": 3}, "prompt_tuning_init_task = 3: .* has tasks 0 to 2"),
        ({"num_virtual_tokens": 5}, r"has \(4, 32\) for prompt_embeddings, which must be \(5, 32\)"),
        ({"prompt_tuning_init_state_dict_path": str(folder / "nothing.safetensors")}, "nothing.safetensors is damaged"),
    ):
        config = siliang.MultitaskPromptTuningConfig(**exact | more)
        with pytest.raises((ConfigError, AdapterError), match=said):
            siliang.get_peft_model(make("llama"), config)


def test_multitask_prompts_of_an_encoder_decoder() -> None:
    """PEFT puts the second half of the rows before the decoder's tokens in a forward, and not when it generates.
    Here they are not used, as in prompt tuning, so that what is trained is what generates."""
    settings: dict[str, Any] = MPT | {"task_type": "SEQ_2_SEQ_LM"}
    ours = siliang.get_peft_model(make("t5"), siliang.MultitaskPromptTuningConfig(**settings)).eval()
    theirs = peft.get_peft_model(make("t5"), peft.MultitaskPromptTuningConfig(**settings)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    inputs, tasks = batch("t5"), torch.tensor([2, 0, 1])
    assert ours(**inputs, task_ids=tasks).logits.shape[1] == 7
    assert theirs(**inputs, task_ids=tasks).logits.shape[1] == 7 + 4
    del inputs["labels"]
    found, there = (m.generate(**inputs, task_ids=tasks, max_new_tokens=6, do_sample=False) for m in (ours, theirs))
    assert found.tolist() == there.tolist()


def test_other_methods_do_not_ask() -> None:
    model = siliang.get_peft_model(make("llama"), siliang.LoraConfig(task_type="CAUSAL_LM"))
    assert model(**batch("llama"), task_ids=torch.tensor([0, 5, 1])).loss.isfinite()  # as in PEFT


# ---- training ----


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 instructions of two tasks, which ask the same and want different answers."""
    rows = [
        {"instruction": f"say {w}", "output": f"{w} {w}" if t else w, "kind": t} for w in WORDS[-10:] for t in (0, 1)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "tasks.jsonl", rows)


def configured(
    folders: dict[str, Path], data: Path, output: Path, method: str, column: str | None = "kind", **more: Any
) -> RunConfig:
    settings = METHODS[method][1]
    values = {
        "model": str(folders["llama"]),
        "task": "causal_lm",
        "method": {"name": method, **settings},
        "data": {"train": str(data), "test_size": 0.2, "columns": {"task_id": column}},
        "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "log_every": 1} | more,
        "output": str(output),
        "accept": ["SL042"],
    }
    return RunConfig.build(values)


@pytest.mark.parametrize("method", METHODS)
def test_training_by_a_column(method: str, model_folders: dict[str, Path], tasks_file: Path, tmp_path: Path) -> None:
    found = []
    for packing in (True, False):
        run = tmp_path / str(packing)
        record = train(configured(model_folders, tasks_file, run, method, packing=packing))
        assert record.status == "completed" and record.columns["task_id"] == "kind"
        found.append([step.loss for step in record.steps if step.loss is not None])
        metrics = evaluate(open_run(run))
        assert metrics["loss"] == pytest.approx(record.final["eval_loss"], rel=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    with pytest.raises(ConfigError, match=r"trained on 3 tasks \(.*\), 0 to 2: .*--task-id\.$"):
        generate(open_run(run), "say the", max_new_tokens=3)
    opened = open_run(run)
    opened.task_id = 3
    with pytest.raises(ConfigError, match="0 to 2, and 3 is none of them"):
        generate(opened, "say the", max_new_tokens=3)
    chat = Chat([run], torch.device("cpu"), task_id=2)
    assert isinstance(chat.answer(str(run), "say the", lambda text: None, max_new_tokens=3, temperature=0.0), str)
    opened.task_id = 2
    assert isinstance(generate(opened, "say the", max_new_tokens=3), str)


@pytest.mark.parametrize("method", METHODS)
def test_a_column_that_does_not_fit(
    method: str, model_folders: dict[str, Path], tasks_file: Path, tmp_path: Path
) -> None:
    setting = "num_tasks" if "prompt" in method else "n_tasks"
    config = configured(model_folders, tasks_file, tmp_path / "a", method)
    one = config.model_copy(update={"method": config.method.model_copy(update={setting: 1})})
    with pytest.raises(ConfigError, match=f"task 1: method.{setting} = 1 has tasks 0 to 0"):
        train(one)
    with pytest.raises(ConfigError, match=r"name the data's column with data\.columns\.task_id"):
        train(configured(model_folders, tasks_file, tmp_path / "b", method, None))
    with pytest.raises(DataError, match=r"has no column 'tsk', which .*task_id names; it has 'instruction', .*'kind'"):
        train(configured(model_folders, tasks_file, tmp_path / "d", method, "tsk"))
    with pytest.raises(DataError, match=r"has 'say .*' in 'instruction', where a task's number belongs"):
        train(configured(model_folders, tasks_file, tmp_path / "c", method, "instruction"))


def test_predictions_are_of_the_rows_tasks(model_folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": w, "label": ("no", "yes")[t], "kind": t} for w in WORDS[-10:] for t in (0, 1)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    more: dict[str, Any] = {"max_steps": 30, "batch_size": 8, "learning_rate": 0.2}
    values = configured(model_folders, data, tmp_path / "run", "poly", **more).model_dump()
    values |= {"model": str(model_folders["bert"]), "task": "seq_cls"}
    train(RunConfig.build(values))
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [rows[0], rows[3], rows[2], rows[1]])
    found = run("predict", tmp_path / "run", "--json", mixed).out.splitlines()
    alone = [run("predict", tmp_path / "run", "--json", mixed, "--task-id", t).out.splitlines() for t in (0, 1)]
    assert found == [alone[0][0], alone[1][1], alone[0][2], alone[1][3]] and alone[0] != alone[1]
    assert "--task-id" in refused("predict", tmp_path / "run", "a text")
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"text": "the film"}])
    assert "has no column 'kind'" in refused("predict", tmp_path / "run", bare)
