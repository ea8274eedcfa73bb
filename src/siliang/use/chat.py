"""The base model and any number of runs get the same prompt. One base model stays in memory; adapters are attached in
turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from siliang.data.messages import Conversation, Message
from siliang.engine.written import positions_of
from siliang.files import write_text
from siliang.language import Bilingual
from siliang.models.load import load_model
from siliang.peft_api.model import PeftModel
from siliang.run_folder import OpenedRun, find_run_or_model, load_base, load_run_tokenizer
from siliang.tasks import TASKS, Task, task_of
from siliang.types import ConfigError, OutputError
from siliang.use.generate import NEW_TOKENS, generate, how_it_is_asked
from siliang.use.predict import predict

BASE = "base"


class Chat:
    """Runs side by side.

    Attributes:
        names: The models, in order: each base, unless its head would be new, and the runs.
        writes: They generate text; otherwise they predict a class.
        system: The system message of the conversation.
        notes: Changes since training that `force` accepted.
        how: How a run is asked, of those that were trained on plain texts.
    """

    def __init__(
        self,
        folders: list[Path],
        device: torch.device,
        *,
        base: str | None = None,
        force: bool = False,
        task_id: int | None = None,
    ) -> None:
        """Opens the runs' base models; runs with the same one share it.

        Args:
            base: Where the runs' base model is now: a folder, or a name on the hub.
            force: Continue even if a base model has changed since the training.
            task_id: The task of the questions, for runs of a method with several.

        Raises:
            ConfigError: A folder is not a finished run, or the runs have different tasks.
            ModelError: A base model is missing or has changed.
        """
        self._device, self._task_id = device, task_id
        self.system = ""
        self._turns: dict[str, list[Message]] = {}
        self._runs = [_Closed(folder, base, force) for folder in folders]
        for folder, run in zip(folders, self._runs, strict=True):
            task = run.task
            if task.example_prompt is None:
                raise ConfigError(
                    Bilingual(
                        f"{folder} was trained for {task.title}: it cannot chat. Use `siliang eval`.",
                        f"{folder} 的任务是 {task.title}：不能对话。请用 `siliang eval`。",
                    )
                )
        self.notes = [note for run in self._runs for note in run.trained.notes]
        asked = {folder: how_it_is_asked(run.record) for folder, run in zip(folders, self._runs, strict=True)}
        self.how = {folder: how for folder, how in asked.items() if how is not None}
        tasks = {run.config.task for run in self._runs}
        writing = {TASKS[task].writes for task in tasks}
        if len(writing) > 1 or (False in writing and len(tasks) > 1):
            raise ConfigError(
                Bilingual(
                    f"the runs do different things: {', '.join(sorted(task.lower() for task in tasks))}. "
                    "Ask those that classify and those that write one after the other.",
                    f"这些运行的任务不同：{'、'.join(sorted(task.lower() for task in tasks))}。请把分类的和生"
                    "成文本的分开来问。",
                )
            )
        self.writes = writing == {True}
        self._bases: dict[str, Any] = {}
        labels = [str(folder) for folder in folders]
        self._by_name = dict(zip(labels, self._runs, strict=True))
        self._of_base = self._named_bases() if self.writes else {}
        self.names = [*self._of_base, *self._by_name]

    def _named_bases(self) -> dict[str, _Closed]:
        """A run of each base model, by what the base is called: "base", or, of several, with the model's name."""
        runs = {run.key: run for run in reversed(self._runs) if run.has_adapter}  # of each the first
        found: dict[str, _Closed] = {}
        for run in reversed(runs.values()):
            name = BASE if len(runs) == 1 else f"{BASE} {Path(run.config.model).name}"
            if name in found and run.config.quantization:
                name = f"{name} in {run.config.quantization.bits} bits"
            while name in found or name in self._by_name:
                name += "'"
            found[name] = run
        return found

    def reset(self) -> None:
        """Forgets the turns, not the system message."""
        self._turns.clear()

    def save(self, path: Path) -> None:
        """Writes the conversation with each model as a line of JSON, as rows of the layout messages.

        Raises:
            OutputError: There is no conversation, or the file is of another kind, exists, or cannot be written.
        """
        if not any(run.keeps for run in self._runs):
            raise OutputError(
                Bilingual(
                    "there is nothing to save: models that classify, translate or continue texts keep no conversation.",
                    "没有可保存的内容：分类、翻译或续写文本的模型不保留对话。",
                )
            )
        if not self._turns:
            raise OutputError(
                Bilingual(
                    "there is no conversation to save yet: ask something first.", "还没有可保存的对话：请先提问。"
                )
            )
        if path.suffix.lower() != ".jsonl":  # .json would be read as one list
            raise OutputError(
                Bilingual(
                    f"{path}: a conversation is saved as a row of a .jsonl file: choose a name that ends with .jsonl.",
                    f"{path}：对话逐行保存在 .jsonl 文件中：请用以 .jsonl 结尾的名称。",
                )
            )
        system = [Message("system", self.system)] if self.system else []
        rows = [
            {"model": name, "messages": [{"role": m.role, "content": m.content} for m in (*system, *turns)]}
            for name, turns in self._turns.items()
        ]
        try:
            if path.exists():
                raise OutputError(
                    Bilingual(f"{path} exists already: choose another name.", f"{path} 已存在：请换个名称。")
                )
            if not path.parent.is_dir():
                raise OutputError(Bilingual(f"There is no folder {path.parent}.", f"找不到文件夹 {path.parent}。"))
            write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
        except OutputError:
            raise
        except OSError as error:  # the conversation is not lost: it can be saved elsewhere
            why = error.strerror or error
            raise OutputError(
                Bilingual(
                    f"{path} cannot be written: {why}. Choose another name.", f"{path} 无法写入：{why}。请换个名称。"
                )
            ) from error

    def _history(self, name: str, run: OpenedRun, prompt: str, new: int, *, base: bool) -> list[Message]:
        """The turns with a model that fit in front of a question and its answer; the oldest go first."""
        turns = list(self._turns.get(name, []))
        limit = positions_of(run.model, base=base).reads
        assert run.task.prompt is not None
        while turns and limit is not None:
            system = [Message("system", self.system)] if self.system else []
            talk = Conversation((*system, *turns, Message("user", prompt)))
            if len(run.task.prompt(run.tokenizer, run.config.data, talk)[0]) + min(new, limit // 2) <= limit:
                break
            del turns[:2]
        return turns

    def answer(
        self, name: str, prompt: str, on_text: Callable[[str], None], *, max_new_tokens: int | None, temperature: float
    ) -> str:
        """The output of one model; `on_text` is called with each piece while it is generated. A model that writes
        conversations has the turns before.

        Raises:
            SiliangError: The prompt is longer than the model can read.
        """
        of_base = name in self._of_base
        closed = self._of_base[name] if of_base else self._by_name[name]
        with self._open(closed) as run:
            if self.writes:
                keeps = closed.keeps
                room = max_new_tokens or NEW_TOKENS
                text = generate(
                    run,
                    prompt,
                    system=self.system if keeps else "",
                    history=self._history(name, run, prompt, room, base=of_base) if keeps else (),
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    base=of_base,
                    on_text=on_text,
                )
                if keeps:
                    self._turns.setdefault(name, []).extend((Message("user", prompt), Message("assistant", text)))
                return text
            predicted = next(predict(run, [prompt]))
        probability = predicted.probability
        text = predicted.predicted if probability is None else f"{predicted.predicted} ({probability:.2f})"
        on_text(text)
        return text

    @contextmanager
    def _open(self, run: _Closed) -> Iterator[OpenedRun]:
        """The run, ready to use within the block; its adapter is detached at the end."""
        base = self._base(run)
        model: Any = PeftModel.from_pretrained(base, run.trained.weights) if run.has_adapter else base
        if not run.config.quantization:
            model.to(self._device)
        try:
            yield OpenedRun(
                run.trained.folder,
                run.config,
                run.record,
                model.eval(),
                run.tokenizer,
                run.trained,
                task_id=self._task_id,
            )
        finally:
            if isinstance(model, PeftModel):
                model.unload()

    def _base(self, run: _Closed) -> Any:
        if run.key not in self._bases:
            if run.has_adapter:
                base = load_base(run.config, run.record.labels, run.tokenizer, dtype=torch.float32, device=self._device)
            else:
                folder = str(run.trained.weights)
                base = load_model(folder, run.task.model, dtype=torch.float32, labels=run.record.labels)
            self._bases[run.key] = base
        return self._bases[run.key]


class _Closed:
    """A run whose model is not loaded."""

    def __init__(self, folder: Path, base: str | None, force: bool) -> None:
        self.trained = find_run_or_model(folder, base=base, force=force)
        self.config, self.record, self.has_adapter = self.trained.config, self.trained.record, self.trained.has_adapter
        self.tokenizer = load_run_tokenizer(self.trained)

    @property
    def task(self) -> Task:
        """The task, with the run's settings."""
        return task_of(self.config, self.record.layout, self.record.classification)

    @property
    def keeps(self) -> bool:
        """A question is asked with the turns before."""
        return self.task.writes and self.task.decoder_only and not self.record.of_texts

    @property
    def key(self) -> str:
        """The same for runs that can share a base model."""
        if not self.has_adapter:
            return str(self.trained.weights)
        c = self.config
        seed = c.train.seed if self.task.model.heads else None  # draws what the weights do not hold
        quantized = c.quantization.model_dump_json() if c.quantization else ""
        return repr((c.model, c.revision, quantized, c.data.add_tokens, self.record.labels, self.task.model, seed))
