"""What is particular to each variant of LoRA, compared with the live `peft`: starts, terms of the loss, refusals."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close, assert_same_losses
from tiny import TASK, batch, make
from transformers import OPTConfig, OPTForCausalLM

import siliang
from siliang.engine.method_hooks import extra_loss
from siliang.engine.padding import PaddingFree
from siliang.peft_api.hotswap import check_hotswap_configs_compatible
from siliang.peft_api.optimizers import create_lorafa_optimizer
from siliang.types import AdapterError, ConfigError, MergeError
from tests.parity.test_every_method import pair


def logits(model: Any, name: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(name)).logits


def adapted(name: str = "llama", seed: int = 0, **settings: Any) -> Any:
    return siliang.get_peft_model(make(name, seed), siliang.LoraConfig(task_type=TASK[name], **settings))


def there(name: str = "llama", seed: int = 0, **settings: Any) -> Any:
    return peft.get_peft_model(make(name, seed), peft.LoraConfig(task_type=TASK[name], **settings))


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    return {key: t for key, t in model.state_dict().items() if key.endswith("base_layer.weight")}


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kasa_config": {"betta": 1.0}}, "kasa_config has no setting 'betta'. Did you mean 'beta'"),
        ({"kasa_config": {"beta": -1.0}}, "kasa_config: beta = -1.0: must be at least 0"),
        ({"kasa_config": {"gamma": "much"}}, "kasa_config: gamma = 'much': must be a number"),
        ({"kasa_config": 3}, "kasa_config = 3: must be a mapping with beta, gamma"),
        (
            {"kasa_config": {}, "use_dora": True},
            "use_dora and kasa_config do not go together: each is a LoRA of its own",
        ),
        ({"kasa_config": {}, "init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' and kasa_config do not go"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        siliang.LoraConfig(**settings)
    with pytest.raises(AdapterError, match=message):
        siliang.LoraConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kasa_config": {}, "r": 32}, "kasa_config: r = 32, and a layer has 32 rows or columns"),
        (
            {"kasa_config": {}, "r": 4, "target_modules": ["embed_tokens"]},
            "kasa_config is for linear layers: leave model",
        ),
    ],
)
def test_layers_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(**settings)


@pytest.mark.parametrize(
    ("variant", "value"),
    [
        ("kasa_config", {}),
        ("alora_invocation_tokens", [3]),
        ("velora_config", {"num_groups": 8}),
        ("use_bdlora", {"target_modules_bd_a": ["proj"]}),
    ],
)
def test_what_needs_a_and_b_alone_refuses_a_variant(variant: str, value: Any) -> None:
    settings = {"r": 4, variant: value}
    model = adapted(**settings)
    with pytest.raises(ConfigError, match=f"adapter 'default' has {variant}"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ConfigError, match=f"adapter 'default' has {variant}"):
        create_lorafa_optimizer(model, 4, 8, 1e-3)
    with pytest.raises(ConfigError, match=f"not with {variant}: use load_adapter"):
        check_hotswap_configs_compatible(siliang.LoraConfig(**settings), siliang.LoraConfig(**settings))


# ---- aLoRA ----

TOKENS = [7, 8]
ALORA: dict[str, Any] = {"r": 4, "init_lora_weights": False, "alora_invocation_tokens": TOKENS}


def aloras(name: str = "llama", **settings: Any) -> tuple[Any, Any]:
    """The same in both libraries."""
    ours, theirs = (give(name, **ALORA, **settings).eval() for give in (adapted, there))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


ROWS = torch.tensor(  # invoked once, twice, nowhere, at the end, and not wholly
    [
        [11, 7, 8, 12, 13, 14, 15, 16],
        [11, 7, 8, 12, 7, 8, 15, 16],
        [11, 12, 13, 7, 14, 8, 15, 16],
        [11, 12, 13, 14, 15, 16, 7, 8],
        [8, 12, 13, 14, 15, 16, 17, 7],
    ]
)
FIRST = (1, 4, 8, 6, 8)  # from which column on the adapter computes


@torch.no_grad()
def test_where_alora_begins() -> None:
    ours, theirs = aloras()
    found = ours(input_ids=ROWS).logits
    assert_close(found, theirs(input_ids=ROWS).logits)
    base: Any = make("llama").eval()
    wanted = base(input_ids=ROWS).logits
    for row, first in enumerate(FIRST):
        assert torch.equal(found[row, :first], wanted[row, :first])
        assert not any(torch.allclose(found[row, t], wanted[row, t]) for t in range(first, 8))
    with ours.disable_adapter():
        assert torch.equal(ours(input_ids=ROWS).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_alora_with_padding(side: str) -> None:
    """Padding is no part of an invocation, whichever token it is."""
    ours, _ = aloras()
    pad = torch.full((len(ROWS), 3), 8)
    ids = torch.cat([pad, ROWS] if side == "left" else [ROWS, pad], 1)
    mask = torch.cat([0 * pad, torch.ones_like(ROWS)] if side == "left" else [torch.ones_like(ROWS), 0 * pad], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = ours(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    assert_close(found, ours(input_ids=ROWS).logits.flatten(0, 1))


def test_alora_on_packed_rows() -> None:
    ours, _ = aloras()
    lengths = (8, 6, 8, 8, 3)
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    ids = ROWS * mask
    padding = PaddingFree(ours.get_base_model())
    grads, logits = [], []
    for packed in (False, True):
        with padding.packed(lengths, 8) if packed else nullcontext():
            out = ours(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
            out.square().mean().backward()
        logits.append(out.detach())
        grads.append({n: p.grad.clone() for n, p in ours.named_parameters() if p.requires_grad})
        ours.zero_grad()
    assert_close(*logits)
    assert_all_close(*grads)


@torch.no_grad()
def test_alora_on_the_base_models_cache() -> None:
    """What it is for: the base model's keys and values serve, up to the invocation."""
    ours, _ = aloras()
    ids = torch.cat([ROWS[:1, 3:], torch.tensor([[7, 8, 20]])], 1)
    whole = ours(input_ids=ids).logits
    with ours.disable_adapter():
        cache = ours(input_ids=ids[:, :5], use_cache=True).past_key_values
    assert_close(ours(input_ids=ids[:, 5:], past_key_values=cache).logits, whole[:, 5:])
    # and its own goes on
    part = ours(input_ids=ids[:, :7], use_cache=True)
    assert_close(ours(input_ids=ids[:, 7:], past_key_values=part.past_key_values).logits, whole[:, 7:])


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
@pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*")
def test_alora_generates_as_without_a_cache(settings: dict[str, Any]) -> None:
    """PEFT refuses beams; without a cache it counts the invocation's place from an end that moves."""
    ours, _ = aloras()
    settings |= {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ROWS)
    found = ours.generate(input_ids=ROWS, attention_mask=mask, **settings)
    again = ours.generate(input_ids=ROWS, attention_mask=mask, **settings, use_cache=False)
    assert found.tolist() == again.tolist()


@torch.no_grad()
def test_aloras_offsets() -> None:
    ours, theirs = aloras()
    offsets = [3, None, 8, 99, 1]
    assert_close(
        ours(input_ids=ROWS, alora_offsets=offsets).logits, theirs(input_ids=ROWS, alora_offsets=offsets).logits
    )


@torch.no_grad()
def test_alora_where_the_head_calls_a_part_of_the_backbone() -> None:
    """OPT's model with a head calls the decoder of its backbone, and not the backbone."""
    config = OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    )
    base = OPTForCausalLM(config).eval()
    settings: dict[str, Any] = {**ALORA, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    ours: Any = siliang.get_peft_model(copy.deepcopy(base), siliang.LoraConfig(**settings)).eval()
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
    theirs.load_state_dict(ours.state_dict())
    offsets = [3, None, 8, 99, 1]
    for arguments in ({}, {"alora_offsets": offsets}, {}):
        assert_close(*(model(input_ids=ROWS, **arguments).logits for model in (ours, theirs)))


def test_what_alora_refuses() -> None:
    ours, _ = aloras()
    with pytest.raises(MergeError, match="aLoRA cannot be merged"):
        ours.merge_adapter()
    with pytest.raises(ConfigError, match="called without input_ids"):
        ours(inputs_embeds=torch.zeros(1, 3, 32))
    ours.add_adapter("plain", siliang.LoraConfig(r=2))
    with pytest.raises(ConfigError, match="need a batch of their own"):
        ours.generate(input_ids=ROWS[:2], adapter_names=["default", "plain"])
    with pytest.raises(ConfigError, match="120 is not a token of the model, which has 120"):
        adapted(alora_invocation_tokens=[7, 120])
    with pytest.raises(ConfigError, match="is for causal language models, not T5"):
        siliang.get_peft_model(make("t5"), siliang.LoraConfig(alora_invocation_tokens=[7]))  # type: ignore[arg-type]
    layer = ours.get_base_model().model.layers[0].self_attn.q_proj
    with pytest.raises(ConfigError, match="a layer's input is \\(2, 3\\) for 5 rows of 8 tokens"):
        ours(input_ids=ROWS)
        layer(torch.zeros(2, 3, 32))


# ---- VeLoRA ----


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("init_type", ["batch_average", "batch_average_once", "random"])
@pytest.mark.parametrize(("name", "groups"), [("llama", 5), ("gpt2", 8), ("bert", 32)])
def test_veloras_steps(init_type: str, name: str, groups: int, tmp_path: Path) -> None:
    """In training mode, where the gradient of A is that of compressed inputs."""
    settings = {"r": 4, "velora_config": {"init_type": init_type, "num_groups": groups, "scale": 1.5}}
    models = [give(name, **settings) for give in (adapted, there)]
    models[1].load_state_dict(models[0].state_dict())
    losses: list[list[float]] = []
    grads: list[dict[str, torch.Tensor]] = []
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = model.config.hidden_dropout_prob = 0.0
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for step in range(5):
            loss = model(**batch(name)).loss
            loss.backward()
            if step == 1:  # when B is no longer zero
                grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert_same_losses(*losses)
    assert_all_close(*grads)
    kept = [{key: t for key, t in m.state_dict().items() if key.endswith("lora_velora_embed.default")} for m in models]
    assert all(t.norm().item() == pytest.approx(1) for t in kept[0].values())
    assert_all_close(*kept)
    models[0].save_pretrained(tmp_path)
    assert_close(
        logits(peft.PeftModel.from_pretrained(make(name), tmp_path).eval(), name), logits(models[0].eval(), name)
    )


def test_velora_is_lora_where_groups_lose_nothing_and_keeps_less() -> None:
    """With as many groups as inputs v is one number: the gradient is LoRA's. With few, less is kept for the backward
    pass."""
    grads, kept = [], []
    for velora in (None, {"num_groups": 32}, {"num_groups": 2}):
        torch.manual_seed(0)
        model = adapted(r=4, init_lora_weights=False, velora_config=velora, target_modules="all-linear").train()
        seen: dict[int, int] = {}

        def pack(x: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[x.untyped_storage().data_ptr()] = (
                0 if isinstance(x, torch.nn.Parameter) else x.untyped_storage().nbytes()
            )
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**batch("llama")).loss
        loss.backward()
        kept.append(sum(seen.values()))
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and "down" not in n})
    assert_all_close(grads[0], grads[1])
    assert kept[2] < kept[0]


# ---- BD-LoRA ----


def test_bdloras_start_and_blocks() -> None:
    blocks = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    settings = {"r": 4, "use_bdlora": blocks, "target_modules": ["q_proj", "o_proj"]}
    ours, theirs = adapted(**settings), there(**settings)
    shapes = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert torch.equal(logits(ours.eval()), logits(make("llama")))
    deltas = {}
    for path in ("q_proj", "o_proj"):
        layer = ours.get_base_model().model.layers[0].self_attn.get_submodule(path)
        for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            torch.nn.init.normal_(p)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        deltas[path] = layer.get_delta_weight("default"), A, B
    delta, A, B = deltas["q_proj"]
    assert_close(delta, 2 * torch.cat([B[:16] @ A[:2], B[16:] @ A[2:]]))
    delta, A, B = deltas["o_proj"]
    assert_close(delta, 2 * torch.cat([B[:, :2] @ A[:2], B[:, 2:] @ A[2:]], 1))


# ---- KaSA ----


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_kasas_start(name: str, tmp_path: Path) -> None:
    """The base weight without its smallest singular values is PEFT's; without the adapter it is what it was."""
    ours, theirs = (give(name, r=4, kasa_config={}).eval() for give in (adapted, there))
    found, wanted = base_weights(ours), base_weights(theirs)
    assert found.keys() == wanted.keys()
    assert_all_close(found, wanted)
    assert_close(logits(ours, name), logits(theirs, name))
    assert not torch.allclose(logits(ours, name), logits(make(name), name))
    with ours.disable_adapter():
        assert torch.equal(logits(ours, name), logits(make(name), name))
    assert torch.equal(logits(ours.unload(), name), logits(make(name), name))


def test_kasas_terms_of_the_loss() -> None:
    ours, theirs = pair("lora-kasa", "llama")
    settings = siliang.KasaConfig(beta=0.3, gamma=0.7)
    ours, theirs = adapted(r=4, kasa_config=settings), there(r=4, kasa_config=peft.KasaConfig(beta=0.3, gamma=0.7))
    theirs.load_state_dict(ours.state_dict())
    for p in ours.parameters():
        p.data += 0.05 if p.requires_grad else 0.0
    theirs.load_state_dict(ours.state_dict())
    found, wanted = extra_loss(ours), theirs.base_model._get_kasa_loss()
    assert found is not None
    assert_close(found, wanted)
    found.backward()
    wanted.backward()
    grads, expected = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs))
    assert_all_close(grads, expected)


def test_kasa_beside_other_adapters() -> None:
    """PEFT refuses it, for its base weight is changed for good."""
    model = adapted(r=4, kasa_config={}, init_lora_weights=False).eval()
    alone = logits(model)
    model.add_adapter("plain", siliang.LoraConfig(r=4, init_lora_weights=False))
    assert torch.equal(logits(model), alone)
    model.set_adapter("plain")
    plain = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="KaSA cannot be combined"):
        there(r=4, kasa_config={}).add_adapter("plain", peft.LoraConfig(r=4))


def test_kasa_is_no_start_to_be_saved_as_lora(tmp_path: Path) -> None:
    model = adapted(r=4, kasa_config={})
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(ConfigError, match="With kasa_config the change of the weight is not a product of B and A"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")


@pytest.mark.parametrize("settings", [{"kasa_config": {}}, {"init_lora_weights": "pissa"}])
@pytest.mark.filterwarnings("ignore:.*is LoRA already.*")
def test_as_lora_on_the_whole_base_weight(settings: dict[str, Any]) -> None:
    model = adapted(r=4, **settings).eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p) if p.requires_grad else 0.0
    config, tensors = siliang.convert_to_lora(model, 8)
    lora: Any = siliang.get_peft_model(make("llama"), config).eval()
    siliang.set_peft_model_state_dict(lora, tensors)
    assert_close(logits(lora), logits(model))
