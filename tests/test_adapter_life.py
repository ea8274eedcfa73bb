"""Several adapters on one model: which one computes, mixing them in a batch, merging in place, deleting, going on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_all_close, assert_close
from tiny import TASK, batch, make, word_tokenizer

import siliang
from siliang.merge import merge_with_proof
from siliang.models.checkpointing import enable_checkpointing
from siliang.types import AdapterError, ConfigError, MergeError

LAYER_METHODS: dict[str, Any] = {
    "lora": siliang.LoraConfig(init_lora_weights=False, target_modules="all-linear"),
    "dora": siliang.LoraConfig(init_lora_weights=False, use_dora=True),
    "ia3": siliang.IA3Config(init_ia3_weights=False),
    "ln": siliang.LNTuningConfig(),
    "pissa": siliang.LoraConfig(init_lora_weights="pissa"),
    "loftq": siliang.LoraConfig(init_lora_weights="loftq"),
}
PROMPT_METHODS: dict[str, Any] = {
    "prompt": siliang.PromptTuningConfig(num_virtual_tokens=4),
    "p-tuning": siliang.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8),
    "p-lstm": siliang.PromptEncoderConfig(
        num_virtual_tokens=4,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",  # type: ignore[arg-type]
    ),
    "prefix": siliang.PrefixTuningConfig(num_virtual_tokens=4),
    "prefix-projected": siliang.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True),
}
EVERY = LAYER_METHODS | PROMPT_METHODS | {"bitfit": siliang.BitFitConfig()}


def attach(name: str, config: Any, seed: int = 5) -> Any:
    """The method on a tiny model, moved away from where it starts."""
    config.task_type = TASK[name]
    model = siliang.get_peft_model(make(name), config)
    shake(model, seed)
    return model.eval()


def shake(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)


def logits(model: Any, name: str, **more: Any) -> torch.Tensor:
    inputs = {k: v for k, v in batch(name).items() if k != "labels"}
    with torch.no_grad():
        return model(**inputs, **more).logits


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("name", ["bloom", "gpt2"])
def test_off_and_on_again(method: str, name: str) -> None:
    base = logits(make(name), name)
    before = {k: v.clone() for k, v in make(name).state_dict().items()}
    model = attach(name, EVERY[method])
    tuned = logits(model, name)
    assert tuned.shape != base.shape or (tuned - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, name), base)
    assert torch.equal(logits(model, name), tuned)
    plain = model.unload()
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
    assert all(p.requires_grad for p in plain.parameters())
    assert torch.equal(logits(plain, name), base)


@pytest.mark.parametrize("method", LAYER_METHODS)
@pytest.mark.parametrize("name", ["bloom", "gpt2", "bert"])
def test_merging_in_place(method: str, name: str) -> None:
    if (method, name) == ("ln", "bert"):
        LAYER_METHODS[method].target_modules = ["LayerNorm"]
    base = logits(make(name), name)
    model = attach(name, LAYER_METHODS[method])
    LAYER_METHODS[method].target_modules = None if method != "lora" else "all-linear"
    tuned = logits(model, name)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert_close(logits(model, name), tuned)
    if TASK[name] == "CAUSAL_LM":
        with model.disable_adapter():
            assert torch.equal(logits(model, name), base)
    assert_close(logits(model, name), tuned)
    model.unmerge_adapter()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    model.merge_adapter()
    merged = model.merge_and_unload(safe_merge=True)
    assert_close(logits(merged, name), tuned)
    assert list(merged.state_dict()) == list(make(name).state_dict())


def test_a_broken_adapter_is_not_merged() -> None:
    model = attach("llama", siliang.LoraConfig(init_lora_weights=False))
    next(p for n, p in model.named_parameters() if "layers.1" in n and "lora_B" in n).data[0] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MergeError, match="not be finite"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())
    with pytest.raises(MergeError, match="cannot be merged"):
        attach("llama", siliang.PromptTuningConfig(num_virtual_tokens=3)).merge_and_unload()


def test_a_merge_is_proved_by_a_single_value() -> None:
    """The score of one text has no deviation to measure a difference by: its size does, and 1 for a smaller one."""
    for shift in (0.0, 50.0):
        base = make("bert")
        base.classifier, base.num_labels, base.config.num_labels = torch.nn.Linear(32, 1), 1, 1
        base.classifier.bias.data += shift
        model = siliang.get_peft_model(base, siliang.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
        sample = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        score = float(model(**sample).logits.detach())
        _, proof = merge_with_proof(model, [sample])
        assert proof.holds and proof.positions == 1
        assert proof.spread == pytest.approx(max(1.0, abs(score)), rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "ln"])
def test_one_batch_of_several_adapters(method: str) -> None:
    model = attach("llama", LAYER_METHODS[method])
    model.add_adapter("other", LAYER_METHODS[method])
    model.set_adapter("other")
    shake(model, 9)
    alone = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        alone[adapter] = logits(model, "llama")
    with model.disable_adapter():
        alone["__base__"] = logits(model, "llama")
    rows = ["other", "__base__", "default"]
    mixed = logits(model, "llama", adapter_names=rows)
    for i, adapter in enumerate(rows):
        assert_close(mixed[i], alone[adapter][i])
    ids = batch("llama")["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": 2}
    together = model.generate(ids, adapter_names=rows, **settings)
    for i, adapter in enumerate(rows):
        model.set_adapter(adapter if adapter != "__base__" else "other")
        with model.disable_adapter() if adapter == "__base__" else torch.no_grad():
            assert together[i].tolist() == model.generate(ids[i : i + 1], **settings)[0].tolist()
    with pytest.raises(ConfigError, match="'othr' is not there"):
        logits(model, "llama", adapter_names=["othr", "other", "other"])


def test_heads_of_several_adapters() -> None:
    model = attach("bert", siliang.LoraConfig(init_lora_weights=False))
    model.add_adapter("other", siliang.LoraConfig(init_lora_weights=False, task_type="SEQ_CLS"))  # type: ignore[arg-type]
    model.set_adapter("other")
    shake(model, 9)
    alone = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        alone[adapter] = logits(model, "bert")
    mixed = logits(model, "bert", adapter_names=["other", "default", "other"])
    assert_close(mixed[0], alone["other"][0])
    assert_close(mixed[1], alone["default"][1])


@pytest.mark.parametrize("method", EVERY)
def test_deleting(method: str) -> None:
    base = logits(make("gpt2"), "gpt2")
    model = attach("gpt2", EVERY[method])
    tuned = logits(model, "gpt2")
    model.add_adapter("other", EVERY[method])
    model.delete_adapter("other")
    assert torch.equal(logits(model, "gpt2"), tuned)
    model.delete_adapter("default")
    assert model.peft_config == {} and model.active_adapters == []
    assert torch.equal(logits(model, "gpt2"), base)
    assert list(model.get_base_model().state_dict()) == list(make("gpt2").state_dict())


@pytest.mark.parametrize("method", EVERY)
def test_training_goes_on_where_it_stopped(method: str, tmp_path: Path) -> None:
    """Five steps, saved after the second: the next losses are those of the run that did not stop."""
    torch.manual_seed(0)
    model = attach("gpt2", EVERY[method])
    losses = [steps(model, 1)[0] for _ in range(2)]
    model.save_pretrained(tmp_path)
    uninterrupted = steps(model, 3)
    again = siliang.PeftModel.from_pretrained(make("gpt2"), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert steps(again, 3) == pytest.approx(uninterrupted, rel=1e-6)
    assert uninterrupted[-1] < losses[0]


def steps(model: Any, n: int) -> list[float]:
    """Losses of n steps of plain gradient descent, which has no state to resume."""
    losses = []
    for _ in range(n):
        loss = model(**batch("gpt2")).loss
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p -= 0.1 * p.grad
                    p.grad = None
    return losses


@pytest.mark.parametrize("method", ["p-tuning", "prefix-projected"])
def test_without_its_encoder_a_prompt_goes_on_as_a_table(method: str, tmp_path: Path) -> None:
    """PEFT's files hold the prompt alone."""
    model = attach("llama", PROMPT_METHODS[method])
    model.save_pretrained(tmp_path)
    (tmp_path / "siliang_training.safetensors").unlink()
    again = siliang.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(again.eval(), "llama"), logits(model, "llama"))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == ["prompt_encoder.default.embedding.weight"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bloom", "bert", "roberta", "t5", "bart", "deberta_v2"])
@pytest.mark.parametrize("method", ["prefix", "prefix-projected", "prompt"])
def test_prompts_under_gradient_checkpointing(method: str, name: str, reentrant: bool) -> None:
    if reentrant and method == "prefix-projected":
        pytest.skip("a reentrant checkpoint cannot go back twice through a projection outside it")
    gradients = []
    for checkpointing in (False, True):
        model = attach(name, PROMPT_METHODS[method])
        if checkpointing:
            model.enable_input_require_grads()
            enable_checkpointing(model, use_reentrant=reentrant)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for attribute in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
        model(**batch(name)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for n, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, n
    assert_all_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["deberta", "deberta_v2"])
def test_a_prefix_on_deberta(name: str) -> None:
    """PEFT has none. Where all virtual values are one vector c, attention gives a c + (1 - a) times what it gave."""
    model = attach(name, siliang.PrefixTuningConfig(num_virtual_tokens=3))
    attention = next(m for m in model.modules() if type(m).__name__ == "DisentangledSelfAttention")
    seen: list[torch.Tensor] = []
    attention.register_forward_hook(lambda module, args, out: seen.append(out[0][:, -11:]))
    inputs = {k: v for k, v in batch(name).items() if k != "labels"}
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.view(3, 2, 2, -1)[:, :, 1] = 1.0  # tokens, layers, k and v
        with model.disable_adapter():  # where the user's own tokens stand behind the virtual ones
            model(**inputs, position_ids=torch.arange(3, 14)[None])
        model(**inputs)
    plain, prefixed = (out.unflatten(-1, (4, 8)) for out in seen)
    share = (prefixed - plain) / (1.0 - plain)
    assert share.min() > 0 and share.max() < 1
    assert_close(share, share[..., :1].expand_as(share))
    with torch.no_grad():  # the padding of a row does not show
        row = {k: v[:1, :6] for k, v in inputs.items()}
        padded = {k: v[:1].clone() for k, v in inputs.items()}
        padded["input_ids"][:, 6:], padded["attention_mask"][:, 6:] = 0, 0
        assert_close(model(**padded).logits, model(**row).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_prompts_and_padding_on_the_left(method: str, name: str) -> None:
    """Answers to a batch padded on the left are those to each row alone."""
    model = attach(name, PROMPT_METHODS[method])
    ids = batch(name)["input_ids"]
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)
    alone = model.generate(input_ids=ids[1:2, 4:], attention_mask=mask[1:2, 4:], **settings)
    assert together[1, -5:].tolist() == alone[0, -5:].tolist()


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_classes_of_a_causal_model_ignore_padding(method: str) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=120, **settings, pad_token_id=0, num_labels=3))
    config = PROMPT_METHODS[method]
    config.task_type = "SEQ_CLS"
    model = siliang.get_peft_model(base.eval(), config)
    shake(model, 4)
    model.eval()
    ids = batch("llama")["input_ids"][:1]
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    assert_close(model(input_ids=padded, attention_mask=mask).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_one_class_for_each_of_the_users_tokens(method: str) -> None:
    """PEFT returns one for each virtual token as well, and cannot compute the loss."""
    from tiny import ENCODER
    from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

    config = PROMPT_METHODS[method]
    inputs = {k: v for k, v in batch("bert").items() if k != "labels"}
    config.task_type = "TOKEN_CLS"
    tagger = siliang.get_peft_model(BertForTokenClassification(BertConfig(**ENCODER)), config)
    out = tagger(**inputs, labels=torch.zeros_like(inputs["input_ids"]))
    assert out.logits.shape == (3, 11, 3) and out.loss.isfinite()
    config.task_type = "QUESTION_ANS"
    reader = siliang.get_peft_model(BertForQuestionAnswering(BertConfig(**ENCODER | {"num_labels": 2})), config)
    spans = {"start_positions": torch.tensor([0, 4, 10]), "end_positions": torch.tensor([1, 5, 10])}
    out = reader(**inputs, **spans)
    assert out.start_logits.shape == (3, 11) and out.loss.isfinite()


@pytest.mark.parametrize("init", ["RANDOM", "TEXT", "SAMPLE_VOCAB"])
def test_what_a_prompt_starts_from(init: str, tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    settings = {"prompt_tuning_init_text": "the film was good", "tokenizer_name_or_path": str(tmp_path)}
    config = siliang.PromptTuningConfig(
        num_virtual_tokens=6,
        prompt_tuning_init=init,  # type: ignore[arg-type]
        task_type="CAUSAL_LM",  # type: ignore[arg-type]
        **(settings if init == "TEXT" else {}),  # type: ignore[arg-type]
    )
    base: Any = make("llama")
    words = base.get_input_embeddings().weight.detach()
    prompt = siliang.get_peft_model(base, config).prompt_encoder["default"].embedding.weight.detach()
    nearest = torch.cdist(prompt, words)
    if init == "RANDOM":
        assert nearest.min() > 1e-3
    else:
        assert nearest.min(1).values.max() < 1e-4
    if init == "TEXT":
        ids = word_tokenizer()("the film was good")["input_ids"]
        assert nearest.argmin(1).tolist() == (ids * 2)[:6]


def test_what_prompts_need() -> None:
    with pytest.raises(ConfigError, match="needs num_virtual_tokens"):
        siliang.get_peft_model(make("llama"), siliang.PromptTuningConfig())
    with pytest.raises(ConfigError, match="is none"):
        siliang.get_peft_model(make("plain"), siliang.PrefixTuningConfig(num_virtual_tokens=3))


def test_a_failed_load_leaves_the_others_alone(tmp_path: Path) -> None:
    model = attach("llama", siliang.LoraConfig(init_lora_weights=False))
    tuned = logits(model, "llama")
    attach("bloom", siliang.LoraConfig(target_modules=["query_key_value"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="matches no module"):
        model.load_adapter(tmp_path, "other")
    attach("llama", siliang.LoraConfig(r=2)).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not a file")
    with pytest.raises(AdapterError):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, "llama"), tuned)
    siliang.get_peft_model(make("llama"), siliang.LoraConfig(r=2)).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, "llama"), tuned)


@pytest.mark.parametrize("name", ["bloom", "gpt2"])
def test_merging_into_tied_embeddings(name: str, tmp_path: Path) -> None:
    """The output layer keeps the base's weight, as it does before merging, and saving keeps both."""
    target = {"bloom": "word_embeddings", "gpt2": "wte"}[name]
    for settings in ({"target_modules": [target]}, {"modules_to_save": [target]}):
        model = attach(name, siliang.LoraConfig(init_lora_weights=False, **settings))
        tuned = logits(model, name)
        merged: Any = model.merge_and_unload()
        merged.save_pretrained(tmp_path / name)
        reloaded = type(merged).from_pretrained(tmp_path / name).eval()
        for plain in (merged, reloaded):
            assert_close(logits(plain, name), tuned)
