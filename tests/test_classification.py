"""Classification: what labels are taken for, its losses, metrics and calibration beside torch's, scikit-learn's and
scipy's, and runs through the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from commands import refused, run
from every_task import make_models
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, precision_recall_fscore_support
from tiny import WORDS, write_jsonl
from transformers import AutoModelForSequenceClassification

from siliang.config import ClassificationConfig, RunConfig
from siliang.data.cells import BadRow
from siliang.data.infer_problem import look_at
from siliang.data.label_cells import a_number
from siliang.data.labels import alike
from siliang.data.numbers import with_point
from siliang.engine.order import Order
from siliang.records import Answers, Record
from siliang.run_folder import open_run
from siliang.safety.safe_yaml import dump_yaml
from siliang.tasks.labels import losses, metrics
from siliang.tasks.labels.calibration import at_the_end, best_threshold, ece, sigmoid, softmax, temperature_of_classes
from siliang.tasks.metrics import classification, spearman
from siliang.train.prepare import prepare
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.use.evaluate import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")

# ---- what labels are taken for ----


@pytest.mark.parametrize(
    ("cells", "problem", "separator", "why"),
    [
        (["a", "b", "a"], "one_label", None, "one of 2 labels"),
        ([["a"], [], ["a", "b"]], "several_labels", None, "are lists, such as ['a']"),
        (["['a', 'b']", "[]", '["a"]'], "several_labels", None, "are lists"),
        (["a", "b", "a;b", "b;c", "c"], "several_labels", ";", "separated by ';'"),
        (["x", "y", "x;y"], "several_labels", ";", "separated by ';'"),
        ([0.5, 2, 3.25], "number", None, "with decimals, such as 0.5"),
        (["3,5", "4", "2,75"], "number", None, "with a decimal comma, such as 2,75"),
        (["1.369,9", "4", "2,75"], "number", None, "with a separator of thousands, such as 1.369,9"),
        (["1,2", "1", "2", "3", "2,3"], "several_labels", ",", "separated by ','"),
        (["1,2", "2,3", "1,3", "3,4", "1,4", "2,4"], "several_labels", ",", "separated by ','"),
        (["1,234,567", "950", "12,345"], "number", None, "thousands, such as 1,234,567: their parts are no labels of"),
        (["1,000,000", "2,000,000", "2,500,000", "1,500,000"], "number", None, "with a separator of thousands"),
        (
            ["101,205,333", "101", "205", "333", "205"],
            "several_labels",
            ",",
            "each of their parts is a label of another",
        ),
        (
            [f"{a},{b},{c}" for a in (101, 102) for b in (205, 206) for c in (333, 334)],
            *("several_labels", ",", "their parts are in order (as a number, write 101205333)"),
        ),
        (
            [f"{a},{b},{c}" for a in (501, 102) for b in (205, 206) for c in (333, 334)],
            *("several_labels", ",", "8 of them have only 6 different parts"),
        ),
        (["1,234,567", "a"], "one_label", None, "one of 2 labels"),
        (["1", "2", "5", "2"], "one_label", None, "where their order counts: ordered"),
        ([i % 15 for i in range(25)], "number", None, "15 different numbers in 25 rows"),
        ([*range(30)], "one_label", None, "whole numbers"),  # a number for each row; reading refuses it
        ([True, False], "one_label", None, "one of 2 labels"),
        ([None, ""], "one_label", None, "one of 0 labels"),
    ],
)
def test_what_labels_are_taken_for(cells: list[object], problem: str, separator: str | None, why: str) -> None:
    found = look_at(cells)
    assert (found.problem, found.separator) == (problem, separator) and why in found.why, found


def test_named_labels_are_no_numbers() -> None:
    assert look_at([0.5, 1.5], ["0.5", "1.5"]).problem == "one_label"
    assert look_at(["a,b", "a"], ["a,b", "a"]).problem == "one_label"
    assert look_at(["a,b", "a"], ["a", "b"]).separator == ","


BLANKS = st.sampled_from(["", " ", "\u3000", "\t"])


@settings(max_examples=60, deadline=None)
@given(st.from_regex(r"[A-Za-z]{1,6}", fullmatch=True), BLANKS, BLANKS, st.booleans(), st.booleans())
def test_labels_that_read_as_one(name: str, before: str, after: str, wide: bool, upper: bool) -> None:
    other = name.upper() if upper else name
    if wide:
        other = "".join(chr(ord(c) + 0xFEE0) for c in other)
    other = f"{before}{other}{after}"
    assert alike([name, other]) == ([] if other == name else [sorted([name, other])])


@settings(max_examples=60, deadline=None)
@given(st.integers(-999, 999), st.integers(1, 3))
def test_numbers_that_read_as_one(number: int, zeros: int) -> None:
    names = [str(number), f"{number}.{'0' * zeros}"]
    assert alike(names) == [sorted(names)]
    assert alike([str(number), str(number + 1)]) == []


def test_decimal_commas_are_learned_as_numbers(tmp_path: Path) -> None:
    for written, number in (("3,5", 3.5), ("-0,125", -0.125), ("4", 4.0), ("1,5000", 1.5)):
        assert a_number({"label": written}, "label") == written and float(with_point(written)) == number
    with pytest.raises(BadRow, match=r"may be 1\.234 or 1234"):
        a_number({"label": "1,234"}, "label")
    with pytest.raises(
        BadRow, match=r"write it as 1234567; where it is several labels, set classification.label_separator=','"
    ):
        a_number({"label": "1,234,567"}, "label")
    for text, plain in (("1.369,9", "1369.9"), ("1,369.9", "1369.9"), ("-1.369.000", "-1369000")):
        with pytest.raises(BadRow, match=rf"a number with a separator of thousands: write it as {plain}$"):
            a_number({"label": text}, "label")


def test_labels_that_may_be_one_number_or_three(tmp_path: Path) -> None:
    """What was taken is said by check; a number is refused with both ways out, and the setting reads labels."""
    models = make_models(tmp_path)

    def looked_at(labels: list[str], *more: str) -> Any:
        rows = [{"text": f"{a} good", "label": label} for a, label in zip(WORDS, labels * 9, strict=False)]
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        return run("check", "--model", models["seq_cls"], "--data", data, "--task", "seq_cls", *more)

    parts = looked_at(["101,205,333", "101", "205", "333"])
    assert parts.code in (0, None) and "each of their parts is a label of another row" in " ".join(
        f"{parts.out} {parts.err}".split()
    )
    number = looked_at(["1,234,567", "950", "12,345,678"])
    assert number.code and "write it as 1234567; where it is several labels" in " ".join(
        f"{number.out} {number.err}".split()
    )
    named = looked_at(["1,234,567", "950", "12,345,678"], "--set", "classification.label_separator=,")
    assert named.code in (0, None) and "label_separator is set" in " ".join(f"{named.out} {named.err}".split())


def test_labels_that_depend_on_the_length_are_trained_in_random_order(tmp_path: Path) -> None:
    """The run says why; with the setting, and with other labels, it has nothing to say."""
    models = make_models(tmp_path)
    texts = [" ".join([WORDS[i % 20]] * (2 + (5 * i) % 17)) for i in range(160)]

    def said(name: str, labels: list[str], *more: str) -> str:
        rows = [
            {"text": f"{text} {i}", "label": label} for i, (text, label) in enumerate(zip(texts, labels, strict=True))
        ]
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        words = ("--model", models["seq_cls"], "--data", data, "--task", "seq_cls", "--output", tmp_path / name)
        ended = run("train", *words, "--set", "train.max_steps=1", "--set", "train.batch_size=4", *more)
        assert ended.code in (0, None), ended
        return " ".join(ended.out.split())

    by_length = ["long" if len(text.split()) > 9 else "short" for text in texts]
    assert re.search(
        r"order random: with rows of similar length .* labels would vary [34]\.\d times", said("a", by_length)
    )
    assert "order random" not in said("b", by_length, "--set", "train.group_by_length=true")
    assert "order random" not in said("c", [f"{(i // 3) % 2}" for i in range(160)])


# ---- losses ----

torch.manual_seed(0)
LOGITS, ONE = torch.randn(7, 4), torch.tensor([0, 1, 2, 3, 1, 0, 2])
SEVERAL, WEIGHTS = (torch.rand(7, 4) > 0.5).float(), [1.0, 0.5, 2.0, 3.0]


def batch(labels: torch.Tensor) -> Any:
    return SimpleNamespace(inputs={"labels": labels})


OUTPUT: Any = SimpleNamespace(logits=LOGITS)


def test_losses_are_torchs() -> None:
    weight = torch.tensor(WEIGHTS)
    weighted = F.cross_entropy(LOGITS, ONE, weight=weight, reduction="sum", label_smoothing=0.1)
    assert torch.equal(losses.one_of(WEIGHTS, None, OUTPUT, batch(ONE), label_smoothing=0.1), weighted)
    binary = F.binary_cross_entropy_with_logits(LOGITS, SEVERAL, pos_weight=weight)
    assert torch.allclose(losses.several_of(WEIGHTS, None, OUTPUT, batch(SEVERAL)) / 7, binary)
    # as torchvision.ops.sigmoid_focal_loss has it
    p = LOGITS.sigmoid()
    p_t = p * SEVERAL + (1 - p) * (1 - SEVERAL)
    focal = F.binary_cross_entropy_with_logits(LOGITS, SEVERAL, reduction="none") * (1 - p_t) ** 2
    assert torch.allclose(losses.several_of(None, 2.0, OUTPUT, batch(SEVERAL)) / 7, focal.mean())
    p_y = LOGITS.softmax(-1).gather(1, ONE[:, None]).squeeze(1)
    assert torch.allclose(losses.one_of(None, 2.0, OUTPUT, batch(ONE)), (-((1 - p_y) ** 2) * p_y.log()).sum())
    number: Any = SimpleNamespace(logits=LOGITS[:, :1])
    squared = F.mse_loss(LOGITS[:, 0], ONE.float(), reduction="sum")
    assert torch.allclose(losses.squared_error(number, batch(ONE)), squared)
    # ordered: the nearer class costs less
    sure: Any = [SimpleNamespace(logits=5 * torch.eye(5)[[k]]) for k in (1, 4)]
    near, far = (losses.ordered(None, one, batch(torch.tensor([0]))) for one in sure)
    assert near < far


def test_losses_have_gradients_where_the_model_is_sure() -> None:
    logits = torch.tensor([[60.0, -60.0], [-60.0, 60.0]], requires_grad=True)
    output: Any = SimpleNamespace(logits=logits)
    labels = torch.tensor([0, 0])
    for loss in (
        losses.one_of(None, 0.5, output, batch(labels)),
        losses.several_of(None, 0.5, output, batch(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["several_labels", "number"])
def test_steps_are_transformers(kind: str, tmp_path: Path) -> None:
    """Three steps of full tuning beside plain torch, with transformers' own loss of this problem_type."""
    models = make_models(tmp_path)
    rows = [
        {
            "text": " ".join(WORDS[(7 * i + 3 * j) % 23] for j in range(3 + i % 5)),
            "label": [w for k, w in enumerate("xyz") if i % (k + 2) == 0] if kind == "several_labels" else i / 4,
        }
        for i in range(12)
    ]
    values = {
        "model": str(models["seq_cls"]),
        "task": "seq_cls",
        "method": "full",
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "test_size": 0.0, "max_length": 24},
        "train": {"max_steps": 3, "batch_size": 4, "precision": "fp32", "learning_rate": 1e-3, "schedule": "constant"}
        | {"warmup_fraction": 0.0, "weight_decay": 0.0, "max_grad_norm": 1e9, "log_every": 1},
        "accept": ["SL019", "SL042"],
        "output": str(tmp_path / "run"),
    }
    config = RunConfig.build(values)
    prepared = prepare(config, Listener(), tmp_path)
    model, tokens = prepared.model, prepared.train_set
    assert model.config.problem_type == {"several_labels": "multi_label_classification", "number": "regression"}[kind]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=prepared.precision.adam_eps)
    order = Order.of(prepared.config, tokens)
    order.set_epoch(0)
    chosen, logged = list(order), []
    model.train()
    for step in range(3):
        own = [tokens[i] for i in chosen[4 * step : 4 * step + 4]]
        width = max(len(row["input_ids"]) for row in own)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in own])
        mask = torch.tensor([[int(j < len(row["input_ids"])) for j in range(width)] for row in own])
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([row["labels"] for row in own])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logged.append(float(loss.detach()))
    record = train(config)
    assert [line.loss for line in record.steps if line.loss is not None] == pytest.approx(logged, rel=1e-5)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.problem_type == model.config.problem_type
    if kind == "several_labels":
        assert saved.config.id2label == {0: "x", 1: "y", 2: "z"}
    for name, weight in saved.state_dict().items():
        # a bias of keys has no gradient but rounding, which AdamW makes as large as any
        assert "key.bias" in name or torch.allclose(weight, model.state_dict()[name], atol=1e-5), name


# ---- metrics and calibration ----


def test_metrics_are_scikit_learns_and_scipys() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 5, 60), random.integers(0, 5, 60)
    kappa = cohen_kappa_score(b, a, weights="quadratic", labels=range(5))
    assert metrics.quadratic_kappa(a, b, 5) == pytest.approx(kappa)
    assert spearman(a.tolist(), b.tolist()) == pytest.approx(spearmanr(a, b)[0])
    same = np.ones(4)
    assert metrics.of_numbers(same, same) == {"mse": 0.0, "mae": 0.0, "spearman": 0.0, "r2": 0.0}
    assert metrics.quadratic_kappa(np.zeros(3, int), np.zeros(3, int), 2) == 0.0


@pytest.mark.parametrize("classes", [1, 2, 9])
def test_accuracy_and_f1_of_classes_are_scikit_learns(classes: int) -> None:
    random = np.random.default_rng(classes)
    for rows in (1, 4, 60):  # classes that occur nowhere, or in one of both, are among them
        a, b = random.integers(0, classes, rows), random.integers(0, classes, rows)
        f1: Any = f1_score(b, a, average="macro")
        found = classification(a.tolist(), b.tolist())
        assert found == {"accuracy": accuracy_score(b, a), "f1": float(f1)}


@pytest.mark.parametrize("labels", [1, 2, 5])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_f1_of_several_labels_is_scikit_learns(labels: int) -> None:
    random = np.random.default_rng(labels)
    predicted, reference = (random.random((40, labels)) > cut for cut in (0.6, 0.4))
    predicted, reference = predicted.astype(int), reference.astype(int)
    if labels > 2:
        predicted[:, -1] = reference[:, -1] = 0  # a label that is nowhere
    found = metrics.of_several(predicted, reference)
    # of one column scikit-learn makes two classes: absent and present
    columns = [(reference[:, c], predicted[:, c]) for c in range(labels)]
    of_each = [precision_recall_fscore_support(*c, average="binary", zero_division=0.0)[:3] for c in columns]
    assert found["f1"] == pytest.approx(np.mean([f1 for _, _, f1 in of_each]))
    assert found["f1_micro"] == pytest.approx(f1_score(reference.ravel(), predicted.ravel(), zero_division=0.0))
    assert found["subset_accuracy"] == pytest.approx((predicted == reference).all(1).mean())
    table = metrics.by_class(predicted, reference, [f"l{c}" for c in range(labels)])
    assert np.allclose([(c.precision, c.recall, c.f1) for c in table], of_each)
    assert [c.rows for c in table] == reference.sum(0).tolist()
    if labels > 1:
        for average, name in (("micro", "f1_micro"), ("macro", "f1")):
            assert found[name] == pytest.approx(f1_score(reference, predicted, average=average, zero_division=0.0))


def test_by_class_of_one_class_a_row_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    predicted, reference = random.integers(0, 4, 50), random.integers(1, 5, 50)
    theirs = precision_recall_fscore_support(reference, predicted, labels=range(5), average=None, zero_division=0.0)
    table = metrics.by_class(predicted, reference, list("abcde"))
    ours = np.array([(c.precision, c.recall, c.f1, c.rows) for c in table])
    assert np.allclose(ours, np.stack(theirs, 1))


def test_the_temperature_is_the_one_with_the_smallest_loss() -> None:
    random = np.random.default_rng(1)
    logits = 4 * random.normal(size=(400, 3))
    chances = softmax(logits / 3)
    labels = np.array([random.choice(3, p=p) for p in chances])
    found = temperature_of_classes(logits, labels)

    def loss(t: float) -> float:
        return float(F.cross_entropy(torch.tensor(logits / t), torch.tensor(labels)))

    assert found == pytest.approx(3, rel=0.25)
    assert loss(found) <= min(loss(found * 0.98), loss(found * 1.02))
    before, after = (ece(p.max(1), p.argmax(1) == labels) for p in (softmax(logits), softmax(logits / found)))
    assert after < before / 2
    assert ece(np.array([0.9, 0.9]), np.array([1, 0])) == pytest.approx(0.4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.05, 0.2, 0.3, 0.5, 0.7, 0.9]), st.booleans()), min_size=1, max_size=12))
def test_no_threshold_has_a_higher_f1(rows: list[tuple[float, bool]]) -> None:
    p, y = np.array([row[0] for row in rows]), np.array([int(row[1]) for row in rows])

    def f1(threshold: float) -> float:
        given = p >= threshold
        return float(2 * (given & (y == 1)).sum() / max(given.sum() + y.sum(), 1))

    found = best_threshold(p, y)
    assert 0 < found < 1
    assert f1(found) >= max(f1(cut) for cut in (0.01, 0.1, 0.25, 0.4, 0.6, 0.8, 0.95)) - 1e-12
    assert np.allclose(sigmoid(np.array([0.0])), 0.5)


# ---- the command ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))["seq_cls"]


def rows(kind: str, n: int = 60) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for i in range(n):
        words = [WORDS[(5 * i + 3 * j) % 23] for j in range(3 + i % 6)]
        have = [w for w in ("good", "film", "story") if w in words]
        if kind == "flags":
            found.append({"text": " ".join(words), "obscene": i % 2, "toxic": int(i % 3 == 0)})
            continue
        one, mixed = (names[i % 4 == 0] for names in (("neg", "pos"), ("good", "0.5")))
        label: object = {"several": have, "one": one, "mixed": mixed}[kind]
        found.append({"text": " ".join(words), "label": label, "second": WORDS[i % 20]})
    return found


def flags(model: Path, data: Path, output: Path, *sets: str) -> list[object]:
    usual = ("data.test_size=0.4", "train.max_steps=6", "train.precision=fp32", "train.learning_rate=0.003")
    given = [word for value in (*usual, *sets) for word in ("--set", value)]
    return ["train", "--model", model, "--data", data, "--task", "seq_cls", "--output", output, *given]


def test_a_temperature_at_its_end_is_known() -> None:
    """Where all rows are right, or the logits say nothing, no temperature is the best."""
    right = np.array([[3.0, 0.0], [0.0, 2.0]])
    assert at_the_end(temperature_of_classes(right, np.array([0, 1])))
    assert at_the_end(temperature_of_classes(right, np.array([1, 0])))
    mixed = np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 0.5]])
    assert not at_the_end(temperature_of_classes(mixed, np.array([0, 1, 1])))


def test_thresholds_calibration_and_predictions(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", rows("several"))
    sets = ("classification.threshold=auto", "classification.calibrate=true", "classification.class_weights=balanced")
    ended = run(*flags(model, data, tmp_path / "run", *sets, "data.validation_size=0.5"))
    assert ended.code == 0 and "several_labels: the labels are lists" in ended.out, ended
    record = Record.read(tmp_path / "run")
    learned, report = record.classification, record.class_report
    assert learned is not None and report is not None
    assert learned.chosen_on == "validation" and learned.temperature and len(learned.thresholds or []) == 3
    assert learned.class_weights is not None and learned.ece_before is not None and learned.ece_after is not None
    assert [c.name for c in report.classes] == ["film", "good", "story"] and report.confusion is None
    shown = run("eval", tmp_path / "run")
    assert "calibrated, temperature" in shown.out and "chosen on these rows" in shown.out + shown.err
    # thresholds chosen on these rows are in eval, which says so, and in no metric of the record
    measured = json.loads(run("eval", tmp_path / "run", "--json").out)
    assert measured["f1"] > record.final["f1"] and len(measured["classes"]["classes"]) == 3
    assert record.final["f1_micro"] == [line.metrics for line in record.steps if line.metrics][-1]["f1_micro"]
    assert np.mean([c.f1 for c in report.classes]) == pytest.approx(record.final["f1"])
    output = tmp_path / "out.parquet"
    assert run("predict", tmp_path / "run", "--data", data, "--output", output, "--top", 2).code == 0
    first = pq.read_table(output).to_pylist()[0]
    assert len(first["predicted_labels"]) == len(first["predicted_probabilities"]) and len(first["predicted_top"]) == 2
    page = tmp_path / "page.html"
    assert run("report", tmp_path / "run", "--output", page).code == 0
    assert "By class" in page.read_text() and "expected calibration error" in page.read_text()


def test_abstaining_and_pairs(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", rows("one"))
    sets = ("classification.min_confidence=0.6", "classification.focal_gamma=2", "data.columns.text_pair=second")
    ended = run(*flags(model, data, tmp_path / "run", *sets, "classification.class_weights={neg: 0.5}"))
    assert ended.code == 0, ended
    record = Record.read(tmp_path / "run")
    assert record.layout == "sentence-pair" and {"coverage", "accuracy_covered"} <= record.final.keys()
    assert record.classification is not None and record.classification.class_weights == [0.5, 1.0]
    assert record.class_report is not None and np.array(record.class_report.confusion).sum() == record.rows.eval
    opened = open_run(tmp_path / "run")
    assert opened.config.classification is not None
    opened.config.classification.min_confidence = 0.999
    measured = evaluate(opened)
    assert measured["coverage"] == 0 and "accuracy_covered" not in measured  # of no row at all
    found = run("predict", tmp_path / "run", "the film\tgood", "--min-confidence", 1.0, "--json")
    assert json.loads(found.out)["label"] is None
    assert "no label" in run("predict", tmp_path / "run", "the film\tgood", "--min-confidence", 1.0, "--top", 2).out


def test_a_comparison_of_several_labels(model: Path, tmp_path: Path) -> None:
    """Its metrics and answers are those of 0.5: thresholds are chosen on the rows that the table is about."""
    values = {
        "model": str(model),
        "task": "seq_cls",
        "data": {"train": str(write_jsonl(tmp_path / "a.jsonl", rows("several"))), "test_size": 0.4},
        "train": {"max_steps": 4, "precision": "fp32", "learning_rate": 3e-3},
        "classification": {"threshold": "auto", "calibrate": True},
        "methods": ["lora", "bitfit"],
        "seeds": 1,
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "compare.yaml").write_text(dump_yaml(values))
    ended = run("compare", tmp_path / "compare.yaml")
    assert ended.code == 0 and "micro F1" in ended.out, ended
    for method in ("lora", "bitfit"):
        folder = tmp_path / "out" / "runs" / method / "seed-42"
        record, answers = Record.read(folder), Answers.open(folder / "answers.json")
        assert record.classification is not None and record.classification.thresholds
        exact = np.mean([answer.correct for answer in answers.rows])
        assert exact == pytest.approx(record.final["subset_accuracy"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "all metrics of this page are without them" in page


@pytest.mark.parametrize(
    ("kind", "sets", "message"),
    [
        ("one", ["classification.problem=number"], "has 'pos' in 'label', .* set classification.problem=one_label"),
        ("several", ["classification.problem=one_label"], "has a list in 'label'.*problem=several_labels"),
        ("one", ["classification.problem=ordered"], "names such as neg, pos, whose order is not known"),
        ("one", ["classification.class_weights={bad: 2}"], "has 'bad', which is no label; the labels are neg, pos"),
        ("several", ["classification.min_confidence=0.5"], "min_confidence = 0.5 is not for problem = several_labels"),
        ("several", ["data.stratify=true"], "data.stratify needs one class a row"),
        ("one", ["classification.calibrate=true", "data.test_size=0"], "calibrate needs held-out rows"),
        ("mixed", [], r"holds numbers such as 0\.5 beside names such as good: .* list them in data\.labels"),
        ("flags", [], r"'obscene', 'toxic' hold 0 or 1 for each label, .*problem=several_labels"),
        ("several", ["train.label_smoothing=0.1"], "label_smoothing = 0.1 cannot be used"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, sets: list[str], message: str, model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", rows(kind))
    said = refused(*flags(model, data, tmp_path / "run", *sets), code=2)
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("cells", "problem", "mark"),
    [
        (["体育、财经", "体育", "财经", "娱乐"], "several_labels", "、"),
        (["体育，财经", "体育", "财经"], "several_labels", "，"),
        (["体育；财经", "体育", "财经"], "several_labels", "；"),
        (["1.5", "2.25", "0.1", "inf"], "number", None),  # whose row is refused then
        ([1.5, 2.5, float("nan"), 0.5], "number", None),
        (["good", "bad", "nan"], "one_label", None),
    ],
)
def test_marks_between_labels_and_what_is_no_number(cells: list[object], problem: str, mark: str | None) -> None:
    look = look_at(cells)
    assert (look.problem, look.separator) == (problem, mark)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"good": -2}, "good = -2: a weight must be more than 0"), ({True: 2}, "YAML reads a label such as yes")],
)
def test_weights_that_are_none(weights: dict[object, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationConfig.model_validate({"class_weights": weights})
