"""Texts behind prompts that begin alike: those of each prompt alone, with the beginning computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_methods_everywhere import EVERY, SMALL
from tiny import VOCABULARY, make
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import siliang
from siliang.engine.patches import attention_implementation
from siliang.engine.prompt_sharing import base_of, batches_of, beginning_once, find_prompt_sharing, with_common
from siliang.engine.prompts import common_beginning, padded_prompts, prompt_batches
from siliang.memory.track import Tracker
from siliang.methods import METHODS
from tests.engine.test_engine import METHODS as COMMON
from tests.engine.test_engine import SHAPE
from tests.engine.test_sharing import FAMILIES, OVER_BATCHES, OWN_ROWS
from tests.engine.test_sharing import family as shared_family

NEW = 4
FOREIGN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    match name:
        case "wide mistral":
            model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=64))
        case "wide gemma2" | "gemma2":
            window = 64 if name == "wide gemma2" else 20
            config = Gemma2Config(**SHAPE, head_dim=8, pad_token_id=0, sliding_window=window)
            model = Gemma2ForCausalLM(config)
        case "opt":
            sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0}
            model = OPTForCausalLM(OPTConfig(**FOREIGN, **sizes))
        case "falcon":
            model = FalconForCausalLM(FalconConfig(**FOREIGN, alibi=True, new_decoder_architecture=False))
        case "mpt":
            model = MptForCausalLM(MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, use_cache=True))
        case "gpt_neo":
            kinds = [[["global", "local"], 1]]
            model = GPTNeoForCausalLM(
                GPTNeoConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=32,
                    num_layers=2,
                    num_heads=4,
                    attention_types=kinds,
                    window_size=20,
                )
            )
        case "mamba":
            model = MambaForCausalLM(
                MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
            )
        case "phi3":
            sizes = SHAPE | {"max_position_embeddings": 4096}
            model = Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0, original_max_position_embeddings=4096))
        case "t5":
            model = make("t5")
        case _:
            model = shared_family(name)
    model.generation_config.eos_token_id = None
    return model.eval()


def prompts_behind(common: int, lengths: Sequence[int] = (1, 7, 3)) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    begin, *ends = (torch.randint(5, VOCABULARY, (n,), generator=g).tolist() for n in (common, *lengths))
    return [begin + end for end in ends]


def alone(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What the model writes behind each prompt by itself."""
    found: list[list[int]] = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            found.append(model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0].tolist())
    return [ids[len(prompt) :] for ids, prompt in zip(found, prompts, strict=True)]


def together(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> tuple[list[list[int]], int]:
    """What it writes behind all of them, and the tokens of the prompts that it has computed."""
    computed: list[int] = []
    counting = (
        base_of(model)
        .get_input_embeddings()
        .register_forward_hook(lambda _, __, out: computed.append(out[..., 0].numel()))
    )
    (batch,) = batches_of(model, dict(enumerate(prompts)), 8, NEW, pad=0)
    computed.clear()  # of the trial
    inputs = padded_prompts([prompts[i] for i in batch.numbers], 0, left=True, common=batch.common)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    with torch.no_grad(), beginning_once(model, batch.common):
        ids = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    counting.remove()
    texts = dict(zip(batch.numbers, ids, strict=True))
    return [texts[i] for i in range(len(prompts))], sum(computed) - (NEW - 1) * len(prompts)


def assert_shares(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    found, computed = together(model, prompts)
    assert found == alone(model, prompts)
    common, longest = common_beginning(prompts), max(map(len, prompts))
    assert computed == common + len(prompts) * (longest - common)
    assert find_prompt_sharing(model, 0).why_not is None


def with_method(model: Any, config: Any) -> Any:
    model = siliang.get_peft_model(model, config)
    for p in model.parameters():
        if p.requires_grad:  # an adapter's start does nothing
            p.data += 0.05 * torch.randn_like(p)
    return model.eval()


# ---- models ----


# the window of mistral is shorter than the prompts
SHARING = [*(name for name in FAMILIES if name != "mistral"), "wide mistral", "wide gemma2", "opt", "falcon", "phi3"]


@pytest.mark.parametrize("name", SHARING)
def test_families(name: str) -> None:
    assert_shares(family(name), prompts_behind(35))


@pytest.mark.parametrize("name", SHARING)
def test_prompts_of_one_length(name: str) -> None:
    """No padding, so that models make no mask, and several tokens behind the beginning."""
    assert_shares(family(name), prompts_behind(35, (5, 5, 5)))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_half_precision_is_as_near_as_separate_rows(name: str, autocast: bool) -> None:
    """To the logits in fp32, with attentions of large scores."""
    model, prompts = family(name), prompts_behind(35)
    for path, weight in model.named_parameters():
        if "q_proj.weight" in path or "query_key_value.weight" in path:
            weight.data *= 30

    def logits(common: int) -> torch.Tensor:
        inputs = padded_prompts(prompts, 0, left=True, common=common)
        with torch.no_grad(), beginning_once(model, common):
            output = model.generate(
                **inputs,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                prefix_allowed_tokens_fn=lambda row, ids: [5 + row + len(ids) % 7],
                output_logits=True,
                return_dict_in_generate=True,
            )
        return torch.stack(output.logits).float()

    exact = logits(0)
    half = model if autocast else model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert find_prompt_sharing(half, 0).why_not is None
        apart, shared = (float((logits(common) - exact).square().mean().sqrt()) for common in (0, 35))
    assert 0 < shared <= 1.5 * apart


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_neo", "mpt", "mamba", "t5"])
def test_what_computes_each_prompt(name: str) -> None:
    """Windows and biases that count columns, states of the whole text, and encoders."""
    model, prompts = family(name), prompts_behind(35)
    (batch,) = batches_of(model, dict(enumerate(prompts)), 8, NEW, pad=0)
    assert batch.common == 0
    if name in ("mpt", "mamba", "t5"):
        assert find_prompt_sharing(model, 0).why_not
    if name != "t5":
        assert together(model, prompts)[1] == 3 * max(map(len, prompts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_no_bias_that_counts_columns(dtype: torch.dtype) -> None:
    assert "other results" in str(find_prompt_sharing(family("mpt").to(dtype), 0).why_not)
    assert find_prompt_sharing(family("gpt2").to(dtype), 0).why_not is None


def test_a_window_that_is_wide_enough_for_some() -> None:
    """64 tokens, new ones included."""
    model = family("wide mistral")
    assert_shares(model, prompts_behind(50, (10, 3, 5)))
    (batch,) = batches_of(model, dict(enumerate(prompts_behind(50, (11, 3, 5)))), 8, NEW, pad=0)
    assert batch.common == 0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
        ("phi3", {}),
    ],
)
@pytest.mark.parametrize("lengths", [(5, 3, 1), (6, 3, 1), (30, 3, 1)])
def test_rotations_that_depend_on_the_length(name: str, settings: dict[str, Any], lengths: tuple[int, ...]) -> None:
    """Beyond 44 tokens, new ones included; in between the cache of Phi-3 is dropped."""
    torch.manual_seed(0)
    if name == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE | {"max_position_embeddings": 44}, **settings)).eval()
        model.generation_config.eos_token_id = None
    else:
        model = family("phi3")
        model.config.original_max_position_embeddings = 44
    prompts = prompts_behind(35, lengths)
    (batch,) = batches_of(model, dict(enumerate(prompts)), 8, NEW, pad=0)
    assert batch.common == (35 if 35 + lengths[0] + NEW <= 44 else 0)
    if batch.common or name == "llama":  # Phi-3 counts the padding, with or without a shared beginning
        assert together(model, prompts[:1])[0] == alone(model, prompts[:1])
    if batch.common:
        assert_shares(model, prompts)


def test_a_model_that_loses_the_shared_keys_writes_separate_rows() -> None:
    """Its trial was too short to show it."""
    model, prompts = family("phi3"), prompts_behind(35)
    (batch,) = batches_of(model, dict(enumerate(prompts)), 8, NEW, pad=0)
    model.config.original_max_position_embeddings = 20
    written: list[int] = []

    def write(common: int) -> list[str]:
        written.append(common)
        inputs = padded_prompts([prompts[i] for i in batch.numbers], 0, left=True, common=common)
        with torch.no_grad(), beginning_once(model, common):
            found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return [str(ids) for ids in found[:, -NEW:].tolist()]

    assert len(with_common(write, batch.common)) == 3 and written == [35, 0]


@pytest.mark.parametrize(
    ("name", "value"), [("no_repeat_ngram_size", 2), ("encoder_no_repeat_ngram_size", 2), ("bad_words_ids", [[7, 8]])]
)
def test_what_reads_the_order_of_tokens(name: str, value: object) -> None:
    model, prompts = family("llama"), prompts_behind(35)
    setattr(model.generation_config, name, value)
    assert name in str(find_prompt_sharing(model, 0).why_not)
    found, _ = together(model, prompts)
    assert found == alone(model, prompts)


def test_beams() -> None:
    """A prompt is computed once for all of its beams, even alone."""
    model, prompts = family("llama"), prompts_behind(35)
    for some in (prompts, prompts[:1]):
        batches = batches_of(model, dict(enumerate(some)), 8, NEW, pad=0, copies=3)
        assert [batch.common for batch in batches] == [35]
    model.generation_config.num_beams = 3
    assert together(model, prompts)[0] == alone(model, prompts)


# ---- methods ----


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2"])
@pytest.mark.parametrize("method", [m for m in COMMON if COMMON[m] is not None])
def test_common_methods(name: str, method: str) -> None:
    config = COMMON[method]
    config = type(config)(**vars(config) | {"task_type": "CAUSAL_LM"})
    assert_shares(with_method(family(name), config), prompts_behind(35))


@pytest.mark.parametrize("method", EVERY)
def test_every_method(method: str) -> None:
    settings = {key: value for key, value in SMALL.get(method, {}).items() if not key.endswith("dropout")}
    config = METHODS[settings.pop("name", method)].config
    assert config is not None
    model, prompts = with_method(family("llama"), config(task_type="CAUSAL_LM", **settings)), prompts_behind(35)
    if method in (*OWN_ROWS, *OVER_BATCHES):
        assert find_prompt_sharing(model, 0).why_not
        assert {batch.common for batch in batches_of(model, dict(enumerate(prompts)), 8, NEW, pad=0)} == {0}
        with model.disable_adapter():
            assert_shares(model, prompts)
        return
    assert_shares(model, prompts)


def test_the_adapter_is_part_of_what_was_tried() -> None:
    model = with_method(family("llama"), siliang.LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert_shares(model, prompts_behind(35))
    model.add_adapter("other", siliang.LoraConfig(r=2, alora_invocation_tokens=[7], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    assert "aLoRA" in str(find_prompt_sharing(model, 0).why_not)
    model.set_adapter("default")
    assert find_prompt_sharing(model, 0).why_not is None


def test_a_new_adapter_is_tried_where_one_was_deleted() -> None:
    """The new one's config may have the memory of the old one's."""
    model, trials = with_method(family("llama"), siliang.LoraConfig(r=2, task_type="CAUSAL_LM")), list[int]()
    base_of(model).get_input_embeddings().register_forward_hook(lambda *_: trials.append(1))
    for _ in range(4):
        model.add_adapter("other", siliang.LoraConfig(r=2, task_type="CAUSAL_LM"))
        model.set_adapter("other")
        trials.clear()
        assert find_prompt_sharing(model.eval(), 0).why_not is None and trials
        model.set_adapter("default")
        model.delete_adapter("other")


def test_merged() -> None:
    model = with_method(family("llama"), siliang.LoraConfig(r=2, task_type="CAUSAL_LM"))
    found = alone(model, prompts_behind(35))
    merged = model.merge_and_unload().eval()
    assert_shares(merged, prompts_behind(35))
    assert together(merged, prompts_behind(35))[0] == found


def test_nothing_stays_on_the_model() -> None:
    model = family("llama")
    before = dict(model.__dict__)
    with pytest.raises(RuntimeError), beginning_once(model, 3):
        raise RuntimeError
    assert model.__dict__ == before
    assert find_prompt_sharing(model, 0).why_not is None
    assert model.__dict__.keys() == before.keys() and "prepare_inputs_for_generation" not in model.__dict__


def test_the_parts_of_a_config_have_their_attention_again() -> None:
    config = LlavaConfig(text_config=LlamaConfig(**SHAPE))
    config.text_config._attn_implementation, config.vision_config._attn_implementation = "eager", "sdpa"
    with attention_implementation(config, "other"):
        assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "other"
    assert config.text_config._attn_implementation == "eager"
    assert config.vision_config._attn_implementation == "sdpa"


# ---- batches ----


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=12), st.integers(1, 5))
def test_each_prompt_is_in_one_batch(prompts: list[list[int]], size: int) -> None:
    asked = dict(enumerate(prompts))
    for longest in (None, 0, 20):
        batches = prompt_batches(asked, size, longest_shared=longest)
        assert sorted(i for batch in batches for i in batch.numbers) == list(asked)
        assert len(batches) == -(-len(prompts) // size)
        for batch in batches:
            rows = [asked[i] for i in batch.numbers]
            assert batch.common < min(map(len, rows)) and batch.common <= common_beginning(rows)
            if longest is not None and max(map(len, rows)) > longest:
                assert batch.common == 0
            inputs = padded_prompts(rows, 9, left=True, common=batch.common)
            for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"].bool(), rows, strict=True):
                assert ids[mask].tolist() == row and (ids[~mask] == 9).all() and bool(mask[-1])


def test_prompts_that_begin_alike_are_together() -> None:
    """Of two systems, whose rows alternate and are of all lengths; within a batch, of similar length."""
    first = prompts_behind(100, range(1, 9))
    second = [[9, *row] for row in first]
    asked = dict(enumerate(row for pair in zip(first, second, strict=True) for row in pair))
    batches = prompt_batches(asked, 4, longest_shared=None)
    assert sorted(batch.common for batch in batches) == [100, 100, 101, 101]
    assert sorted(batches[0].numbers) == [9, 11, 13, 15]
    assert [batch.common for batch in prompt_batches(asked, 4)] == [0] * 4


def test_a_tree_of_beginnings() -> None:
    """Two examples below one system prompt: each batch shares the system prompt and its own example."""
    rows = prompts_behind(30, (50, 50))
    asked = dict(enumerate(rows[branch] + [5 + n] * n for n in (1, 2, 3) for branch in (0, 1)))
    assert [batch.common for batch in prompt_batches(asked, 3, longest_shared=None)] == [80, 80]


# ---- memory ----


@pytest.mark.parametrize(("name", "share"), [("llama", 0.5), ("bloom", 1.0)])
def test_memory_is_less(name: str, share: float) -> None:
    """Live bytes at the peak: of 8 rows of 68 tokens, of which 60 are shared, with 4 more."""
    model, prompts, peaks = family(name), prompts_behind(60, range(1, 9)), list[int]()
    (batch,) = batches_of(model, dict(enumerate(prompts)), 8, NEW, pad=0)
    assert batch.common == 60
    for common in (60, 0):
        inputs = padded_prompts([prompts[i] for i in batch.numbers], 0, left=True, common=common)
        tracker = Tracker()
        with tracker, torch.no_grad(), beginning_once(model, common):
            model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        peaks.append(tracker.peak_bytes)
    assert peaks[0] < share * peaks[1]


@pytest.mark.parametrize(
    ("name", "is_read_there"),
    [("llama", True), ("gpt2", True), ("opt", True), ("bloom", False), ("wide gemma2", False)],
)
def test_which_models_read_the_shared_keys_where_they_are(name: str, is_read_there: bool) -> None:
    """The others copy them for each row, which only takes longer: BLOOM has its own attention, Gemma 2 a softcap."""
    found = find_prompt_sharing(family(name), 0)
    assert found.why_not is None and found.in_place == is_read_there
