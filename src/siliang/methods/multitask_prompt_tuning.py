"""Multitask prompt tuning: Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning (Wang et al., 2023,
arXiv:2303.02861).

    model(P * (U_t W_t) ; E(x))        P is the same for all tasks, U_t and W_t are those of the row's task t

* is the product of elements. The paper distils P and its factors from prompts of single tasks; as in PEFT they are
trained directly here.

Shapes: P (V, D), U (tasks, V, R), W (tasks, R, D); V virtual tokens, D the model's hidden size, R ranks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.embedding_hooks import EmbeddingHooks
from siliang.methods.prompt import PROMPT_KEY
from siliang.methods.prompt_method import PromptMethod
from siliang.methods.prompt_tuning import SoftPrompt, TextPromptConfig
from siliang.methods.task_ids import TaskIds
from siliang.types import ConfigError, PeftType
from siliang.weight_files import read_adapter, read_weights

U, W = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuningInit(StrEnum):
    """What the prompt starts from."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


SOURCES = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)


@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(TextPromptConfig):
    """Multitask prompt tuning's settings, with PEFT's names and defaults.

    Attributes:
        prompt_tuning_init: RANDOM or TEXT as in prompt tuning, or from an adapter that was trained on source tasks:
            AVERAGE_SOURCE_TASKS: P, and the mean of its tasks' U and W; EXACT_SOURCE_TASK: P, and one task's U and W;
            ONLY_SOURCE_SHARED: P alone.
        prompt_tuning_init_state_dict_path: That adapter: its folder, or its safetensors file.
        prompt_tuning_init_task: The task of EXACT_SOURCE_TASK.
        num_ranks: R.
        num_tasks: How many tasks there are.
    """

    prompt_tuning_init: MultitaskPromptTuningInit = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    peft_type: ClassVar[str] = PeftType.MULTITASK_PROMPT_TUNING
    FILES: ClassVar[tuple[str, ...]] = (*TextPromptConfig.FILES, "prompt_tuning_init_state_dict_path")
    AT_LEAST_1: ClassVar[tuple[str, ...]] = (*TextPromptConfig.AT_LEAST_1, "num_ranks", "num_tasks")

    def __post_init__(self) -> None:
        super().__post_init__()
        init, path = self.prompt_tuning_init, "prompt_tuning_init_state_dict_path"
        self.check_text(wanted=init is MultitaskPromptTuningInit.TEXT)
        if init in SOURCES and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(
                Bilingual(
                    f"prompt_tuning_init = {init} needs {path}, the adapter of the source tasks.",
                    f"prompt_tuning_init = {init} 还需要 {path}，即源任务的适配器。",
                )
            )
        if init in SOURCES[:2] and self.num_tasks != 1:
            raise ConfigError(
                Bilingual(
                    f"prompt_tuning_init = {init} starts one task, and num_tasks = {self.num_tasks}: set num_tasks = "
                    "1, or prompt_tuning_init = ONLY_SOURCE_SHARED.",
                    f"prompt_tuning_init = {init} 只能初始化一个任务，而 num_tasks = {self.num_tasks}："
                    "请设 num_tasks = 1，或 prompt_tuning_init = ONLY_SOURCE_SHARED。",
                )
            )

    @property
    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        T, V, R, D = self.num_tasks, self.rows, self.num_ranks, self.width
        return super().file_shapes | {U: (T, V, R), W: (T, R, D)}

    @property
    def encoder_elements(self) -> int:
        return sum(map(math.prod, self.file_shapes.values()))

    def tasks(self) -> TaskIds:
        return TaskIds(self.num_tasks, "num_tasks")

    def make_prompt(self, word_embeddings: nn.Embedding) -> MultitaskPrompt:
        """A new prompt.

        Args:
            word_embeddings: The base model's, whose rows TEXT starts from.

        Raises:
            ConfigError: The adapter of the source tasks does not fit.
            AdapterError: It cannot be read.
        """
        prompt = MultitaskPrompt(self)
        if self.inference_mode or word_embeddings.weight.is_meta:
            return prompt
        if self.prompt_tuning_init is MultitaskPromptTuningInit.TEXT:
            prompt.start_from(word_embeddings, torch.tensor(self.text_ids()))
        elif self.prompt_tuning_init in SOURCES:
            prompt.start_from_source(self)
        return prompt

    def for_file(self, *, has_encoder: bool) -> Self:
        """As for every prompt. The file holds all of it: nothing else is read."""
        init = MultitaskPromptTuningInit.RANDOM
        return dataclasses.replace(self, prompt_tuning_init=init, tokenizer_kwargs=None)


class MultitaskPromptTuning(PromptMethod[MultitaskPromptTuningConfig]):
    """Virtual tokens before the text, which the row's task scales."""

    name = "multitask_prompt_tuning"
    config = MultitaskPromptTuningConfig
    learning_rate = 3e-2
    learning_rate_source = Bilingual(
        "measured: 61% on SST-2 after 100 steps, 56% with 1e-2, 66% with 8.1e-1",
        "实测：SST-2 训练 100 步得 61%；用 1e-2 得 56%，用 8.1e-1 得 66%",
    )
    trains = Bilingual("virtual tokens before the text, scaled for each task", "文本之前的虚拟词元，按任务缩放")
    hooks = EmbeddingHooks


class MultitaskPrompt(SoftPrompt):
    """P, U and W: `embedding.weight`, `prefix_task_cols` and `prefix_task_rows`, as PEFT names them."""

    def __init__(self, config: MultitaskPromptTuningConfig) -> None:
        super().__init__(config.rows, config.width)
        for name in (U, W):
            self.register_parameter(name, nn.Parameter(0.02 * torch.randn(config.file_shapes[name])))

    def extra_tensors(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(name) for name in (U, W)}

    def of_rows(self, batch: int) -> Tensor:
        """P * (U_t W_t) of each row's task t, (B, V, D)."""
        assert self.tasks is not None
        t = self.tasks.ids
        return self() * (self.get_parameter(U)[t] @ self.get_parameter(W)[t])

    @torch.no_grad()
    def start_from_source(self, config: MultitaskPromptTuningConfig) -> None:
        """Takes over what an adapter of source tasks has."""
        path = Path(config.prompt_tuning_init_state_dict_path or "")
        found = read_adapter(path) if path.is_dir() else read_weights(path)
        init, task = config.prompt_tuning_init, config.prompt_tuning_init_task
        for name in (PROMPT_KEY, U, W) if init in SOURCES[:2] else (PROMPT_KEY,):
            own = self() if name == PROMPT_KEY else self.get_parameter(name)
            source = found.get(name)
            if source is not None and name != PROMPT_KEY and source.dim() == 3:
                if init is MultitaskPromptTuningInit.EXACT_SOURCE_TASK and not 0 <= task < len(source):
                    raise ConfigError(
                        Bilingual(
                            f"prompt_tuning_init_task = {task}: {path} has tasks 0 to {len(source) - 1}.",
                            f"prompt_tuning_init_task = {task}：{path} 只有任务 0 到 {len(source) - 1}。",
                        )
                    )
                average = init is MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS
                source = source.mean(0, keepdim=True) if average else source[task : task + 1]
            if source is None or source.shape != own.shape:
                there, there_zh = ("none", "没有") if source is None else (f"{tuple(source.shape)}",) * 2
                raise ConfigError(
                    Bilingual(
                        f"prompt_tuning_init_state_dict_path: {path} has {there} for {name}, which must be "
                        f"{tuple(own.shape)}: give a multitask prompt of the same sizes.",
                        f"prompt_tuning_init_state_dict_path：{path} 的 {name} 为 {there_zh}，应为 "
                        f"{tuple(own.shape)}：请给出同样大小的多任务提示。",
                    )
                )
            own.copy_(source)
