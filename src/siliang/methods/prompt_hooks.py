"""How virtual tokens reach the model: hooks on its modules while the prompt is active."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from siliang.language import Bilingual, local
from siliang.methods.prompt import PROMPT_KEY, Prompt, PromptConfig
from siliang.methods.task_ids import TaskIds
from siliang.models.introspect import is_encoder_decoder, named_arguments, parameters_of, word_embeddings
from siliang.secrets import shortened
from siliang.types import ConfigError, TaskType, first_line

T = TypeVar("T")
Arguments: TypeAlias = dict[str, object]  # of a forward, by name


class PromptHooks(ABC):
    """The hooks that bring one prompt to the model.

    Raises:
        ConfigError: The model has no place for them.
    """

    REMEDY: ClassVar[str] = Bilingual(
        "Use a method that works on layers, such as lora, on this model.", "这个模型请用作用于各层的方法，例如 lora。"
    )

    def __init__(self, model: nn.Module, config: PromptConfig, prompt: Prompt) -> None:
        assert config.num_virtual_tokens is not None
        self.model, self.config, self.prompt = model, config, prompt
        self.V = config.num_virtual_tokens
        self._handles: list[RemovableHandle] = []
        try:
            self._add()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @abstractmethod
    def _add(self) -> None:
        """Adds the hooks."""

    def before(self, module: nn.Module, change: Callable[[nn.Module, Arguments], None]) -> None:
        """Before each forward of `module` `change` may set its arguments, which it gets by name."""
        # nothing local: a model with its hooks must pickle
        self._handles.append(module.register_forward_pre_hook(partial(_rewrite, change), with_kwargs=True))

    def after(self, module: nn.Module, change: Callable[[nn.Module, tuple[object, ...], T], object]) -> None:
        """After each forward of `module` what `change` returns replaces its output."""
        self._handles.append(module.register_forward_hook(change))


@dataclass(frozen=True)
class PromptSpec:
    """The virtual tokens that an adapter will have. Nothing has been made yet.

    Attributes:
        config: The adapter's config, complete.
        hooks: How they reach the model.
        tasks: The task of each row, where each task has its own.
    """

    config: PromptConfig
    hooks: type[PromptHooks]
    tasks: TaskIds | None = None

    @property
    def elements(self) -> int:
        """Elements of what the file holds."""
        return sum(map(math.prod, self.config.file_shapes.values()))

    @property
    def encoder_elements(self) -> int:
        """Parameters of what makes the table while it is trained."""
        return self.config.encoder_elements

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes in the config by their fields: none may be larger than the largest size in a file."""
        c = self.config
        given = {"num_virtual_tokens": c.num_virtual_tokens, "token_dim": c.token_dim}
        largest = {key: max(shape) for key, shape in c.file_shapes.items() if key != PROMPT_KEY}
        return {name: size for name, size in given.items() if size is not None} | largest

    def make(self, model: nn.Module, *, from_file: bool, has_encoder: bool) -> Prompt:
        """Makes the prompt on the model's device, and tries it there.

        Args:
            from_file: A file will fill it.
            has_encoder: The files hold what made the prompt, and not the prompt alone.

        Raises:
            ConfigError: The model has no place for it, or it does not reach the output.
        """
        start = self.config.for_file(has_encoder=has_encoder) if from_file else self.config
        # on the meta device the encoder of a large model costs nothing
        with torch.device(next(model.parameters()).device):
            prompt = start.make_prompt(prompted_embeddings(model))
        prompt.tasks = self.tasks
        if from_file:
            self.hooks(model, self.config, prompt).remove()
        else:
            self._try(model, prompt)
        return prompt.requires_grad_(False)

    def _try(self, model: nn.Module, prompt: Prompt) -> None:
        """Computes a few tokens with the prompt, to find out before training whether it reaches the output.

        Raises:
            ConfigError: It does not.
        """
        name, config, tasks = type(model).__name__, self.config, prompt.tasks
        remove = tasks.watch(model) if tasks else None
        hooks = self.hooks(model, config, prompt)
        try:
            with torch.enable_grad(), tasks.given(0) if tasks else nullcontext():
                out = first_output(model, config.task_type)
                trained = prompt.trained()
                reached = torch.autograd.grad(out.sum(), trained, allow_unused=True) if out.requires_grad else [None]
        except ConfigError:
            raise
        except Exception as error:  # of the model's own code, which knows nothing of the prompt
            hooks.remove()
            if _fails_anyway(model, config.task_type, error):
                return
            text = shortened(first_line(error, kind=True), 160)
            raise ConfigError(
                Bilingual(
                    f"{name} cannot take the virtual tokens of {config.peft_type} ({text}). {hooks.REMEDY}",
                    f"{name} 不能接受 {config.peft_type} 的虚拟词元（{text}）。{local(hooks.REMEDY, 'zh')}",
                )
            ) from None
        finally:
            hooks.remove()
            if remove is not None:
                remove()
        if all(g is None for g in reached):
            raise ConfigError(
                Bilingual(
                    f"The virtual tokens of {config.peft_type} do not reach the output of {name}. {hooks.REMEDY}",
                    f"{config.peft_type} 的虚拟词元传不到 {name} 的输出。{local(hooks.REMEDY, 'zh')}",
                )
            )


def prompted_embeddings(model: nn.Module) -> nn.Embedding:
    """The word embeddings, to which virtual tokens are added.

    Raises:
        ConfigError: The model has none.
    """
    found = word_embeddings(model)
    if found is None:
        raise ConfigError(
            Bilingual(
                f"Virtual tokens need a transformers model with word embeddings, and {type(model).__name__} is none: "
                "use a method that works on layers, such as lora.",
                f"虚拟词元需要带词嵌入的 transformers 模型，而 {type(model).__name__} 不是："
                "请用作用于各层的方法，例如 lora。",
            )
        )
    return found


def first_output(model: nn.Module, task: TaskType | None) -> Tensor:
    """The model's first output for four tokens, with nothing random in it; the model is left as it was."""
    config = getattr(model, "config", None)
    training = [m for m in model.modules() if m.training]
    end = getattr(config, "eos_token_id", None)
    ids = torch.ones(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    if isinstance(end, int):
        ids[0, -1] = end  # BART's classifier reads the state there
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_encoder_decoder(model) and task is not TaskType.SEQ_CLS and "decoder_input_ids" in parameters_of(model):
        inputs["decoder_input_ids"] = ids[:, :2]
    try:
        model.eval()
        out = model(**inputs)
    finally:
        for module in training:
            module.training = True
    return next(t for t in (out.values() if hasattr(out, "values") else out) if isinstance(t, Tensor))


def _fails_anyway(model: nn.Module, task: TaskType | None, error: Exception) -> bool:
    """Whether an error has nothing to do with the prompt: the model does not compute these tokens without it either, or
    it cannot without data."""
    if next(model.parameters()).is_meta and isinstance(error, NotImplementedError):
        return True
    try:
        with torch.no_grad():
            first_output(model, task)
    except Exception:
        return True
    return False


def tensor_in(named: Arguments, name: str) -> Tensor | None:
    """The tensor that a forward was called with under a name; None where there is none."""
    found = named.get(name)
    assert found is None or isinstance(found, Tensor), f"{name} is a {type(found).__name__}"
    return found


def _rewrite(
    change: Callable[[nn.Module, Arguments], None], module: nn.Module, args: tuple[object, ...], kwargs: Arguments
) -> tuple[tuple[()], Arguments]:
    named = named_arguments(module, args, kwargs)
    change(module, named)
    return (), named
