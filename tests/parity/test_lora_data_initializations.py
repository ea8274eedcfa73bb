"""LoRA's initializations from data, compared with the live `peft`: EVA, CorDA, LoRA-GA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close
from peft.tuners.lora import preprocess_loraga
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from tiny import TASK, batch, make

import siliang
from siliang.methods.corda import covariances, decompose
from siliang.methods.lora_ga import factors
from siliang.types import AdapterError, ConfigError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fan_in_fan_out.*",
    "ignore:lora with eva initialization",
    "ignore:`loss_type=None`",
    "ignore:Full backward hook is firing",
    "ignore:`(corda|lora_ga)_config` specified",
    "ignore:CorDA changes the base weights",
    "ignore:Using Rank-Stabilized LoRA with rank_pattern",
)
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
THEIRS: dict[str, Any] = {"eva": peft.EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig}
OURS: dict[str, Any] = {"eva": siliang.EvaConfig, "corda": siliang.CordaConfig, "lora_ga": siliang.LoraGAConfig}


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(name)).logits


def texts(n: int, rows: int = 1, length: int = 20) -> list[dict[str, torch.Tensor]]:
    """Batches with padding in their first row, of which the first tokens are not learned."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(n):
        ids = torch.randint(3, 90, (rows, length), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        labels[:, :3] = -100
        if rows > 1:
            mask[0, length - 4 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def settings(name: str, init: str, targets: list[str], **more: Any) -> dict[str, Any]:
    start = {"init_lora_weights": init, "task_type": TASK[name], "target_modules": targets}
    return {"r": 4, "lora_alpha": 12} | start | more


def attached(name: str, init: str, targets: list[str], own: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """An adapter of each library, initialized with "corda" or "lora_ga"."""
    given, models = settings(name, init, targets, **more), []
    for library, kinds in ((siliang, OURS), (peft, THEIRS)):
        config = library.LoraConfig(**given, **{f"{init}_config": kinds[init](**own)})
        model: Any = make(name)
        if init == "corda":
            preprocess: Any = siliang.preprocess_corda if library is siliang else preprocess_corda
            preprocess(model, config, lambda model=model: [model(input_ids=t["input_ids"]) for t in texts(12)])
        else:
            preprocess = siliang.preprocess_loraga if library is siliang else preprocess_loraga
            preprocess(model, config, lambda model=model: [loss(model, name, t).backward() for t in texts(12)])
        models.append(library.get_peft_model(model, config))
    return models[0], models[1]


def loss(model: Any, name: str, text: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = text["input_ids"] if TASK[name] == "CAUSAL_LM" else torch.tensor([1])
    return model(input_ids=text["input_ids"], labels=labels).loss


def five_steps(ours: Any, theirs: Any, name: str) -> None:
    """Trains both; the losses and the gradients of each step are the same."""
    models, losses = (ours, theirs), list[torch.Tensor]()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in models]
    for _ in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(model.eval()(**batch(name)).loss)
            losses[-1].backward()
        assert_close(*losses[-2:])
        assert_all_close(*({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in models))
        for optimizer in optimizers:
            optimizer.step()


# ---- EVA ----


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", LLAMA), ("gpt2", ["c_attn", "c_proj"]), ("bert", ["query", "key", "output.dense"])],
)
@pytest.mark.parametrize(
    "own",
    [{}, {"rho": 1.0}, {"rho": 3.0, "tau": 0.9, "adjust_scaling_factors": False, "use_label_mask": False}],
    ids=str,
)
def test_eva(own: dict[str, Any], name: str, targets: list[str], tmp_path: Path) -> None:
    rows = [t if TASK[name] == "CAUSAL_LM" else {k: v for k, v in t.items() if k != "labels"} for t in texts(4, rows=6)]
    given = settings(name, "eva", targets, rank_pattern={targets[-1]: 3}, use_rslora=name == "bert")
    ours: Any = siliang.get_peft_model(make(name), siliang.LoraConfig(**given, eva_config=siliang.EvaConfig(**own)))
    theirs: Any = peft.get_peft_model(make(name), peft.LoraConfig(**given, eva_config=peft.EvaConfig(**own)))
    found = siliang.get_eva_state_dict(ours, rows)
    wanted = peft.get_eva_state_dict(theirs, rows, show_progress_bar=False)
    assert list(found) == list(wanted)
    assert {n: A.shape for n, A in found.items()} == {n: A.shape for n, A in wanted.items()}
    # the decompositions are in fp64, and what is trained in fp32
    assert_all_close(*({n: A.float() for n, A in one.items() if len(A)} for one in (found, wanted)))
    bare = siliang.get_eva_state_dict(make(name), rows, ours.peft_config["default"])
    assert_all_close(bare, {n.removeprefix("base_model.model."): A for n, A in found.items()})
    siliang.initialize_lora_eva_weights(ours, rows)
    peft.initialize_lora_eva_weights(theirs, rows, show_progress_bar=False)
    state, their_state = ours.state_dict(), theirs.state_dict()
    assert state.keys() == their_state.keys()
    assert_all_close(state, their_state)
    config, their_config = ours.peft_config["default"], theirs.peft_config["default"]
    assert config.rank_pattern == their_config.rank_pattern and config.alpha_pattern == their_config.alpha_pattern
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    assert_close(logits(ours.eval(), name), logits(make(name), name))
    five_steps(ours, theirs, name)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    here: Any = siliang.PeftModel.from_pretrained(make(name), tmp_path / "theirs")
    there: Any = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    assert here.peft_config["default"].init_lora_weights == "eva"
    for model in (here, there):
        assert_close(logits(model, name), logits(ours, name))


def test_eva_whitens_once() -> None:
    """peft divides the components in place: those of layers that read the same, as q, k and v, once for each layer."""
    rows, found = texts(4, rows=6), {}
    for library, kinds in ((siliang, OURS), (peft, THEIRS)):
        for targets in (["q_proj"], ["q_proj", "v_proj"]):
            config = library.LoraConfig(
                **settings("llama", "eva", targets), eva_config=kinds["eva"](rho=1.0, whiten=True)
            )
            state = library.get_eva_state_dict(make("llama"), rows, config, show_progress_bar=False)
            found[library, len(targets)] = state["model.layers.0.self_attn.q_proj"].float()
    assert_close(found[siliang, 1], found[peft, 1])
    assert_close(found[siliang, 2], found[siliang, 1])
    assert (found[peft, 2] - found[peft, 1]).abs().max() > 1e-2


def test_eva_of_the_users_own_functions() -> None:
    """Rows of each layer's own choice, and a forward of the user's."""
    rows = [t["input_ids"] for t in texts(3, rows=6)]
    paths = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    found: list[dict[str, torch.Tensor]] = []
    for library, kinds in ((siliang, OURS), (peft, THEIRS)):
        config = library.LoraConfig(**settings("llama", "eva", ["q_proj"]), eva_config=kinds["eva"]())
        model = library.get_peft_model(make("llama"), config)
        own: dict[str, Callable[..., torch.Tensor]] = {
            paths[0]: lambda x, inputs, name: x[0][:, 2:].flatten(0, 1),
            paths[1]: lambda x, inputs, name: x[0].flatten(0, 1)[inputs.flatten() > 20],
        }
        found.append(
            library.get_eva_state_dict(
                model,
                rows,
                forward_fn=lambda model, ids: model(input_ids=ids),
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=dict(own),
                show_progress_bar=False,
            )
        )
    assert_all_close(*found)


def test_eva_says_what_it_needs() -> None:
    model: Any = siliang.get_peft_model(make("llama"), siliang.LoraConfig(**settings("llama", "eva", ["q_proj"])))
    assert model.peft_config["default"].eva_config == siliang.EvaConfig()
    with pytest.raises(ConfigError, match=r"EVA needs 8 tokens in a batch for model\.layers\.0\.self_attn\.q_proj"):
        siliang.initialize_lora_eva_weights(model, texts(2, rows=1, length=10))
    with pytest.raises(ConfigError, match="gives no batches"):
        siliang.initialize_lora_eva_weights(model, [])
    with pytest.raises(ConfigError, match="Give a dataloader, or eva_state_dict"):
        siliang.initialize_lora_eva_weights(model)
    with pytest.raises(ConfigError, match="nothing' is no layer of the adapter"):
        siliang.get_eva_state_dict(model, texts(1), prepare_layer_inputs_fn={"base_model.model.nothing": len})
    plain: Any = siliang.get_peft_model(make("llama"), siliang.LoraConfig())
    with pytest.raises(ConfigError, match="init_lora_weights = 'eva' that is active alone"):
        siliang.initialize_lora_eva_weights(plain, texts(2))
    for wrong in ({"rho": 0.5}, {"tau": 1.5}):
        with pytest.raises(ConfigError, match="eva_config: "):
            siliang.LoraConfig(init_lora_weights="eva", eva_config=wrong)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="eva_config is ignored"):
        siliang.LoraConfig(eva_config=siliang.EvaConfig())
    directions = siliang.get_eva_state_dict(model, texts(3, rows=6))
    with pytest.warns(UserWarning, match="no initialization for 1 layers"):
        siliang.initialize_lora_eva_weights(model, eva_state_dict=dict(list(directions.items())[:1]))


# ---- CorDA and LoRA-GA ----


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", LLAMA), ("gpt2", ["c_attn", "c_proj"]), ("bert", ["query", "output.dense"])],
)
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(method: str, name: str, targets: list[str]) -> None:
    more: dict[str, Any] = {"use_rslora": True, "rank_pattern": {targets[-1]: 2}, "alpha_pattern": {targets[0]: 6}}
    ours, theirs = attached(name, "corda", targets, {"corda_method": method}, **more)
    state, their_state = ours.state_dict(), theirs.state_dict()
    assert state.keys() == their_state.keys()
    for key in (k for k in state if "base_layer.weight" in k):  # C^-1 makes roundings larger by C's condition
        assert_close(state[key], their_state[key], roundings=4096)
    assert_close(logits(ours.eval(), name), logits(make(name), name))
    theirs.load_state_dict(state)
    five_steps(ours, theirs, name)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("fp16", [False, True])
def test_cordas_parts(fp16: bool, method: str) -> None:
    """The covariance, and from the same one the decomposition, bit for bit."""
    own = CordaConfig(corda_method=method, use_float16_for_covariance=fp16, prune_temporary_fields=False)  # type: ignore[arg-type]
    base: Any = make("llama").to(torch.bfloat16)
    config: Any = peft.LoraConfig(**settings("llama", "corda", LLAMA), corda_config=own)
    preprocess_corda(base, config, lambda: [base(input_ids=t["input_ids"]) for t in texts(12)])
    layers = {n: m for n, m in base.named_modules() if n.rpartition(".")[2] in LLAMA}
    found = covariances(layers, lambda: [base(input_ids=t["input_ids"]) for t in texts(12)], wide=not fp16)
    for path, layer in layers.items():
        assert_close(found[path], layer.covariance_matrix)
        U, S, V = decompose(layer.weight, layer.covariance_matrix, 4, method)  # type: ignore[arg-type]
        assert torch.equal(U, layer.eigens.U_WC) and torch.equal(S, layer.eigens.S_WC)
        assert torch.equal(V, layer.eigens.V_WC.T)


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_gas_factors(direction: str, scale: str) -> None:
    """From the same gradient and the same random numbers."""
    own: dict[str, Any] = {"direction": direction, "scale": scale, "stable_gamma": 9}
    given = settings("llama", True, ["q_proj"])  # type: ignore[arg-type]
    layer: Any = peft.get_peft_model(make("llama"), peft.LoraConfig(**given)).base_model.model.model.layers[0]
    layer = layer.self_attn.q_proj
    W, G = layer.base_layer.weight.detach().clone(), torch.randn(layer.base_layer.weight.shape)
    layer.base_layer._peft_loraga_grad = G
    torch.manual_seed(2)
    layer.lora_ga_init("default", LoraGAConfig(**own))
    torch.manual_seed(2)
    A, B = factors(W, G, 4, layer.scaling["default"], siliang.LoraGAConfig(**own))
    assert_close(A, layer.lora_A.default.weight)
    assert_close(B, layer.lora_B.default.weight)
    assert_close(W - layer.scaling["default"] * (B @ A), layer.base_layer.weight)


# With r = 8 all directions of the layers are decomposed, and no random number counts.
@pytest.mark.parametrize(("name", "targets"), [("llama", ["q_proj", "v_proj"]), ("bert", ["query", "value"])])
def test_lora_ga(name: str, targets: list[str]) -> None:
    ours, theirs = attached(name, "lora_ga", targets, {}, r=8)
    state, their_state = ours.state_dict(), theirs.state_dict()
    assert state.keys() == their_state.keys()
    for key in (k for k in state if k.endswith("lora_A.default.weight")):  # signs of a decomposition are free
        other = key.replace("lora_A", "lora_B")
        parts = ({part: one[part].abs() for part in (key, other)} for one in (state, their_state))
        assert_all_close(*parts)
    assert_close(logits(ours.eval(), name), logits(make(name), name))
    theirs.load_state_dict(state)
    five_steps(ours, theirs, name)


def test_lora_gas_stable_scale_on_conv1d() -> None:
    """peft takes Conv1D's inputs for its outputs."""
    ours, theirs = attached("gpt2", "lora_ga", ["c_attn"], {}, r=8)
    state, their_state = ours.state_dict(), theirs.state_dict()
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_B.default.weight"
    inputs, outputs = state[key.replace("lora_B.default", "base_layer")].shape
    assert_close(state[key].abs() / outputs**0.25, their_state[key].abs() / inputs**0.25)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
@pytest.mark.parametrize("patterns", [False, True])
def test_what_is_saved_opens_everywhere(init: str, patterns: bool, tmp_path: Path) -> None:
    """As LoRA of twice the rank on the base model's own weights; with its first A and B, for resuming."""
    more = {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 6}} if patterns else {}
    ours, _ = attached("llama", init, ["q_proj", "v_proj", "embed_tokens"][: 2 if init == "corda" else 3], {}, **more)
    ours.eval()
    for n, p in ours.named_parameters():
        if "lora_B" in n:
            p.data *= 1.5
    wanted, base = logits(ours, "llama"), logits(make("llama"), "llama")
    assert (wanted - base).abs().max() > 1e-4
    with ours.disable_adapter():
        assert torch.equal(logits(ours, "llama"), base)
    ours.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "siliang_training.safetensors").exists()
    for library in (siliang, peft):
        again = library.PeftModel.from_pretrained(make("llama"), tmp_path / "plain").eval()
        assert again.peft_config["default"].init_lora_weights is True and again.peft_config["default"].r == 8
        assert_close(logits(again, "llama"), wanted)
    ours.save_pretrained(tmp_path / "kept", to_resume=True)
    for is_trainable in (False, True):
        again = siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "kept", is_trainable=is_trainable).eval()
        assert again.peft_config["default"] == again.injection.adapters["default"].config
        assert torch.equal(logits(again, "llama"), wanted)
    merged = again.merge_and_unload()
    assert_close(logits(merged, "llama"), wanted)
    assert torch.equal(logits(ours.unload(), "llama"), base)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_file_of_pefts_without_the_initial_factors(init: str, tmp_path: Path) -> None:
    """Its base weight is not known. peft converts it, and then it opens."""
    _, theirs = attached("llama", init, ["q_proj", "v_proj"], {})
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=f"'{init}' changed the base model's weights by data that the files do not"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    for n, p in theirs.named_parameters():
        if "lora_B" in n:
            p.data *= 1.5
    wanted = logits(theirs.eval(), "llama")
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    again = siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "plain")
    assert_close(logits(again, "llama"), wanted)


def test_initializations_in_files(tmp_path: Path) -> None:
    """The second time nothing is run, and the initialization is the same."""
    files = {"cache_file": str(tmp_path / "a" / "parts"), "covariance_file": str(tmp_path / "covariance")}
    config: Any = siliang.LoraConfig(
        **settings("llama", "corda", ["q_proj"]), corda_config=siliang.CordaConfig(**files)
    )
    models: list[Any] = [make("llama") for _ in range(3)]
    siliang.preprocess_corda(models[0], config, lambda: [models[0](input_ids=t["input_ids"]) for t in texts(4)])
    siliang.preprocess_corda(models[1], config)
    (tmp_path / "a" / "parts").unlink()
    siliang.preprocess_corda(models[2], config)
    states = [siliang.get_peft_model(model, config).state_dict() for model in models]
    assert_all_close(states[0], states[1])
    assert_all_close(states[0], states[2])
    config = siliang.LoraConfig(**settings("llama", "lora_ga", ["q_proj"]))
    gradients, models = str(tmp_path / "gradients"), [make("llama"), make("llama")]
    torch.manual_seed(0)
    siliang.preprocess_loraga(models[0], config, lambda: loss(models[0], "llama", texts(1)[0]).backward(), gradients)
    torch.manual_seed(0)
    siliang.preprocess_loraga(models[1], config, lambda: pytest.fail("run again"), gradients)
    assert_all_close(*(siliang.get_peft_model(model, config).state_dict() for model in models))
    other = siliang.LoraConfig(**settings("llama", "lora_ga", ["v_proj"]))
    with pytest.raises(ConfigError, match="is of other layers than these"):
        siliang.preprocess_loraga(make("llama"), other, lambda: None, gradients)
    (tmp_path / "gradients").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        siliang.preprocess_loraga(make("llama"), other, lambda: None, gradients)


def test_what_initializations_refuse() -> None:
    for init, function in (("corda", "preprocess_corda"), ("lora_ga", "preprocess_loraga")):
        config = siliang.LoraConfig(init_lora_weights=init)
        with pytest.raises(ConfigError, match=rf"nothing was learned from data for .*q_proj. Call {function}"):
            siliang.get_peft_model(make("llama"), config)
        with pytest.raises(ConfigError, match="and use_dora do not go together"):
            siliang.LoraConfig(init_lora_weights=init, use_dora=True)
    corda, lora_ga = siliang.LoraConfig(init_lora_weights="corda"), siliang.LoraConfig(init_lora_weights="lora_ga")
    with pytest.raises(ConfigError, match="Give run_model"):
        siliang.preprocess_corda(make("llama"), corda)
    with pytest.raises(ConfigError, match=r"the data does not reach model\.layers\.0\.self_attn\.q_proj"):
        siliang.preprocess_corda(make("llama"), corda, lambda: None)
    with pytest.raises(ConfigError, match=r"no gradient reaches model\.layers\.0\.self_attn\.q_proj"):
        siliang.preprocess_loraga(make("llama"), lora_ga, lambda: None)
    with pytest.raises(ConfigError, match="preprocess_corda is for init_lora_weights = 'corda'"):
        siliang.preprocess_corda(make("llama"), lora_ga)
    with pytest.raises(ConfigError, match="preprocess_loraga is for init_lora_weights = 'lora_ga'"):
        siliang.preprocess_loraga(make("llama"), corda, lambda: None)
    wide, model = siliang.LoraConfig(init_lora_weights="lora_ga", r=10, target_modules=["v_proj"]), make("llama")
    with pytest.raises(ConfigError, match="r = 10, and a layer has 16 rows or columns: it must have 2 r"):
        siliang.preprocess_loraga(model, wide, lambda: loss(model, "llama", texts(1)[0]).backward())
    assert not any(p.grad is not None for p in model.parameters()) and all(p.requires_grad for p in model.parameters())
    model = make("llama")
    siliang.preprocess_loraga(model, lora_ga, lambda: loss(model, "llama", texts(1)[0]).backward())
    with pytest.raises(ConfigError, match="The initialization was learned for r = 8, and the adapter has r = 4"):
        siliang.get_peft_model(model, siliang.LoraConfig(init_lora_weights="lora_ga", r=4))
