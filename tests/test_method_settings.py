"""Settings of methods on layers that are refused, in Python, before a model is touched, or where they meet a layer; and
what PEFT writes.
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from block_diagonal import BlockDiagonal
from closeness import assert_close
from safetensors.torch import load_file, save_file
from tiny import TASK, batch, make

import siliang
from siliang.types import AdapterError, ConfigError, MergeError, TaskType

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("VeraConfig", {"r": 0}, "r = 0: must be at least 1"),
    ("VeraConfig", {"vera_dropout": 1.0}, "vera_dropout = 1.0: must be at least 0 and less than 1"),
    ("VeraConfig", {"projection_prng_key": 2**64}, "projection_prng_key = 18446744073709551616: must fit in 64 bits"),
    ("DeloraConfig", {"rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj' = 0: must be 1 to 2,147"),
    ("DeloraConfig", {"module_dropout": 1.0}, "module_dropout = 1.0: must be at least 0 and less than 1"),
    ("GraloraConfig", {"r": 6, "gralora_k": 4}, "r = 6 and gralora_k = 4: r must be a multiple of gralora_k"),
    ("GraloraConfig", {"r": 9, "gralora_k": 3}, "gralora_k = 3: must divide the inputs of each layer, and one has 32"),
    ("AdaLoraConfig", {"target_r": 13}, "target_r = 13 and init_r = 12: target_r must be at most init_r"),
    ("AdaLoraConfig", {"tinit": 9, "total_step": 9}, "tinit = 9, tfinal = 0 and 9 steps: no step is left between"),
    ("AdaLoraConfig", {"tfinal": -1}, "tfinal = -1: must be at least 0"),
    ("AdaLoraConfig", {"beta1": 1.0}, "beta1 = 1.0: must be more than 0 and less than 1"),
    ("AdaLoraConfig", {"lora_alpha": 0}, "lora_alpha = 0: must be more than 0"),
    ("AdaLoraConfig", {"total_step": 0}, "total_step = 0: must be at least 1"),
    ("GraloraConfig", {"hybrid_r": -1}, "hybrid_r = -1: must be a rank, or 0 for no LoRA in addition to the blocks"),
    ("LilyConfig", {"stride_A": 0}, "stride_A = 0: must be at least 1"),
    ("LilyConfig", {"num_B": 1}, "num_B = 1: must be at least 2, for the router to choose from"),
    ("OSFConfig", {"effective_rank": 0}, "effective_rank = 0: must be a number of singular values, 1 or more, or"),
    ("OSFConfig", {"effective_rank": 2.5}, "effective_rank = 2.5: must be a number of singular values"),
    ("OSFConfig", {"rank_pattern": {"q_proj": -1}}, "rank_pattern: 'q_proj' = -1: must be a number of singular values"),
    ("OSFConfig", {"effective_rank": 0.01}, "a layer has 32 singular values, and none of them would stay"),
    ("OSFConfig", {"effective_rank": 1.0}, "effective_rank = 1.0: every singular value of every layer would stay"),
    ("OSFConfig", {"rank_pattern": {"q_prj": 4}}, "rank_pattern: 'q_prj' matches none of the layers that are tuned"),
    ("RandLoraConfig", {"r": 0}, "r = 0: must be at least 1"),
    ("RandLoraConfig", {"projection_prng_key": -(2**64)}, "must fit in 64 bits"),
    ("VBLoRAConfig", {"topk": 5, "num_vectors": 4}, "topk = 5 and num_vectors = 4: the bank has too few vectors"),
    ("VBLoRAConfig", {}, "vector_length = 256: must divide the inputs of each layer, and one has 32"),
    ("VBLoRAConfig", {"init_logits_std": -1.0}, "init_logits_std = -1.0: must be at least 0"),
    ("BOFTConfig", {"boft_block_num": 2}, "boft_block_size = 4 and boft_block_num = 2: set one of them"),
    ("BOFTConfig", {"boft_block_size": -4}, "boft_block_size = -4 and boft_block_num = 0: set one of them"),
    ("BOFTConfig", {"boft_block_size": 5}, "boft_block_size = 5: must divide the inputs of each layer, and one has 32"),
    ("BOFTConfig", {"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor = 0: must be at least 1"),
    ("BOFTConfig", {"boft_n_butterfly_factor": 5}, "32 inputs are 8 blocks of 4, and more than one factor takes"),
    ("BOFTConfig", {"boft_block_size": 1, "boft_n_butterfly_factor": 2}, "one factor takes an even size"),
    ("BOFTConfig", {"boft_dropout": 1.0}, "boft_dropout = 1.0: must be at least 0 and less than 1"),
    ("HRAConfig", {"r": 0}, "r = 0: must be at least 1"),
    (
        "HRAConfig",
        {"r": 33, "apply_GS": True, "init_weights": False},
        "r = 33: must be at most the inputs of each layer, and one has 32",
    ),
    ("HRAConfig", {"bias": "some"}, "bias = 'some': must be 'none', 'all' or 'hra_only'"),
    ("WaveFTConfig", {"n_frequency": 0}, "n_frequency = 0: must be at least 1"),
    ("WaveFTConfig", {}, "n_frequency = 2592: must be at most the numbers of each weight, and one has 1024"),
    ("WaveFTConfig", {"wavelet_family": "coif1"}, "wavelet_family = 'coif1': must be one of db1 to db10 and sym2"),
    ("WaveFTConfig", {"n_frequency_pattern": {"q_proj": 0}}, "n_frequency_pattern: 'q_proj' = 0: must be 1 to"),
    ("WaveFTConfig", {"random_loc_seed": 2**64}, "random_loc_seed = .*: must fit in 64 bits"),
    ("PolyConfig", {"n_tasks": 0}, "n_tasks = 0: must be at least 1"),
    ("PolyConfig", {"n_splits": 5}, "n_splits = 5: must divide the inputs of each layer, and one has 32"),
    ("PolyConfig", {"poly_type": "mhr"}, "poly_type = 'mhr': must be 'poly'"),
    ("RoadConfig", {"group_size": 0}, "group_size = 0: must be at least 1"),
    ("RoadConfig", {"group_size": 7}, "group_size = 7: must be even, because a group's halves are paired"),
    ("RoadConfig", {"group_size": 12}, "group_size = 12: must divide the outputs of each layer, and one has"),
    ("RoadConfig", {"variant": "road_3"}, "variant = 'road_3': must be"),
    ("VeraConfig", {"bias": "some"}, "bias = 'some': must be 'none', 'all' or 'vera_only'"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED)
def test_settings_that_are_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        siliang.get_peft_model(make("llama"), getattr(siliang, kind)(task_type="CAUSAL_LM", **settings))
    assert str(caught.value).count("\n") < 2


@pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in REFUSED}))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_writes_is_read(kind: str, tmp_path: Path) -> None:
    needed = {"total_step": 10} if kind == "AdaLoraConfig" else {}
    getattr(peft, kind)(target_modules=["q_proj"], **needed).save_pretrained(str(tmp_path))
    config = getattr(siliang, kind).from_pretrained(tmp_path)
    assert config == getattr(siliang, kind)(target_modules=["q_proj"], **needed)


def test_shared_tensors_that_the_file_leaves_out_are_no_larger_than_the_model(tmp_path: Path) -> None:
    settings: Any = {"task_type": "CAUSAL_LM", "save_projection": False, "r": 4}
    config = siliang.VeraConfig(**settings)
    siliang.get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 40_000_000}))
    with pytest.raises(AdapterError, match=r"vera_A and vera_B would have .* numbers that the file leaves out"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "prefix"), [("VeraConfig", "vera"), ("RandLoraConfig", "randlora")])
def test_projections_from_the_seed_are_pefts_bit_for_bit(kind: str, prefix: str, dtype: torch.dtype) -> None:
    """Whatever the base's dtype, to which PEFT rounds them: a file may leave them out."""
    settings: Any = {"task_type": "CAUSAL_LM", "r": 6, "projection_prng_key": 3}
    ours: Any = siliang.get_peft_model(make("llama").to(dtype), getattr(siliang, kind)(**settings))
    theirs: Any = peft.get_peft_model(make("llama").to(dtype), getattr(peft, kind)(**settings))
    for side in "AB":
        name = f"base_model.{prefix}_{side}.default"
        assert torch.equal(ours.state_dict()[name], theirs.state_dict()[name].float())


def test_vblora_whose_logits_the_file_leaves_out_is_not_trained_on(tmp_path: Path) -> None:
    settings: Any = {"task_type": "CAUSAL_LM", "r": 2, "num_vectors": 12, "vector_length": 8}
    config = siliang.VBLoRAConfig(save_only_topk_weights=True, **settings)
    model: Any = siliang.get_peft_model(make("llama"), config)
    model.train()(**batch("llama")).loss.backward()
    model.save_pretrained(tmp_path)
    again: Any = siliang.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    with pytest.raises(AdapterError, match="the file holds no logits"):
        again.train()(**batch("llama"))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("_topk_indices"))
    save_file(tensors | {key: tensors[key] + 200}, path)
    with pytest.raises(AdapterError, match="are no mixtures of a bank of 12 vectors: is the file damaged"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)


def test_hra_starts_from_the_base_model_where_that_can_be() -> None:
    ids = torch.tensor([[5, 6, 7]])
    wanted = make("llama")(input_ids=ids).logits
    model = siliang.get_peft_model(make("llama"), siliang.HRAConfig(task_type=TaskType.CAUSAL_LM))
    assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-6)
    away: tuple[dict[str, Any], ...] = ({"r": 3}, {"apply_GS": True})
    for settings in away:
        with pytest.warns(UserWarning, match="training starts away from the base model"):
            model = siliang.get_peft_model(make("llama"), siliang.HRAConfig(task_type=TaskType.CAUSAL_LM, **settings))
        assert model(input_ids=ids).logits.isfinite().all()


def test_beft_merges_where_layers_have_a_bias() -> None:
    model: Any = siliang.get_peft_model(make("llama"), siliang.BeftConfig(task_type=TaskType.CAUSAL_LM))
    with pytest.raises(MergeError, match="the base model's layer has none to add it to"):
        model.merge_and_unload()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    assert layer.get_delta_weight("default").eq(0).all()


def test_boft_leaves_out_the_blocks_that_peft_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", BlockDiagonal())
    settings: Any = {"init_weights": False, "boft_n_butterfly_factor": 2, "boft_dropout": 0.4}
    ours: Any = siliang.get_peft_model(make("llama"), siliang.BOFTConfig(task_type=TaskType.CAUSAL_LM, **settings))
    theirs: Any = peft.get_peft_model(make("llama"), peft.BOFTConfig(task_type="CAUSAL_LM", **settings))
    theirs.load_state_dict(ours.state_dict())
    found = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        found.append(model.train()(**batch("llama")).logits)
    assert_close(*found)
    assert (found[0] - ours.eval()(**batch("llama")).logits).abs().max() > 1e-3


def test_orthogonal_reflections_start_from_different_columns() -> None:
    """In PEFT they start from columns that are equal in pairs: what is left of the second one is rounding, if anything,
    and the reflection is random, or not finite.
    """
    config: dict[str, Any] = {"r": 4, "apply_GS": True, "target_modules": ["q_proj"]}
    theirs = peft.get_peft_model(make("llama"), peft.HRAConfig(**config))
    with pytest.warns(UserWarning, match="starts away"):
        ours = siliang.get_peft_model(make("llama"), siliang.HRAConfig(**config))
    for model, rank in ((ours, 4), (theirs, 2)):
        found = [p for name, p in model.named_parameters() if "hra_u" in name]
        assert [int(torch.linalg.matrix_rank(U)) for U in found] == [rank] * len(found)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_osf_trains_nothing_in_the_directions_that_stay(name: str) -> None:
    config = siliang.OSFConfig(task_type=TASK[name], effective_rank=6)
    model: Any = siliang.get_peft_model(make(name), config)
    assert torch.equal(model.eval()(**batch(name)).logits, make(name).eval()(**batch(name)).logits)
    model(**batch(name)).loss.backward()
    shapes = set()
    for layer in model.modules():
        if hasattr(layer, "osf_svd_params"):
            U_OK, _, V_KI = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
            low = layer.osf_svd_params["default"]
            for inside, grad in (
                (U_OK[:, :6].T @ low["U_low"].grad, low["U_low"].grad),
                (V_KI[:6] @ low["V_low"].grad.T, low["V_low"].grad),
            ):
                assert inside.norm() < 1e-4 * grad.norm()
            shapes.add(layer.base_layer.weight.shape)
    assert len(shapes) == {"llama": 4, "bert": 3}[name]  # square, tall and wide


def test_lily_shares_its_matrices_and_a_file_agrees_with_itself(tmp_path: Path) -> None:
    config = siliang.LilyConfig(task_type=TaskType.CAUSAL_LM, r=2, stride_A=2, target_modules=["q_proj", "k_proj"])
    model: Any = siliang.get_peft_model(make("llama"), config)
    assert torch.equal(model.eval()(**batch("llama")).logits, make("llama").eval()(**batch("llama")).logits)
    first, second = (model.base_model.model.model.layers[i].self_attn for i in (0, 1))
    assert first.q_proj.lily_A["default"] is second.q_proj.lily_A["default"]
    assert first.q_proj.lily_B["default"] is second.q_proj.lily_B["default"]
    assert first.q_proj.lily_B["default"] is not first.k_proj.lily_B["default"]
    assert first.q_proj.lily_router["default"] is not second.q_proj.lily_router["default"]
    with pytest.raises(MergeError, match="no one update that could be merged"):
        model.merge_and_unload()
    with pytest.raises(MergeError, match="no one update that could be merged"):
        first.q_proj.get_delta_weight("default")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lily_A.weight"
    save_file(tensors | {key: tensors[key] + 1}, path)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj\.lily_A\.weight and .* are one tensor"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)


def test_the_engine_leaves_the_padding_in_for_lily() -> None:
    from siliang.engine.step import Engine
    from siliang.tasks import TASKS

    model: Any = siliang.get_peft_model(make("llama"), siliang.LilyConfig(task_type=TaskType.CAUSAL_LM, r=2))
    engine = Engine(model, TASKS[TaskType.CAUSAL_LM])
    assert engine.padding is None
    assert any("lily takes a mean over the whole padded batch" in note for note in engine.notes)
    assert any("lily takes a mean over each batch: train.batch_size, tokens_at_once" in note for note in engine.notes)


def test_the_pages_name_what_smaller_batches_change() -> None:
    from siliang.errors import CATALOGUE
    from siliang.methods import METHODS
    from siliang.methods.lora_variants import VARIANTS
    from siliang.methods.method import Method

    mixing = [name for name, method in METHODS.items() if type(method).mixes_rows is not Method.mixes_rows]
    assert mixing == ["lora", "lily"]
    assert [name for name, variant in VARIANTS.items() if variant.mixes_rows] == ["velora_config"]
    page = CATALOGUE["SLE08"].en.remedy
    assert "except with LILY and LoRA's velora_config" in page


@pytest.mark.parametrize(("init_type", "mixes"), [("batch_average", True), ("random", False)])
def test_the_engine_says_that_velora_takes_a_mean_over_each_batch(init_type: str, mixes: bool) -> None:
    from siliang.engine.step import Engine
    from siliang.tasks import TASKS

    velora: Any = {"num_groups": 4, "init_type": init_type}
    config = siliang.LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, velora_config=velora)
    model: Any = siliang.get_peft_model(make("llama"), config)
    engine = Engine(model, TASKS[TaskType.CAUSAL_LM])
    assert (engine.padding is None) == mixes
    assert any("velora_config takes a mean over each batch" in note for note in engine.notes) == mixes
    engine.close()
