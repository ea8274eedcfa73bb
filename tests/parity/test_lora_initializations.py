"""LoRA's other initializations, and the embedding, as in the live `peft`: PiSSA, OLoRA, LoftQ, orthogonal, MiCA."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close
from tiny import TASK, batch, make

import siliang
from siliang.methods.loftq import loftq
from siliang.methods.orthogonal import orthogonal
from siliang.methods.pissa import pissa, pissa_niter
from siliang.types import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore:.*save_embedding_layers.*")


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(name)).logits


# PEFT's OLoRA takes Conv1D's weight the wrong way round
@pytest.mark.parametrize(
    ("init", "name"), [("pissa", "llama"), ("pissa", "gpt2"), ("pissa", "bert"), ("olora", "llama"), ("olora", "bert")]
)
def test_pissa_and_olora(init: str, name: str, tmp_path: Path) -> None:
    settings = {"init_lora_weights": init, "task_type": TASK[name], "r": 4, "lora_alpha": 8}
    ours: Any = siliang.get_peft_model(make(name), siliang.LoraConfig(**settings))
    theirs: Any = peft.get_peft_model(make(name), peft.LoraConfig(**settings))  # type: ignore[arg-type]
    # at first it is the base model, and the product of A and B is PEFT's: the signs of a decomposition are free
    assert_close(logits(ours.eval(), name), logits(make(name), name))
    state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert state.keys() == theirs_state.keys()
    for key in state:
        if key.endswith("lora_A.default.weight"):
            other = key.replace("lora_A", "lora_B")
            assert_close(state[other] @ state[key], theirs_state[other] @ theirs_state[key])
        elif "base_layer" in key:
            assert_close(state[key], theirs_state[key])
    # files go both ways, trained
    theirs.load_state_dict(state)
    for model in (ours, theirs):
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.data *= 1.5
    wanted = logits(theirs.eval(), name)
    assert_close(logits(ours, name), wanted)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    here = siliang.PeftModel.from_pretrained(make(name), tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    assert_close(logits(here, name), wanted)
    assert_close(logits(there, name), wanted)


def test_pissa_with_few_iterations_is_nearly_pissa() -> None:
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(48, 32), full_matrices=False)
    W = U * torch.tensor([9.0, 7.0, 5.0, 3.0] + [0.05] * 28) @ Vh
    exact, quick = pissa(W, 4, 2.0), pissa_niter(W, 4, 2.0, iterations=8)
    assert exact.B is not None and quick.B is not None
    torch.testing.assert_close(quick.B @ quick.A, exact.B @ exact.A, rtol=1e-2, atol=1e-2)
    for found in (exact, quick):
        assert found.B is not None and found.W is not None
        assert_close(found.W + 2.0 * (found.B @ found.A), W)


def test_orthogonal_draws_what_peft_draws() -> None:
    layer: Any = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))  # type: ignore[arg-type]
    layer = layer.base_model.model.model.layers[0].self_attn.q_proj
    torch.manual_seed(3)
    layer.orthogonal_init("default")
    torch.manual_seed(3)
    found = orthogonal(layer.weight, 4, 2.0)
    A, B = found.A, found.B
    assert B is not None and torch.equal(A, layer.lora_A.default.weight) and torch.equal(B, layer.lora_B.default.weight)
    assert (B @ A).abs().max() < 1e-6 < A.abs().max()


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"r": 3}, "r = 3: each layer's r must be even"),
        ({"rank_pattern": {"q_proj": 5}}, "r = 5: each layer's r must be even"),
    ],
)
def test_orthogonal_needs_an_even_rank(settings: dict[str, Any], where: str) -> None:
    settings = {"init_lora_weights": "orthogonal", "target_modules": ["q_proj"]} | settings
    with pytest.raises(ConfigError, match=where):
        siliang.get_peft_model(make("llama"), siliang.LoraConfig(**settings))
    with pytest.raises(ValueError):
        peft.get_peft_model(make("llama"), peft.LoraConfig(**settings))


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["q_proj", "v_proj"]), ("llama", ["embed_tokens"]), ("gpt2", ["c_attn"]), ("bert", ["query"])],
)
@pytest.mark.parametrize("init", ["orthogonal", "mica"])
def test_initializations_that_leave_the_weight(init: str, name: str, targets: list[str], tmp_path: Path) -> None:
    """Names, initial values, gradients, five steps, and files both ways."""
    if init == "orthogonal" and "embed_tokens" in targets:
        pytest.skip("linear layers alone")
    settings = {"init_lora_weights": init, "task_type": TASK[name], "r": 4, "lora_alpha": 8, "target_modules": targets}
    ours: Any = siliang.get_peft_model(make(name), siliang.LoraConfig(**settings))
    theirs: Any = peft.get_peft_model(make(name), peft.LoraConfig(**settings))  # type: ignore[arg-type]
    assert_close(logits(ours.eval(), name), logits(make(name), name))
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert state.keys() == theirs_state.keys()
    if init == "mica":
        assert not any(".lora_B" in n for n in trained)
        for key in (k for k in state if "lora_" in k):  # signs of a decomposition are free
            assert_close(state[key].abs(), theirs_state[key].abs())
    theirs.load_state_dict(state)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, theirs)]
    for _ in range(5):
        for model, optimizer in zip((ours.train(), theirs.train()), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(0)
            model(**batch(name)).loss.backward()
        assert_all_close(
            {n: p.grad for n, p in ours.named_parameters() if p.requires_grad},
            {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad},
        )
        for optimizer in optimizers:
            optimizer.step()
    wanted = logits(theirs.eval(), name)
    assert_close(logits(ours.eval(), name), wanted)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    here = siliang.PeftModel.from_pretrained(make(name), tmp_path / "theirs", is_trainable=True)
    there = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    assert {n for n, p in here.named_parameters() if p.requires_grad} == trained
    assert here.peft_config["default"].init_lora_weights == init
    assert_close(logits(here.eval(), name), wanted)
    assert_close(logits(there, name), wanted)
    merged = here.merge_and_unload()
    assert_close(logits(merged, name), wanted)


def test_mica_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match="r = 40, and a layer has 32 rows or columns"):
        siliang.get_peft_model(make("llama"), siliang.LoraConfig(init_lora_weights="mica", r=40))
    for other in ({"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(ConfigError, match=r"'mica' and .* do not go together: MiCA trains A alone"):
            siliang.LoraConfig(init_lora_weights="mica", **other)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_corrects_the_error_of_quantization(bits: int) -> None:
    """PEFT's own needs CUDA. With the factors the rounded weight is nearer to W than alone; more rounds help."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    W = torch.randn(64, 64) @ torch.diag(torch.linspace(3, 0.1, 64)) @ torch.randn(64, 64)
    distances = []
    for rounds in (1, 5):
        found = loftq(W, 8, 1.0, bits=bits, iterations=rounds)
        assert found.B is not None and found.W is not None
        distances.append(((W - found.W - found.B @ found.A).norm() / W.norm()).item())
    alone = loftq(W, 8, 1.0, bits=bits, iterations=1).W
    assert alone is not None and distances[0] < (W - alone).norm().item() / W.norm().item()
    assert distances[1] < distances[0]


@pytest.mark.parametrize("settings", [{}, {"r": 4, "lora_alpha": 16, "use_rslora": True}], ids=str)
@pytest.mark.parametrize(("name", "target"), [("llama", "embed_tokens"), ("bloom", "word_embeddings"), ("gpt2", "wte")])
def test_lora_on_an_embedding(name: str, target: str, settings: dict[str, Any], tmp_path: Path) -> None:
    settings = settings | {"init_lora_weights": False, "task_type": TASK[name], "target_modules": [target]}
    ours: Any = siliang.get_peft_model(make(name), siliang.LoraConfig(**settings))
    theirs: Any = peft.get_peft_model(make(name), peft.LoraConfig(**settings))
    theirs.load_state_dict(ours.state_dict())
    results = []
    for model in (ours.eval(), theirs.eval()):
        out = model(**batch(name))
        out.loss.backward()
        results.append((out.logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert_close(results[0][0], results[1][0])
    assert_all_close(results[0][1], results[1][1])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")  # with the base's embedding along
    here = siliang.PeftModel.from_pretrained(make(name), tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    assert_close(logits(here, name), results[1][0].detach())
    assert_close(logits(there, name), results[1][0].detach())


def test_resized_embeddings_are_saved_with_the_adapter(tmp_path: Path) -> None:
    """PEFT saves resized embeddings with the adapter; they belong to it."""
    theirs_base: Any = make("llama")
    theirs_base.resize_token_embeddings(124, mean_resizing=False)
    theirs: Any = peft.get_peft_model(theirs_base, peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    base: Any = make("llama", seed=0)
    torch.manual_seed(9)  # other new rows
    base.resize_token_embeddings(124, mean_resizing=False)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    ours = siliang.PeftModel.from_pretrained(base, tmp_path)
    inputs = {"input_ids": torch.tensor([[5, 121, 123, 7]])}
    assert_close(ours(**inputs).logits, theirs.eval()(**inputs).logits)
    assert all(torch.equal(v, before[k]) for k, v in ours.unload().state_dict().items())


def test_a_wrong_name_among_several_targets_is_an_error() -> None:
    """PEFT #1959: of several target names a wrong one passes silently there."""
    targets = ["q_proj", "v_porj"]
    peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=targets))  # type: ignore[arg-type]
    with pytest.raises(siliang.SiliangError, match="'v_porj' matches no module"):
        siliang.get_peft_model(make("llama"), siliang.LoraConfig(target_modules=targets))


def test_where_peft_refuses_gradient_checkpointing() -> None:
    base: Any = make("llama")
    siliang.prepare_model_for_kbit_training(base)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))  # type: ignore[arg-type]
