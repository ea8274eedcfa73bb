"""How virtual tokens reach the model: hooks that stand on its modules while the prompt is at work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from siliang.methods.prompt import Prompt, PromptConfig
from siliang.models.introspect import is_encoder_decoder, named_arguments, parameters_of, word_embeddings
from siliang.secrets import shortened
from siliang.types import ConfigError, TaskType, first_line


class Route(ABC):
    """The hooks that bring one prompt to the model. `remove` takes them off.

    Raises:
        ConfigError: The model has no place for them.
    """

    REMEDY: ClassVar[str] = "Use a method that works on layers, such as lora, on this model."

    def __init__(self, model: nn.Module, config: PromptConfig, prompt: Prompt) -> None:
        assert config.num_virtual_tokens is not None
        self.model, self.config, self.prompt = model, config, prompt
        self.V = config.num_virtual_tokens
        self._handles: list[Any] = []
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @abstractmethod
    def _install(self) -> None:
        """Puts the hooks on."""

    def before(self, module: nn.Module, change: Callable[[nn.Module, dict[str, Any]], None]) -> None:
        """Lets `change` rewrite the arguments of `module`'s forward, all by name."""
        # nothing local: a model with its hooks must pickle
        self._handles.append(module.register_forward_pre_hook(partial(_rewrite, change), with_kwargs=True))

    def after(self, module: nn.Module, change: Callable[[nn.Module, Any, Any], Any]) -> None:
        """Lets `change` give another output for `module`'s own."""
        self._handles.append(module.register_forward_hook(change))


@dataclass(frozen=True)
class PromptSpec:
    """The virtual tokens that an adapter will have. Nothing has been made yet.

    Attributes:
        config: The adapter's config, complete.
        route: How they reach the model.
    """

    config: PromptConfig
    route: type[Route]

    @property
    def numbers(self) -> int:
        """Numbers of the table of virtual tokens."""
        return self.config.rows * (self.config.width or 0)

    @property
    def encoder_numbers(self) -> int:
        """Numbers of what makes the table while it is trained."""
        return self.config.encoder_numbers

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the config asks for by their fields, none of which is larger than the largest in a file."""
        c = self.config
        given = {"num_virtual_tokens": c.num_virtual_tokens, "token_dim": c.token_dim}
        return {name: size for name, size in given.items() if size is not None}

    def make(self, model: nn.Module, *, from_file: bool, has_encoder: bool) -> Prompt:
        """Makes the prompt on the model's device, and tries it there.

        Args:
            from_file: A file will fill it.
            has_encoder: The files hold what made the prompt, and not the prompt alone.

        Raises:
            ConfigError: The model has no place for it, or it does not reach the answer.
        """
        start = self.config.for_file(has_encoder=has_encoder) if from_file else self.config
        # on the meta device the encoder of a large model costs nothing
        with torch.device(next(model.parameters()).device):
            prompt = start.make_prompt(prompted_embeddings(model))
        if from_file:
            self.route(model, self.config, prompt).remove()
        else:
            self._try(model, prompt)
        return prompt.requires_grad_(False)

    def _try(self, model: nn.Module, prompt: Prompt) -> None:
        """Computes a few tokens with the prompt, to find out before anything is trained whether it reaches the answer.

        Raises:
            ConfigError: It does not.
        """
        name, config = type(model).__name__, self.config
        route = self.route(model, config, prompt)
        try:
            with torch.enable_grad():
                out = answer(model, config.task_type)
                trained = list(prompt.parameters())
                reached = torch.autograd.grad(out.sum(), trained, allow_unused=True) if out.requires_grad else [None]
        except ConfigError:
            raise
        except Exception as error:  # of the model's own code, which knows nothing of the prompt
            route.remove()
            if _fails_anyway(model, config.task_type, error):
                return
            text = shortened(first_line(error, kind=True), 160)
            raise ConfigError(
                f"{name} cannot take the virtual tokens of {config.peft_type} ({text}). {route.REMEDY}"
            ) from None
        finally:
            route.remove()
        if all(g is None for g in reached):
            raise ConfigError(
                f"The virtual tokens of {config.peft_type} do not reach the answer of {name}. {route.REMEDY}"
            )


def prompted_embeddings(model: nn.Module) -> nn.Module:
    """The word embeddings that virtual tokens stand beside.

    Raises:
        ConfigError: The model has none.
    """
    found = word_embeddings(model)
    if found is None:
        raise ConfigError(
            f"Virtual tokens need a transformers model with word embeddings, and {type(model).__name__} is none: "
            "use a method that works on layers, such as lora."
        )
    return found


def answer(model: Any, task: TaskType | None) -> Tensor:
    """The model's first output for four tokens, with nothing random in it; the model is left as it was."""
    config = getattr(model, "config", None)
    training = [m for m in model.modules() if m.training]
    end = getattr(config, "eos_token_id", None)
    ids = torch.ones(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    if isinstance(end, int):
        ids[0, -1] = end  # BART's classifier reads its answer there
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_encoder_decoder(model) and task is not TaskType.SEQ_CLS and "decoder_input_ids" in parameters_of(model):
        inputs["decoder_input_ids"] = ids[:, :2]
    try:
        model.eval()
        out = model(**inputs)
    finally:
        for module in training:
            module.training = True
    tensors = [t for t in (out.values() if hasattr(out, "values") else out) if isinstance(t, Tensor)]
    return tensors[0]


def _fails_anyway(model: nn.Module, task: TaskType | None, error: Exception) -> bool:
    """Whether an error says nothing of the prompt: the model does not compute these tokens without it either, or it
    cannot without data."""
    if next(model.parameters()).is_meta and isinstance(error, NotImplementedError):
        return True
    try:
        with torch.no_grad():
            answer(model, task)
    except Exception:
        return True
    return False


def _rewrite(
    change: Callable[[nn.Module, dict[str, Any]], None], module: nn.Module, args: Any, kwargs: Any
) -> tuple[tuple[()], dict[str, Any]]:
    named = named_arguments(module, args, kwargs)
    change(module, named)
    return (), named
