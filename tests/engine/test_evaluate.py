"""The one evaluation: no figure depends on batches, packing or on who asks."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import refused
from commands import run as run_command
from every_task import METHODS, TASKS, configured, make_models, rows_of
from tiny import VOCABULARY, WORDS, write_jsonl
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from siliang.engine.batches import sequences_of
from siliang.peft_api.model import PeftModel
from siliang.run_folder import open_run
from siliang.train.loop import Training
from siliang.train.prepare import prepare
from siliang.train.run import train
from siliang.train.types import Listener, Run
from siliang.types import DataError, TaskType
from siliang.use.evaluate import engine_of, eval_rows, evaluate, evaluation, sums_of

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
# in `make test` LoRA on every task, and each other method on two; all of them in `make test-long`
SOME_TASKS = {
    "lora": TASKS,
    "full": ("seq_cls", "causal_lm"),
    "prompt_tuning": ("causal_lm", "question_ans"),
    "p_tuning": ("seq_cls", "seq_2_seq_lm"),
    "prefix_tuning": ("causal_lm", "token_cls"),
}
CASES = [
    (task, method) if task in SOME_TASKS[method] else pytest.param(task, method, marks=pytest.mark.long)
    for method in METHODS
    for task in TASKS
]


STEP = 48  # more rows than are held out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def measured(run: Run, batch_size: int, packing: bool) -> dict[str, float]:
    update = {"batch_size": batch_size, "packing": packing}
    if run.config.task is TaskType.EMBEDDING:  # whose loss depends on the rows of a step
        update |= {"gradient_accumulation": STEP // batch_size}
    t = run.config.train.model_copy(update=update)
    again = run.config.model_copy(update={"train": t})
    training = Training(Run(**{**vars(run), "config": again}))
    try:
        return training.evaluate()
    finally:
        training.engine.close()


@torch.no_grad()
def plain_loss(run: Run) -> float:
    """As transformers computes it, of one row after the other, nothing padded."""
    if run.config.task is TaskType.REWARD:
        return plain_reward_loss(run)
    if run.config.task is TaskType.PREFERENCE:
        return plain_preference_loss(run)
    if run.config.task is TaskType.EMBEDDING:
        return plain_embedding_loss(run)
    if run.task.data.ordered:
        return plain_ordered_loss(run)
    loss, count = 0.0, 0
    model: nn.Module = run.model.eval()
    for i in range(len(run.eval_set)):
        row = {k: torch.tensor([v]) for k, v in run.eval_set[i].items()}
        labels = row.get("labels")
        n = 1 if labels is None or labels.dim() == 1 else int((labels != -100).sum())
        if run.config.task is TaskType.CAUSAL_LM:
            n = int((row["labels"][:, 1:] != -100).sum())
        if run.config.task is TaskType.RERANKER:  # transformers would take the squared error
            label = row.pop("labels").float()
            found = F.binary_cross_entropy_with_logits(model(**row).logits.flatten(), label)
        else:
            found = model(**row).loss
        loss, count = loss + float(found) * n, count + n
    return loss / count


def plain_reward_loss(run: Run) -> float:
    """Of one answer after the other."""
    losses: list[float] = []
    for i in range(len(run.eval_set)):
        better, worse = (
            float(run.model(input_ids=torch.tensor([part["input_ids"]])).logits)
            for part in sequences_of(run.eval_set[i])
        )
        losses.append(math.log1p(math.exp(worse - better)))
    return sum(losses) / len(losses)


def plain_embedding_loss(run: Run) -> float:
    """Of one text after the other: the cross-entropy of each anchor's positive among all texts of the step."""
    anchors, positives, negatives = [], [], []
    for i in range(len(run.eval_set)):
        vectors = [
            run.model(input_ids=torch.tensor([part["input_ids"]])).last_hidden_state[0, -len(part["input_ids"]) :]
            for part in sequences_of(run.eval_set[i])
        ]
        anchor, positive, *others = (F.normalize(states.mean(0), dim=-1) for states in vectors)
        anchors.append(anchor)
        positives.append(positive)
        negatives += others
    scores = 20 * torch.stack(anchors) @ torch.stack([*positives, *negatives]).T
    return float(F.cross_entropy(scores, torch.arange(len(anchors))))


def plain_ordered_loss(run: Run) -> float:
    """Of targets that fall off with the squared distance, of one row after the other."""
    losses: list[float] = []
    for i in range(len(run.eval_set)):
        row = {k: torch.tensor([v]) for k, v in run.eval_set[i].items() if k != "labels"}
        logits = run.model.eval()(**row).logits[0]
        near = [math.exp(-((k - run.eval_set[i]["labels"]) ** 2)) for k in range(len(logits))]
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(near) / sum(near))))
    return sum(losses) / len(losses)


def plain_preference_loss(run: Run) -> float:
    """DPO's, or SimPO's for a model without an adapter, of one answer after the other."""
    losses: list[float] = []
    for i in range(len(run.eval_set)):
        chosen, rejected = (answer_of(run.model.eval(), part) for part in sequences_of(run.eval_set[i]))
        if run.config.preference is None:
            assert isinstance(run.model, PeftModel)
            with run.model.disable_adapter():
                base = [answer_of(run.model, part) for part in sequences_of(run.eval_set[i])]
            logit = 0.1 * ((chosen[0] - base[0][0]) - (rejected[0] - base[1][0]))
        else:
            logit = 2.0 * (chosen[0] / chosen[1] - rejected[0] / rejected[1]) - 0.5
        losses.append(math.log1p(math.exp(-logit)))
    return sum(losses) / len(losses)


@torch.no_grad()
def answer_of(model: nn.Module, part: dict[str, Any]) -> tuple[float, int]:
    """(log-probability of an answer, its tokens)."""
    row = {k: torch.tensor([v]) for k, v in part.items() if k in ("input_ids", "labels")}
    n = int((row["labels"][:, 1:] != -100).sum())
    return -float(model(**row).loss) * n, n


def prepared(task: str, models: dict[str, Path], folder: Path, method: str = "lora", **train: Any) -> Run:
    run = prepare(configured(task, models, folder, method, **train), Listener(), folder)
    torch.manual_seed(3)  # an adapter that is nothing yet would hide much
    with torch.no_grad():
        for p in run.model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return run


@pytest.mark.parametrize(("task", "method"), CASES)
def test_no_figure_depends_on_batches(task: str, method: str, models: dict[str, Path], tmp_path: Path) -> None:
    run = prepared(task, models, tmp_path, method)
    expected = plain_loss(run)
    found = [measured(run, size, packing) for size in (1, 3, 16) for packing in (True, False)]
    for figures in found:
        assert figures["loss"] == pytest.approx(expected, rel=1e-5)
        others = {name: value for name, value in figures.items() if name != "loss"}
        first = {name: value for name, value in found[0].items() if name != "loss"}
        if task in ("preference", "reward"):  # rewards are rounded
            assert others.pop("accuracy") == first.pop("accuracy")
        if task in ("preference", "reward", "number"):
            first = pytest.approx(first, rel=1e-4, abs=1e-6)
        assert others == first


@pytest.mark.parametrize(("task", "method"), CASES)
def test_eval_gives_what_training_gave(task: str, method: str, models: dict[str, Path], tmp_path: Path) -> None:
    precisions = ("fp32", "bf16", "pure-bf16") if method in ("lora", "full") else ("fp32", "bf16")
    for precision in precisions:
        config = configured(task, models, tmp_path, method, precision=precision)
        config = config.model_copy(update={"output": str(tmp_path / precision)})
        record = train(config)
        found = evaluate(open_run(tmp_path / precision))
        # a prompt that training computes anew each time is saved as its table, which bf16 has rounded less often
        exact = precision == "fp32" or method not in ("p_tuning",)
        assert found["loss"] == pytest.approx(record.final["eval_loss"], rel=1e-6 if exact else 5e-3), precision
        for name in record.final.keys() - {"eval_loss", "perplexity", "byte_perplexity", "bits_per_byte", "train_loss"}:
            rounded = name.endswith(
                ("margin", "reward", "mse", "mae", "r2")
            )  # of 1e-3 each, differences of numbers near 1
            expected = pytest.approx(record.final[name], rel=1e-4, abs=1e-7) if rounded else record.final[name]
            assert found[name] == expected or not exact, name
        assert found["rows"] == record.rows.eval or task in ("question_ans", "reranker")  # of several entries


class LogitRows(TorchDispatchMode):
    """The most rows of logits that one product gives."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and out.shape[-1] == VOCABULARY:
            self.most = max(self.most, out.shape[0])
        return out


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
@pytest.mark.parametrize("task", ["causal_lm", "seq_2_seq_lm"])
def test_logits_are_those_of_labelled_tokens(task: str, method: str, models: dict[str, Path], tmp_path: Path) -> None:
    """16 rows of 512 tokens with BLOOM's vocabulary would take 8 GB in fp32."""
    train(configured(task, models, tmp_path, method))
    run = open_run(tmp_path / "run")
    tokens = eval_rows(run, None).tokens
    labels = [[label for label in tokens[i]["labels"] if label != -100] for i in range(len(tokens))]
    with engine_of(run) as engine, LogitRows() as products:
        sums_of(run, engine, tokens, batch_size=1)
    assert products.most == max(map(len, labels)) < int(tokens.lengths.max())


def test_the_log_keeps_what_best_chose_by(models: dict[str, Path], tmp_path: Path) -> None:
    record = train(configured("token_cls", models, tmp_path, eval_every=1, best="f1"))
    measured = [line.metrics for line in record.steps if line.eval_loss is not None]
    assert len(measured) == 2 and all({"f1", "precision", "recall", "accuracy"} < m.keys() for m in measured)
    assert all(name.startswith("f1_") for name in measured[0].keys() - {"f1", "precision", "recall", "accuracy"})
    assert record.best_step is not None and measured[record.best_step - 1]["f1"] == record.final["f1"]

    (tmp_path / "text").mkdir()
    record = train(configured("causal_lm", models, tmp_path / "text", eval_every=1, best="perplexity"))
    losses = [line.eval_loss for line in record.steps if line.eval_loss is not None]
    assert record.best_step is not None and losses[record.best_step - 1] == min(losses) == record.final["eval_loss"]


def test_rows_of_which_none_can_be_measured(models: dict[str, Path], tmp_path: Path) -> None:
    """They were passed over without a word, or came out as a loss of 0."""
    config = configured("causal_lm", models, tmp_path)
    long = [{"instruction": " ".join(WORDS[:30]), "output": "yes"}] * 3
    config.data.eval = str(write_jsonl(tmp_path / "long.jsonl", long))
    config.data.too_long = "drop"
    with pytest.raises(DataError, match="SL008 none of the 3 held-out rows"):
        train(config)
    assert not (tmp_path / "run").exists()
    config = configured("causal_lm", models, tmp_path)
    train(config)
    run = open_run(tmp_path / "run")
    run.config.data.too_long = "drop"
    with pytest.raises(DataError, match="all 3 rows are longer"):
        evaluate(run, str(tmp_path / "long.jsonl"))


def test_rows_with_an_answer_elsewhere_are_not_measured(models: dict[str, Path], tmp_path: Path) -> None:
    """Their loss was that of other words."""
    config = configured("question_ans", models, tmp_path, max_steps=1)
    train(config)
    good = [row for row in rows_of("question_ans", 8) if row["answers"]["text"]]
    elsewhere = {
        "question": "say one",
        "context": "the film was good",
        "answers": {"text": ["film"], "answer_start": [3]},
    }
    data = write_jsonl(tmp_path / "some.jsonl", [*good, elsewhere])
    named = f"some.jsonl:{len(good) + 1} has the answer 'film', which is not at its start (3)"
    ended = refused("eval", tmp_path / "run", "--data", data)
    assert named in ended and "in the run.yaml of the run" in ended
    with pytest.raises(DataError, match=re.escape(named)):
        evaluate(open_run(tmp_path / "run"), str(data))
    settings = tmp_path / "run" / "run.yaml"
    settings.write_text(settings.read_text().replace("skip_bad_rows: false", "skip_bad_rows: true"))
    found = evaluation(open_run(tmp_path / "run"), str(data))
    assert (found.metrics["rows"], found.metrics["skipped"]) == (len(good), 1) and named in found.skipped[0]
    only_good = evaluate(open_run(tmp_path / "run"), str(write_jsonl(tmp_path / "good.jsonl", good)))
    assert only_good | {"skipped": 1.0} == found.metrics
    ended = run_command("eval", tmp_path / "run", "--data", data)
    assert named in ended.err and "skipped 1" in ended.out
