"""What a resumed training needs in addition to an adapter's own file, and the keys that it has in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from siliang.language import Bilingual
from siliang.methods.prompt import Prompt
from siliang.secrets import shortened
from siliang.types import AdapterError

STATE_PREFIX = "state."  # before what a method keeps between steps; the other keys are those of what makes a prompt


@dataclass(frozen=True)
class TrainingState:
    """What training alone needs of an adapter.

    Attributes:
        prompt: What makes a prompt, such as P-tuning's encoder, by its own names; empty where the prompt is a table.
        state: What the method keeps between steps, by its own names.
    """

    prompt: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor]) -> TrainingState:
        """From the tensors of a file."""
        state = {key.removeprefix(STATE_PREFIX): t for key, t in tensors.items() if key.startswith(STATE_PREFIX)}
        return cls({key: t for key, t in tensors.items() if not key.startswith(STATE_PREFIX)}, state)

    def for_file(self) -> dict[str, Tensor]:
        """The tensors of a file."""
        return {**self.prompt, **{f"{STATE_PREFIX}{key}": t for key, t in self.state.items()}}

    def check(self, prompt: Prompt | None, source: str) -> None:
        """Whether it is that of an adapter with this prompt. A prompt that is a table needs none of it.

        Args:
            source: The file.

        Raises:
            AdapterError: A tensor is missing or unknown, or has another shape.
        """
        if prompt is None and self.prompt:
            raise AdapterError(
                Bilingual(
                    f"{source} does not fit: the adapter has no place for {shortened(min(self.prompt), 80)}. What its "
                    f"method keeps between steps begins with {STATE_PREFIX!r}.",
                    f"{source} 与适配器不符：适配器没有 {shortened(min(self.prompt), 80)} 的位置。"
                    f"它的方法在各步之间保存的内容以 {STATE_PREFIX!r} 开头。",
                )
            )
        if prompt is None or prompt.flat or not self.prompt:
            return
        own = prompt.state_dict()
        if unknown := sorted(self.prompt.keys() - own.keys()):
            raise AdapterError(
                Bilingual(
                    f"{source} does not fit: the prompt has no place for {shortened(unknown[0], 80)}.",
                    f"{source} 与适配器不符：提示没有 {shortened(unknown[0], 80)} 的位置。",
                )
            )
        if missing := sorted(own.keys() - self.prompt.keys()):
            raise AdapterError(
                Bilingual(
                    f"{source} does not fit: {missing[0]}, which makes the prompt, is missing.",
                    f"{source} 与适配器不符：缺少生成提示的 {missing[0]}。",
                )
            )
        for key, tensor in own.items():
            if self.prompt[key].shape != tensor.shape:
                raise AdapterError(
                    Bilingual(
                        f"{source} does not fit: {key} has shape {tuple(self.prompt[key].shape)}, the prompt needs "
                        f"{tuple(tensor.shape)}.",
                        f"{source} 与适配器不符：{key} 的形状是 {tuple(self.prompt[key].shape)}，而提示需要 "
                        f"{tuple(tensor.shape)}。",
                    )
                )
