"""What frozen layers say is computed once, exactly, or not kept at all."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TASK, make, without_dropout
from transformers import OPTConfig, OPTForCausalLM

import siliang
from siliang.data.collate import PadCollator
from siliang.engine.batches import StepCollator
from siliang.engine.budget import AUTO_SHARE, MemoryBudget
from siliang.engine.frozen import FrozenLayers, StateStore, disk_folder, find_frozen_layers
from siliang.engine.step import Engine
from siliang.engine.trial import ModelTrial
from siliang.models.introspect import layer_stack
from siliang.tasks import CAUSAL_LM, SEQ_CLS, TASKS, Task
from siliang.types import TaskType


def model_and_task(name: str) -> tuple[Any, Task]:
    task = TASKS[TaskType(TASK[name])]
    config = siliang.LoraConfig(task_type=task.adapter_type, layers_to_transform=[1], init_lora_weights=False)
    return siliang.get_peft_model(make(name), config).train(), task


def frozen_layers(model: Any, layers: list[Any], *, comparing: bool = True) -> FrozenLayers:
    return find_frozen_layers(ModelTrial(model, model, CAUSAL_LM, comparing=comparing), layers)


def epochs(model: Any, task: Task, *, keep: bool, store: StateStore | None = None) -> tuple[list[float], Engine]:
    """The losses of three epochs of two batches whose rows meet in another order each time."""
    rows = []
    for i in range(6):
        ids = [5 + (7 * i + 3 * j) % 90 for j in range(4 + 2 * i)]
        rows.append({"input_ids": ids, "labels": i % 2 if task is SEQ_CLS else list(ids)})
    engine = Engine(model, task, keep_frozen=keep)
    assert engine.padding is not None
    if store is not None and engine.padding.frozen is not None:
        engine.padding.frozen.store = store
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for epoch in range(3):
        for part in (rows[epoch:] + rows[:epoch])[:3], (rows[epoch:] + rows[:epoch])[3:]:
            (batch,) = StepCollator(PadCollator(0), task, 8)([dict(row) for row in part])["batches"]
            with engine.loss(model, batch) as loss:
                (loss / batch.weight).backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    engine.padding.close()
    return losses, engine


@pytest.mark.parametrize("room", [(10**9, 0), (0, 10**9), (2_000, 10**9)], ids=["memory", "disk", "both"])
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2", "bert"])
def test_the_same_losses(name: str, room: tuple[int, int]) -> None:
    losses = []
    for keep in (False, True):
        model, task = model_and_task(name)
        without_dropout(model)
        found, engine = epochs(model, task, keep=keep, store=StateStore(*room))
        losses.append(found)
    # not to the last bit: the rows meet in other batches, and so in products of another shape
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert engine.padding is not None and engine.padding.frozen is not None
    assert engine.padding.frozen.hits == 4 and len(engine.padding.frozen.store) == 6


PLACES = {
    "bert": {
        "position_embeddings": "bert.embeddings.position_embeddings.modules_to_save.default.weight",
        "embeddings.LayerNorm": "bert.embeddings.LayerNorm.modules_to_save.default",
        "token_type_embeddings": "bert.embeddings.token_type_embeddings.modules_to_save.default.weight",
    },
    "gpt2": {"wpe": "transformer.wpe.modules_to_save.default.weight"},
    "bloom": {"word_embeddings_layernorm": "transformer.word_embeddings_layernorm.modules_to_save.default"},
}


@pytest.mark.parametrize(("name", "module"), [(name, module) for name, found in PLACES.items() for module in found])
def test_what_is_trained_before_the_layers_turns_it_off(name: str, module: str) -> None:
    task, losses = TASKS[TaskType(TASK[name])], []
    config = siliang.LoraConfig(task_type=task.adapter_type, layers_to_transform=[1], modules_to_save=[module])
    for keep in (False, True):
        torch.manual_seed(0)
        model: Any = siliang.get_peft_model(make(name), config).train()
        without_dropout(model)
        found, engine = epochs(model, task, keep=keep)
        losses.append(found)
    assert losses[0] == losses[1]
    assert engine.padding is not None and engine.padding.frozen is None and not engine.frozen_layers
    assert f"{PLACES[name][module]}" in engine.notes[0] and "is trained, below layer 1" in engine.notes[0]
    model = siliang.get_peft_model(make(name), config).train()
    without_dropout(model)  # a plan's answer is the same
    base = model.get_base_model()
    assert not frozen_layers(base, layer_stack(base), comparing=False).count


def test_a_gradient_of_the_embeddings_output_is_no_training() -> None:
    """Gradient checkpointing asks for it."""
    model, _ = model_and_task("llama")
    base = model.get_base_model()
    base.enable_input_require_grads()
    for comparing in (True, False):
        assert frozen_layers(base, layer_stack(base), comparing=comparing).count == 1


def test_no_room_no_harm() -> None:
    losses = []
    for keep in (False, True):
        model, task = model_and_task("llama")
        found, engine = epochs(model, task, keep=keep, store=StateStore(500, 500))
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert engine.padding is not None and engine.padding.frozen is not None
    assert engine.padding.frozen.hits == 0 and engine.padding.frozen.store.refused > 0


def test_dropout_below_turns_it_off_and_says_so() -> None:
    model, task = model_and_task("bert")
    _, engine = epochs(model, task, keep=True)
    assert engine.padding is not None and engine.padding.frozen is None
    assert "dropout of 0.1 below layer 1" in engine.notes[0]


def noisy(layer: torch.nn.Module, args: Any) -> Any:
    if layer.training:
        return (args[0] * torch.empty_like(args[0]).uniform_(0.99, 1.01), *args[1:])
    return None


def test_jitter_under_whatever_name_turns_it_off() -> None:
    """As in the routers of mixtures of experts: no dropout is there, and no number tells of it."""
    model, task = model_and_task("llama")
    layer_stack(model.get_base_model())[0].register_forward_pre_hook(noisy)
    before = torch.get_rng_state()
    _, engine = epochs(model, task, keep=True)
    assert engine.padding is not None and engine.padding.frozen is None
    assert "something random below layer 1 (LlamaModel)" in engine.notes[0]
    assert model.training
    model, task = model_and_task("llama")  # above the cut it does no harm
    layer_stack(model.get_base_model())[1].register_forward_pre_hook(noisy)
    torch.set_rng_state(before)
    found = frozen_layers(model.get_base_model(), layer_stack(model.get_base_model()))
    assert found.count == 1 and torch.equal(torch.get_rng_state(), before)


def test_layers_that_are_skipped_at_random_turn_it_off() -> None:
    config = OPTConfig(
        vocab_size=120,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        layerdrop=0.5,
        dropout=0.0,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    )
    model = OPTForCausalLM(config).requires_grad_(False)
    found = frozen_layers(model, layer_stack(model))
    assert found.count == 0 and "something random" in (found.why_not or "")


def test_the_rows_go_to_a_disk_and_not_to_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder of temporary files is a piece of the memory on many machines."""
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    of = {"/": "ext4", str(tmp_path / "temporary"): "tmpfs"}

    def partitions(all: bool = False) -> list[Any]:
        return [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in of.items()]

    monkeypatch.setattr("psutil.disk_partitions", partitions)
    assert disk_folder() == tmp_path / "cache"
    of[str(tmp_path)] = "tmpfs"
    assert disk_folder() is None
    assert StateStore.within(MemoryBudget(make("llama"), "auto")).disk_bytes == 0
    del of[str(tmp_path)], of[str(tmp_path / "temporary")]
    assert disk_folder() == tmp_path / "temporary"


def test_where_the_cut_is() -> None:
    model: Any = make("llama").requires_grad_(False)
    layers = layer_stack(model)
    assert frozen_layers(model, layers).count == 1  # the last layer is always computed
    layers[0].mlp.up_proj.requires_grad_(True)  # type: ignore[union-attr]
    assert frozen_layers(model, layers).count == 0
    layers[0].requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    assert frozen_layers(model, layers).why_not == "model.embed_tokens.weight is trained, below layer 1"


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_somebody_elses_forward_stays(name: str) -> None:
    """accelerate and others set an instance's own forward."""
    model, task = model_and_task(name)
    without_dropout(model)
    chosen = [layer_stack(model.get_base_model())[0]]
    chosen += [module for module in model.modules() if type(module).__name__ in ("BloomAttention", "LlamaRMSNorm")]
    for module in chosen:
        module.forward = partial(type(module).forward, module)  # type: ignore[method-assign]
    own = [module.forward for module in chosen]
    _, engine = epochs(model, task, keep=True)
    assert engine.padding is not None and engine.padding.frozen is not None and engine.padding.frozen.hits
    assert [module.__dict__.get("forward") for module in chosen] == own


def test_nothing_is_cached_where_noise_is_added() -> None:
    model, task = model_and_task("llama")
    without_dropout(model)
    engine = Engine(model, task, keep_frozen=True, neftune_alpha=5.0)
    assert engine.padding is not None and engine.padding.frozen is None
    assert [note.partition(": ")[2] for note in engine.notes] == ["train.neftune_alpha adds noise"] * 2
    assert engine.notes[0].startswith("the frozen layers are computed in every epoch")
    engine.close()


def test_the_cache_and_the_activations_draw_from_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache has taken, or will take, is not promised to the activations too."""
    free, taken = 10**9, 10**8
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr("psutil.Process.memory_info", lambda self: SimpleNamespace(rss=taken))
    for limit, whole in (("auto", AUTO_SHARE * free), (6 * 10**8, 5.0 * 10**8), (None, AUTO_SHARE * free)):
        model, task = model_and_task("llama")
        (batch,) = StepCollator(PadCollator(0), task, 8)([{"input_ids": [5] * 10, "labels": [5] * 10}])["batches"]
        rooms, held = {}, {}
        for tokens in (0, 10, 40, None):
            engine = Engine(
                model,
                task,
                keep_frozen=tokens != 0,
                frozen_tokens=None if tokens is None else partial(int, tokens),
                memory_budget=limit,
            )  # type: ignore[arg-type]
            with engine.loss(model, batch) as loss:
                loss.backward()
            rooms[tokens] = engine.recompute._budget.for_activations()
            assert engine.padding is not None
            cache = engine.padding.frozen
            held[tokens] = (cache.store.memory_bytes, cache.store.promised()) if cache else (0, 0)
            engine.close()
        row = 10 * 32 * 4
        assert held[10] == (held[10][0], 0) and held[40][1] == 3 * row
        assert held[None][1] == held[None][0] - row and held[None][0] < 0.25 * whole  # it may be all of its share
        for tokens in (10, 40, None):
            assert rooms[tokens] == pytest.approx(rooms[0] - held[tokens][1])
        assert rooms[None] + held[None][0] <= whole
