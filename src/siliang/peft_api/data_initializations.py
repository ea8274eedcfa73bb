"""LoRA's initializations from data, under the names of Hugging Face PEFT: EVA, CorDA, LoRA-GA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods import corda, lora_ga
from siliang.methods.eva import EvaConfig, principal_directions
from siliang.methods.initialization_cache import read_cache, write_cache
from siliang.methods.layer import LayerAdapter
from siliang.methods.learned_initialization import check_weights, keep, plain, tuned_layers
from siliang.methods.lora_config import LoraConfig
from siliang.methods.lora_ga import mean_gradients
from siliang.methods.lora_initialization import Factors, TunedLayers
from siliang.methods.method import Adapter
from siliang.peft_api.checks import check_config
from siliang.peft_api.model import PeftModel
from siliang.types import ConfigError

PREFIX = "base_model.model."
Inputs = Any  # what a data loader gives: mostly a mapping of tensors


def forward_fn_dict(model: nn.Module, inputs: Inputs) -> object:
    """Calls the model with a mapping."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Tensor], peft_config: LoraConfig) -> Tensor:
    """Which tokens EVA reads, (B, T) as the indices of what is not padding and is learned."""
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    settings = peft_config.eva_config or EvaConfig()
    if settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows of a layer's input at these tokens, (N, I)."""
    return _first(layer_input)[tuple(model_input.T)]


def _every_row(layer_input: Any, model_input: object, layer_name: str) -> Tensor:
    return _first(layer_input).flatten(0, -2)


def _first(layer_input: Any) -> Tensor:
    return layer_input if isinstance(layer_input, Tensor) else layer_input[0]


@dataclass(frozen=True)
class _Batch:
    """A batch of a user's data loader."""

    run: Callable[[], object]
    rows: Callable[[Tensor, str], Tensor]

    def forward(self) -> object:
        return self.run()

    def backward(self) -> object:
        raise NotImplementedError

    def rows_of(self, x: Tensor, path: str) -> Tensor:
        return self.rows(x, path)


@dataclass(frozen=True)
class _Batches:
    """A user's data loader, as often as it is asked for."""

    dataloader: Iterable[Inputs]
    of: Callable[[Inputs], _Batch]

    def __iter__(self) -> Any:
        return map(self.of, self.dataloader)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Inputs],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Inputs], object] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Inputs, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """EVA's A of each layer by the layer's name in `model`, (R', I); a rank R' may be 0.

    Args:
        model: A base model, or a PeftModel, whose adapters are off meanwhile.
        dataloader: Batches, read from the beginning again until the directions have settled.
        peft_config: Of LoRA; None for that of the PeftModel's adapter.
        forward_fn: Runs the model on a batch.
        prepare_model_inputs_fn: Makes of a batch what the next function gets of it; None for the batch itself.
        prepare_layer_inputs_fn: Makes of a layer's input the rows that count, (N, I); a mapping has one for each
            layer's name, None takes all rows.
        adapter_name: Whose config and layers.
        gather_distributed_inputs: Of several processes, read the batches of all.
        show_progress_bar: Without effect.

    Raises:
        ConfigError: No config, no batches, or such as are too small; or `prepare_layer_inputs_fn` names no layer.
    """
    if isinstance(model, PeftModel):
        adapter = cast(Adapter[LoraConfig], model.injection.adapters[adapter_name])
        config, tuned, start = peft_config or adapter.config, tuned_layers(adapter), PREFIX
    elif peft_config is None:
        raise ConfigError(
            Bilingual("Give peft_config: the model has no adapter.", "请给出 peft_config：模型上没有适配器。")
        )
    else:
        config, (tuned, _), start = peft_config, _tuned(model, peft_config), ""
    if not any(True for _ in dataloader):
        raise ConfigError(Bilingual("The data loader gives no batches.", "数据加载器没有给出批次。"))
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    prepare = prepare_layer_inputs_fn
    if isinstance(prepare, Mapping) and (unknown := [n for n in prepare if n.removeprefix(PREFIX) not in tuned.layers]):
        raise ConfigError(
            Bilingual(
                f"prepare_layer_inputs_fn: {unknown[0]!r} is no layer of the adapter.",
                f"prepare_layer_inputs_fn：{unknown[0]!r} 不是适配器的层。",
            )
        )

    def batch(inputs: Inputs) -> _Batch:
        inputs = _to(inputs, device)
        given = inputs if prepare_model_inputs_fn is None else prepare_model_inputs_fn(inputs, config)

        def rows(x: Tensor, path: str) -> Tensor:
            own = prepare.get(start + path) if isinstance(prepare, Mapping) else prepare
            return (own or _every_row)((x,), given, start + path)

        return _Batch(partial(forward_fn, model, inputs), rows)

    several = gather_distributed_inputs and dist.is_available() and dist.is_initialized()
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            settings = config.eva_config or EvaConfig()
            gather = {"gather": _gathered} if several else {}
            found = principal_directions(tuned.layers, tuned.ranks, settings, _Batches(dataloader, batch), **gather)
    finally:
        model.train(was_training)
    return {start + path: A for path, A in found.items()}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Inputs] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Inputs], object] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Inputs, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Initializes an adapter with EVA: its layers get the ranks and the A that the data says, and B = 0.

    The adapter is made anew: hold no parameters of it from before, in an optimizer for instance.

    Args:
        eva_state_dict: From `get_eva_state_dict`, in place of a data loader.

    For the others see `get_eva_state_dict`.

    Raises:
        ConfigError: The model has no such adapter, its init_lora_weights is not "eva", or others are active beside it.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.peft_config.get(adapter_name), LoraConfig):
        raise ConfigError(
            Bilingual(
                f"initialize_lora_eva_weights needs a PeftModel with a LoRA adapter {adapter_name!r}.",
                f"initialize_lora_eva_weights 需要带有 LoRA 适配器 {adapter_name!r} 的 PeftModel。",
            )
        )
    adapter = cast(Adapter[LoraConfig], model.injection.adapters[adapter_name])
    if adapter.config.init_lora_weights != "eva" or len(model.active_adapters) > 1:
        raise ConfigError(
            Bilingual(
                "initialize_lora_eva_weights is for an adapter with init_lora_weights = 'eva' that is active alone.",
                "initialize_lora_eva_weights 用于 init_lora_weights = 'eva' 且单独激活的适配器。",
            )
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError(
                Bilingual("Give a dataloader, or eva_state_dict.", "请给出 dataloader 或 eva_state_dict。")
            )
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    found = {name.removeprefix(PREFIX): A for name, A in eva_state_dict.items()}
    if missing := [path for path in adapter.layers if path not in found]:
        message = Bilingual(
            f"EVA has no initialization for {len(missing)} layers, such as {missing[0]}: they have the usual one.",
            f"EVA 没有 {len(missing)} 层的初始值，例如 {missing[0]}：它们使用通常的初始值。",
        )
        warnings.warn(message, stacklevel=2)
    config = keep(adapter.config, adapter.layers, {path: Factors(A) for path, A in found.items()})
    active = adapter_name in model.active_adapters
    model.delete_adapter(adapter_name)
    model.add_adapter(adapter_name, config)
    if active:
        model.set_adapter(adapter_name)


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Learns CorDA's initialization from data, for the adapter that `get_peft_model` attaches next.

    Args:
        model: The base model.
        lora_config: With init_lora_weights = "corda".
        run_model: Runs the model, one text at a time. None where `corda_config` names a file that is there.
        hooked_model: Another model of the same layers, whose inputs are read.

    Raises:
        ConfigError: Neither data nor a file, or the data is not enough.
    """
    check_config(lora_config)
    if getattr(lora_config, "init_lora_weights", None) != "corda":
        raise ConfigError(
            Bilingual(
                "preprocess_corda is for init_lora_weights = 'corda'.",
                "preprocess_corda 用于 init_lora_weights = 'corda'。",
            )
        )
    (tuned, adapters), host = _tuned(model, lora_config), hooked_model or model
    check_weights(lora_config.initialization, tuned)
    read = {path: host.get_submodule(path) for path in tuned.layers}
    was_training = host.training
    host.eval()
    try:
        settings = lora_config.corda_config or corda.CordaConfig()
        found = corda.factors_of_layers(tuned, settings, run_model or _no_data, read)
    finally:
        host.train(was_training)
    keep(lora_config, adapters, found)


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], object], cache_file: str | None = None
) -> None:
    """Learns LoRA-GA's initialization from data, for the adapter that `get_peft_model` attaches next.

    Args:
        model: The base model.
        lora_config: With init_lora_weights = "lora_ga".
        train_step: Runs forward and backward passes; the gradients of all of them are averaged.
        cache_file: Where the gradients are kept, in safetensors, and read from where it is there.

    Raises:
        ConfigError: The data is not enough.
    """
    check_config(lora_config)
    if getattr(lora_config, "init_lora_weights", None) != "lora_ga":
        raise ConfigError(
            Bilingual(
                "preprocess_loraga is for init_lora_weights = 'lora_ga'.",
                "preprocess_loraga 用于 init_lora_weights = 'lora_ga'。",
            )
        )
    tuned, adapters = _tuned(model, lora_config)
    if not tuned.layers:
        raise ConfigError(
            Bilingual(
                "init_lora_weights = 'lora_ga' is for linear layers, and target_modules names none.",
                "init_lora_weights = 'lora_ga' 用于线性层，而 target_modules 中没有线性层。",
            )
        )
    check_weights(lora_config.initialization, tuned)
    gradients = read_cache(cache_file, tuned.layers, tuned.layers)
    if not gradients:
        gradients = mean_gradients(model, tuned.layers, lambda: (train_step(), None)[1])
        write_cache(cache_file, gradients)
    settings = lora_config.lora_ga_config or lora_ga.LoraGAConfig()
    keep(lora_config, adapters, lora_ga.factors_of_layers(tuned, settings, gradients))


def _tuned(model: nn.Module, config: LoraConfig) -> tuple[TunedLayers, Mapping[str, LayerAdapter]]:
    """The layers of a base model that an adapter of this config will be on, and a usual adapter's parts on them."""
    with torch.random.fork_rng(devices=[]):  # the random numbers are the user's
        attached = PeftModel(model, plain(config))
    try:
        adapter = cast(Adapter[LoraConfig], attached.injection.adapters["default"])
        return tuned_layers(adapter), dict(adapter.layers)
    finally:
        attached.unload()


def _no_data() -> None:
    raise ConfigError(
        Bilingual(
            "Give run_model: corda_config names no file that is there.",
            "请给出 run_model：corda_config 没有指向已有的文件。",
        )
    )


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _to(value, device) for key, value in inputs.items()}
    return type(inputs)(_to(value, device) for value in inputs) if isinstance(inputs, list | tuple) else inputs


def _gathered(X: Tensor) -> Tensor:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, X.cpu())
    return torch.cat(found).to(X.device)
