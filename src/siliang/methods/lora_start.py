"""Starts of LoRA that follow from data: what was learned for a layer waits here until an adapter is attached to it.

EVA gives A, and each layer's rank; B is 0. CorDA and LoRA-GA give A and B, and W' = W - s B A replaces W in the base
layer. Neither A and B as they started nor W' follow from the base model: they are kept with the adapter's training
state, and what is saved for use is LoRA of twice the rank on W (lora_conversion.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from siliang.files import replacing
from siliang.language import Bilingual, local
from siliang.methods import corda, lora_ga
from siliang.methods.eva import EvaConfig, principal_directions
from siliang.methods.layer import Layer, LayerAdapter, MakeAdapter
from siliang.methods.lora_config import BY_DATA, OUT_OF_THE_WEIGHT, LoraConfig
from siliang.methods.lora_init import check_rank, not_quantized
from siliang.methods.low_rank import LowRank, LowRankLinear
from siliang.methods.method import Adapter
from siliang.methods.start import StartData, keep_start, take_start
from siliang.models.introspect import features, is_linear, out_by_in
from siliang.models.quantized import float_weight, is_quantized
from siliang.types import AdapterError, ConfigError, first_line
from siliang.weight_files import check_weights as check_weights_file

SIDES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Start:
    """What was learned for a layer.

    Attributes:
        init: By which start.
        A: (R, I), on the CPU.
        B: (O, R), there too; None for 0.
    """

    init: str
    A: Tensor
    B: Tensor | None = None


def start_for(layer: nn.Module, path: str, config: LoraConfig) -> Start | None:
    """The start that was kept for a new adapter, which is the only one to have it.

    Raises:
        ConfigError: There must be one, and there is none.
    """
    found, init = take_start(layer), config.init_lora_weights
    if isinstance(found, Start) and found.init == init:
        return found
    if init not in OUT_OF_THE_WEIGHT or not is_linear(layer):
        return None
    if isinstance(layer.weight, FakeTensor) or layer.weight.is_meta:  # of a plan or a check: the sizes count
        return None
    function = "preprocess_corda" if init == "corda" else "preprocess_loraga"
    raise ConfigError(
        Bilingual(
            f"init_lora_weights = {init!r}: nothing was learned from data for {path}. Call "
            f"{function}(model, config, ...) before the adapter is attached (`siliang train` does it by itself).",
            f"init_lora_weights = {init!r}：没有为 {path} 从数据中学到初始值。请在接上适配器之前调用 "
            f"{function}(model, config, ...)（`siliang train` 会自动完成）。",
        )
    )


def started(make: MakeAdapter, start: Start | None, config: LoraConfig) -> MakeAdapter:
    """Makes an adapter that starts from what was learned; of a plan, one that only has the same size."""
    init = config.init_lora_weights
    if init not in BY_DATA:
        return make

    def make_started(layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
        adapter = make(layer, name, shared)
        if isinstance(adapter, LowRankLinear) and start is not None:
            put(adapter, start.A, start.B)
        elif isinstance(adapter, LowRankLinear) and isinstance(adapter.A, FakeTensor) and init in OUT_OF_THE_WEIGHT:
            put(adapter, adapter.A.detach(), adapter.B.detach())
        return adapter

    return make_started


@torch.no_grad()
def put(adapter: LowRank, A: Tensor, B: Tensor | None) -> None:
    """Gives an adapter its start, and its layer the weight without it.

    Raises:
        ConfigError: They were learned for another rank.
    """
    if A.shape != adapter.A.shape:
        raise ConfigError(
            Bilingual(
                f"The start was learned for r = {len(A)}, and the adapter has r = {len(adapter.A)}: use one config.",
                f"初始值是按 r = {len(A)} 学到的，而适配器的 r = {len(adapter.A)}：请使用同一个配置。",
            )
        )
    adapter.A.copy_(A)
    if B is not None:
        adapter.B.copy_(B)
        adapter.take_out(adapter.A, adapter.B)


# ---- learning it ----


@dataclass(frozen=True)
class Tuned:
    """The linear layers that an adapter is on: the starts by data are for these.

    Attributes:
        layers: The base model's, by path.
        ranks, scalings: R and s of each.
        adapters: What is on each layer, those of other kinds too.
    """

    layers: dict[str, nn.Module]
    ranks: dict[str, int]
    scalings: dict[str, float]
    adapters: Mapping[str, LayerAdapter]

    @classmethod
    def of(cls, adapter: Adapter[LoraConfig]) -> Tuned:
        """Those of an adapter."""
        linear = _low_rank(adapter)
        return cls(
            {path: one.layer.base_layer for path, one in linear},
            {path: len(one.A) for path, one in linear},
            {path: one.config_scaling for path, one in linear},
            adapter.layers,
        )


def plain(config: LoraConfig) -> LoraConfig:
    """The same with the usual start, which leaves the model as it is."""
    return dataclasses.replace(config, init_lora_weights=True, eva_config=None, corda_config=None, lora_ga_config=None)


def learn(model: nn.Module, config: LoraConfig, tuned: Tuned, data: StartData) -> LoraConfig:
    """Learns the start of an adapter, and keeps it for the next one on `model`.

    Args:
        tuned: The layers that it will be on.

    Returns:
        Its config.
    """
    match config.init_lora_weights:
        case "eva":
            settings = config.eva_config or EvaConfig()
            batches = data.batches(learned=settings.use_label_mask)
            found = principal_directions(tuned.layers, tuned.ranks, settings, batches)
            return with_directions(config, tuned.adapters, found)
        case "corda":

            def run() -> None:
                for text in data.singles(tokens=corda.most_tokens(tuned.layers)):
                    text.forward()

            learn_corda(config, tuned, run)
        case "lora_ga":

            def step() -> int:
                return len([batch.backward() for batch in data.batches(rows=lora_ga.ROWS)])

            check_weights(config, tuned)
            gradients = lora_ga.mean_gradients(model, tuned.layers, step)
            learn_lora_ga(config, tuned, gradients)
    return config


def check_weights(config: LoraConfig, tuned: Tuned) -> None:
    """
    Raises:
        ConfigError: The weights, which the start changes, are quantized, or too small for it.
    """
    init = str(config.init_lora_weights)
    if any(map(is_quantized, tuned.layers.values())):
        raise ConfigError(not_quantized(init))
    for path, layer in tuned.layers.items():
        check_rank(init, tuned.ranks[path], min(features(layer)))


def with_directions(
    config: LoraConfig, adapters: Mapping[str, LayerAdapter], found: Mapping[str, Tensor]
) -> LoraConfig:
    """Keeps EVA's start for each layer; the config with the ranks that it gives them.

    Args:
        adapters: Those of the adapter that was attached to find the layers, by path.
        found: A of each layer, (R', I); R' = 0 takes a layer out.
    """
    settings = config.eva_config or EvaConfig()
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, one in adapters.items():
        if not isinstance(one, LowRank):
            continue
        alpha, r = float(str(one.settings["lora_alpha"])), len(one.A)
        now = len(found[path]) if path in found else r
        if not now:
            continue
        targets.append(path)
        if path in found:
            keep_start(one.layer.base_layer, Start("eva", found[path].cpu()))
        if now != r and settings.adjust_scaling_factors:
            alpha *= now / r
        if now != config.r:
            ranks[path] = now
        if alpha != config.lora_alpha:
            alphas[path] = alpha
    return dataclasses.replace(config, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)


def learn_corda(
    config: LoraConfig, tuned: Tuned, run: Callable[[], object], read: Mapping[str, nn.Module] | None = None
) -> None:
    """Keeps CorDA's start for each layer.

    Args:
        run: Runs the model, one text at a time.
        read: The layers whose inputs are read; None for those that are tuned.
    """
    check_weights(config, tuned)
    settings, layers = config.corda_config or corda.CordaConfig(), tuned.layers
    parts = read_cache(settings.cache_file, [f"{path}.{part}" for path in layers for part in "USV"], layers)
    if not parts:
        found = read_cache(settings.covariance_file, layers, layers)
        if not found:
            found = corda.covariances(read or layers, run, wide=not settings.use_float16_for_covariance)
            write_cache(settings.covariance_file, found)
        for path, layer in layers.items():
            made = corda.decompose(float_weight(layer), found.pop(path), tuned.ranks[path], settings.corda_method)
            parts |= {f"{path}.{part}": t for part, t in zip("USV", made, strict=True)}
        write_cache(settings.cache_file, parts)
    for path, layer in layers.items():
        U, S, V = (parts[f"{path}.{part}"] for part in "USV")
        A, B = corda.factors(U, S, V, tuned.scalings[path])
        keep_start(layer, Start("corda", A.cpu(), B.cpu()))


def learn_lora_ga(config: LoraConfig, tuned: Tuned, gradients: Mapping[str, Tensor]) -> None:
    """Keeps LoRA-GA's start for each layer."""
    check_weights(config, tuned)
    settings = config.lora_ga_config or lora_ga.LoraGAConfig()
    for path, layer in tuned.layers.items():
        G_OI = out_by_in(layer, gradients[path])
        A, B = lora_ga.factors(float_weight(layer), G_OI, tuned.ranks[path], tuned.scalings[path], settings)
        keep_start(layer, Start("lora_ga", A.cpu(), B.cpu()))


# ---- what was learned, in a file ----


def read_cache(file: str | None, keys: Iterable[str], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a file of `write_cache`, beside the layers; empty where there is none yet.

    Raises:
        ConfigError: It is none, or of other layers.
    """
    if file is None or not Path(file).is_file():
        return {}
    try:
        check_weights_file(Path(file))
        found = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(
            Bilingual(
                f"{file} cannot be read as safetensors: {first_line(error)}. Remove it to have it made again.",
                f"{file} 无法按 safetensors 读取：{local(first_line(error), 'zh')}。删除它即可重新生成。",
            )
        ) from None
    if found.keys() != set(keys):
        raise ConfigError(
            Bilingual(
                f"{file} is of other layers than these: name another file, or remove it.",
                f"{file} 不是这些层的：请换一个文件名，或删除它。",
            )
        )
    device = next(iter(layers.values())).get_parameter("weight").device
    return {key: t.to(device) for key, t in found.items()}


def write_cache(file: str | None, tensors: Mapping[str, Tensor]) -> None:
    """Keeps what was learned, where a file is named for it."""
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(file)) as temporary:
            save_file({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, temporary)


# ---- keeping it with the adapter ----


def state_of(starts: Mapping[str, Start | None]) -> dict[str, Tensor]:
    """What an adapter keeps of its start, by layer: A and B, if a part of the weight went into them."""
    found: dict[str, Tensor] = {}
    for path, start in starts.items():
        if start is not None and start.B is not None:
            found |= {f"start.{path}.{side}": t.clone() for side, t in zip(SIDES, (start.A, start.B), strict=True)}
    return found


def check_state(adapter: Adapter[LoraConfig], state: Mapping[str, Tensor], source: str) -> None:
    """
    Raises:
        AdapterError: An adapter's files lack its start, without which its base weight is not known.
    """
    init = adapter.config.init_lora_weights
    for path, one in _low_rank(adapter):
        for side, own in zip(SIDES, (one.A, one.B), strict=True):
            found = state.get(f"start.{path}.{side}")
            if found is None:
                raise AdapterError(
                    Bilingual(
                        f"{source}: init_lora_weights = {init!r} changed the base model's weights by data that the "
                        "files do not hold. Let PEFT convert it: "
                        "save_pretrained(path_initial_model_for_weight_conversion=...).",
                        f"{source}：init_lora_weights = {init!r} 曾按数据改动基座模型的权重，而文件中没有这些数据。"
                        "请用 PEFT 转换：save_pretrained(path_initial_model_for_weight_conversion=...)。",
                    )
                )
            if found.shape != own.shape or not found.is_floating_point():
                raise AdapterError(
                    Bilingual(
                        f"{source}: start.{path}.{side} has shape {tuple(found.shape)}, the adapter needs "
                        f"{tuple(own.shape)}.",
                        f"{source}：start.{path}.{side} 的形状是 {tuple(found.shape)}，适配器需要 {tuple(own.shape)}。",
                    )
                )


def restore(adapter: Adapter[LoraConfig]) -> None:
    """Takes the start out of the base weights of an adapter that was loaded."""
    for path, one in _low_rank(adapter):
        one.take_out(*(adapter.state[f"start.{path}.{side}"] for side in SIDES))


def start_tensors(adapter: Adapter[LoraConfig]) -> dict[str, Tensor]:
    """A and B as they started, by their keys in an adapter's file; zeros where the weight is as it was."""
    return {
        f"base_model.model.{path}.{key}": adapter.state.get(f"start.{path}.{key.removesuffix('.weight')}", t * 0)
        for path, one in adapter.layers.items()
        for key, t in one.tensors().items()
    }


def _low_rank(adapter: Adapter[LoraConfig]) -> Iterable[tuple[str, LowRankLinear]]:
    return [(path, one) for path, one in adapter.layers.items() if isinstance(one, LowRankLinear)]


def learning_bytes(adapter: Adapter[LoraConfig]) -> int:
    """Memory that learning its start takes beside the model and a batch."""
    layers = Tuned.of(adapter).layers.values()
    match adapter.config.init_lora_weights:
        case "corda":  # C of each layer, and the decomposition of the largest
            inputs, largest = [features(layer)[0] for layer in layers], max(map(_numbers, layers), default=0)
            return 4 * (sum(n * n for n in inputs) + 3 * largest)
        case "lora_ga":
            return sum(layer.get_parameter("weight").nbytes for layer in layers)
        case _:
            return 0


def _numbers(layer: nn.Module) -> int:
    return layer.get_parameter("weight").numel()
