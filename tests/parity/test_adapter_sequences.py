"""Random sequences of calls on several adapters of one model, compared with live peft and with each adapter alone."""

import copy
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_many_adapters import IDS, answer, bert, is_base, near, same, shake, state

import siliang
from siliang.types import ConfigError, MergeError

STEPS = 14


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Both libraries warn that merged adapters are unmerged, and which adapter is active after a deletion."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


# ---- beside peft ----

# kind, settings of each adapter; the first layer is all adapters': peft takes the next active one from there
BESIDE_PEFT: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "lora": (
        "LoraConfig",
        {
            "one": {"target_modules": ["query"], "r": 2},
            "two": {"target_modules": ["query", "dense"], "r": 4, "use_rslora": True},
            "three": {"target_modules": ["query", "key"]},
            "four": {"target_modules": ["query"], "lora_bias": True},
        },
    ),
    "lora and heads": (
        "LoraConfig",
        {
            "one": {"target_modules": ["query"], "task_type": "SEQ_CLS"},
            "two": {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
            "three": {"target_modules": ["query"], "modules_to_save": ["pooler"], "task_type": "SEQ_CLS"},
        },
    ),
    "dora": (
        "LoraConfig",
        {
            "one": {"target_modules": ["query"], "use_dora": True},
            "two": {"target_modules": ["query", "value"], "use_dora": True, "r": 3},
        },
    ),
    "ia3": (
        "IA3Config",
        {
            "one": {"target_modules": ["query"], "feedforward_modules": []},
            "two": {"target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"]},
        },
    ),
    "ln": (
        "LNTuningConfig",
        {
            "one": {"target_modules": ["LayerNorm"]},
            "two": {"target_modules": ["LayerNorm"], "modules_to_save": ["pooler"]},
        },
    ),
}


def set_adapter(model: Any, names: list[str]) -> None:
    if isinstance(model, siliang.PeftModel):
        model.set_adapter(names)
    else:
        model.active_adapter = names[0]  # peft's own stays at one that is deleted
        model.base_model.set_adapter(names if len(names) > 1 else names[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", BESIDE_PEFT)
def test_as_peft(kind: str, seed: int, tmp_path: Path) -> None:
    """Where peft does something, we do the same or raise; where we raise, nothing has changed."""
    kind_of, settings = BESIDE_PEFT[kind]
    choose = random.Random(seed)
    first = next(iter(settings))
    models: dict[Any, Any] = {}
    for library in (siliang, peft):
        config = getattr(library, kind_of)(**copy.deepcopy(settings[first]))
        models[library] = library.get_peft_model(bert(), config, adapter_name=first).eval()
    there = [first]

    def fill(name: str) -> None:
        """Random values for our adapter, and the same for peft's."""
        ours = models[siliang]
        for p in ours.injection.adapters[name].parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + len(name)))
        tensors = siliang.get_peft_model_state_dict(ours, adapter_name=name)
        peft.set_peft_model_state_dict(models[peft], tensors, adapter_name=name)

    fill(first)
    done: list[str] = []
    for _ in range(STEPS):
        missing = [name for name in settings if name not in there]
        name, some = choose.choice(there or [""]), choose.sample(there, k=min(len(there), choose.choice((1, 1, 2))))
        what = choose.choice(
            ["add", "load", "set", "set", "merge", "merge", "unmerge", "delete", "disable"] if there else ["add"]
        )
        if what in ("add", "load") and not missing:
            continue
        if what == "delete" and len(there) == 1:
            continue
        if what in ("add", "load"):
            name = missing[0]
        done.append(f"{what} {name} {some}")

        def step(
            library: Any, model: Any, what: str = what, name: str = name, some: list[str] = some, *, merged: Any
        ) -> Any:
            if what == "add":
                return model.add_adapter(name, getattr(library, kind_of)(**copy.deepcopy(settings[name])))
            if what == "load":
                return model.load_adapter(str(tmp_path / name), name)
            if what == "set":
                return set_adapter(model, some)
            if what == "merge":
                return model.merge_adapter(some)
            if what == "unmerge":
                return model.unmerge_adapter()
            if what == "delete":
                model.delete_adapter(name)
                if library is peft:  # it leaves layers with different active adapters, and a head without its own
                    set_adapter(model, model.active_adapters)
                return None
            if library is peft and merged:
                return None  # it would have nothing merged behind the block
            with model.disable_adapter():
                return answer(model)

        if what == "load":
            maker = siliang.get_peft_model(
                bert(), getattr(siliang, kind_of)(**copy.deepcopy(settings[name])), adapter_name=name
            )
            shake(maker, seed)
            maker.save_pretrained(tmp_path)
        before, kept = state(models[siliang]), {k: copy.deepcopy(m) for k, m in models.items()}
        refused: dict[Any, Exception] = {}
        given: dict[Any, Any] = {}
        for library, model in models.items():
            try:
                given[library] = step(library, model, merged=before["adapters"][2])
            except (ConfigError, MergeError, ValueError) as error:
                assert library is peft or isinstance(error, ConfigError | MergeError), done
                refused[library] = error
        if refused:
            assert siliang not in refused or same(before, state(models[siliang])), done
            models = kept  # peft leaves half of it behind where it refuses, and refuses what we can do
            continue
        if what in ("add", "load"):
            there.append(name)
            if what == "add":
                fill(name)
        elif what == "delete":
            there.remove(name)
        elif what == "disable":
            assert torch.equal(given[siliang], answer(bert())), done
        ours, theirs = models[siliang], models[peft]
        if what == "delete" and ours.injection.merged:
            break  # there was no way for peft to be put right without unmerging
        assert near(answer(ours), answer(theirs)), done
        assert ours.active_adapters == theirs.active_adapters, done
        flags = {n for n, p in ours.named_parameters() if p.requires_grad}
        # peft trains what was loaded for inference, once set; its merged norms change places with what is trained
        if "load" not in str(done) and "disable" not in str(done) and not (kind == "ln" and ours.injection.merged):
            assert flags == {n for n, p in theirs.named_parameters() if p.requires_grad}, done
    assert is_base(models[siliang].unload(), bert())


# ---- beside each adapter alone ----

MIXED: dict[str, Any] = {
    "lora": siliang.LoraConfig(target_modules=["query"], r=2, modules_to_save=["classifier"]),
    "all": siliang.LoraConfig(target_modules="all-linear", r=2, bias="all"),
    "only": siliang.LoraConfig(target_modules=["query", "pooler.dense"], r=2, bias="lora_only"),
    "dora": siliang.LoraConfig(target_modules=["query", "value"], r=2, use_dora=True, modules_to_save=["pooler"]),
    "pissa": siliang.LoraConfig(target_modules=["query", "key"], r=2, init_lora_weights="pissa"),
    "words": siliang.LoraConfig(target_modules=["query", "word_embeddings"], r=2),
    "ln": siliang.LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["classifier"]),
    "bitfit": siliang.BitFitConfig(),
    "bitfit2": siliang.BitFitConfig(task_type="SEQ_CLS"),  # type: ignore[arg-type]
    "block": siliang.LoraConfig(target_modules=["query"], r=2, modules_to_save=["layer.1"]),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Each adapter, trained and saved alone, and its outputs."""
    folder, answers = tmp_path_factory.mktemp("alone"), {"__base__": answer(bert())}
    for seed, (name, config) in enumerate(MIXED.items()):
        model = siliang.get_peft_model(bert(), config, adapter_name=name)
        shake(model, seed, 0.1)
        answers[name] = answer(model.eval())
        assert not near(answers[name], answers["__base__"], 1e-2)
        model.save_pretrained(folder)
    return folder, answers


@pytest.mark.parametrize("seed", range(12))
def test_as_each_alone(seed: int, alone: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """After any sequence an adapter computes and is saved as if it were alone; errors change nothing."""
    folder, answers = alone
    choose = random.Random(100 + seed)
    first = choose.choice(list(MIXED))
    model: Any = siliang.PeftModel.from_pretrained(bert(), folder / first, adapter_name=first)
    done = [first]

    def right(names: list[str], share: float = 1e-4) -> None:
        """The model's outputs with these active are the expected ones, where those are known."""
        if len(names) == 1:
            assert near(answer(model), answers[names[0]], share), done

    def step(what: str, name: str, some: list[str]) -> None:
        if what == "load":
            model.load_adapter(folder / name, name, is_trainable=choose.random() < 0.5)
        elif what == "add":
            model.add_adapter(name, MIXED[name])
            siliang.set_peft_model_state_dict(model, load_file(folder / name / "adapter_model.safetensors"), name)
        elif what == "set":
            model.set_adapter(some)
            right(some)
        elif what == "merge":
            model.merge_adapter(some, safe_merge=True)
        elif what == "unmerge":
            model.unmerge_adapter()
            right(model.active_adapters)
        elif what == "delete":
            model.delete_adapter(name)
        elif what == "disable":
            with model.disable_adapter():
                assert torch.equal(answer(model), answers["__base__"]), done
                assert model.active_adapter in (*MIXED, None)
        elif what == "rows":
            rows = [*some, "__base__"]
            order = [choose.randrange(2) for _ in rows]
            found = answer(model, IDS[order], adapter_names=rows)
            assert near(found, torch.stack([answers[n][i] for n, i in zip(rows, order, strict=True)])), done
        elif what == "save":
            model.save_pretrained(tmp_path, selected_adapters=[name])
            files = [load_file(place / name / "adapter_model.safetensors") for place in (tmp_path, folder)]
            assert same(*files), done
        elif what == "for good":
            twin = copy.deepcopy(model)
            merged, at_work = twin.injection.merged, twin.active_adapters
            plain = twin.merge_and_unload()
            assert [n for n, _ in plain.named_parameters()] == [n for n, _ in bert().named_parameters()]
            if len({*merged, *at_work}) == 1:
                assert near(answer(plain), answers[(*merged, *at_work)[0]]), done

    kinds = [
        "load",
        "load",
        "add",
        "set",
        "set",
        "set",
        "merge",
        "unmerge",
        "delete",
        "disable",
        "rows",
        "save",
        "for good",
    ]
    for _ in range(STEPS * 2):
        there = list(model.peft_config)
        what = choose.choice(kinds)
        if what in ("load", "add"):
            name = choose.choice([n for n in MIXED if n not in there] or there)
        elif not there:
            continue
        else:
            name = choose.choice(there)
        some = choose.sample(there, k=min(len(there), choose.choice((1, 1, 2, 3)))) if there else []
        done.append(f"{what} {name} {some}")
        before = state(model)
        try:
            step(what, name, some)
        except (ConfigError, MergeError):
            assert same(before, state(model)), done
        else:
            if what in ("disable", "rows", "save", "for good"):
                assert same(before, state(model)), done
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        held = {id(p) for n in model.peft_config for p in model.injection.adapters[n].parameters()}
        assert all(id(p) in held for n, p in model.named_parameters() if n in trained), done
        if what == "delete" and not model.injection.merged:
            right(model.active_adapters)
    assert is_base(model.unload(), bert()), done
    assert torch.equal(answer(model.get_base_model()), answers["__base__"])
