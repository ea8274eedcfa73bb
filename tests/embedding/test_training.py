"""Trainings beside sentence-transformers' on the same weights and rows, and runs by the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_task import make_models
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, MSELoss
from sentence_transformers.sentence_transformer import losses as peers
from texts import rows
from tiny import write_jsonl

from siliang.config import RunConfig
from siliang.data.examples import Labelled, Related, Scored
from siliang.plan.rows import order
from siliang.tasks import settled
from siliang.tasks.prepare import prepare_data
from siliang.train.run import train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*SWIG.*:DeprecationWarning"),
]
STEPS, RATE = 20, 5e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def begun(task: str, kind: str, model: Path, folder: Path, **more: Any) -> RunConfig:
    """A run of full tuning at a constant rate, each step made of batches of 4 rows."""
    data = {"train": str(write_jsonl(folder / f"{kind}.jsonl", rows(kind))), "test_size": 0.25, "max_length": 24}
    steps = {"max_steps": STEPS, "batch_size": 4, "gradient_accumulation": 2, "log_every": 1, "precision": "fp32"}
    constant = {"warmup_fraction": 0.0, "schedule": "constant", "learning_rate": RATE, "group_by_length": False}
    values = {"model": str(model), "task": task, "method": "full", "data": data, "train": steps | constant}
    return settled(RunConfig.build(values | {"output": str(folder / "run"), "accept": ["SL042"]} | more))[0]


def examples_of_steps(config: RunConfig) -> list[list[Any]]:
    data = prepare_data(config)
    numbers = data.train.column("row").tolist()
    steps = order(config, data.train)
    return [[data.examples.train[numbers[entry]] for entry in step] for step in steps]


def assert_same_training(config: RunConfig, peer: Any, loss_of: Any) -> None:
    """The losses of our run, at each step, are those of the peer's loss on the peer's model."""
    ours = [line.loss for line in train(config).steps if line.loss is not None]
    t = config.train
    peer.train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=RATE, weight_decay=t.weight_decay)
    theirs: list[float] = []
    for examples in examples_of_steps(config):
        loss = loss_of(examples)
        loss.backward()
        if t.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(peer.parameters(), t.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert len(ours) == STEPS and ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert theirs[-1] < theirs[0]


CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "multiple_negatives": ("pairs", "seq_cls", "MultipleNegativesRankingLoss", {}),
    "decoder": ("triplets", "causal_lm", "MultipleNegativesRankingLoss", {}),
    "cosent": ("scored", "seq_cls", "CoSENTLoss", {}),
    "batch_semi_hard_triplet": ("classes", "seq_cls", "BatchSemiHardTripletLoss", {"margin": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_vectors(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    kind, model, loss, more = CASES[case]
    config = begun("embedding", kind, models[model], tmp_path, embedding=more)
    # of a decoder, with the tokenizer that ends each text
    train(config.model_copy(update={"output": str(tmp_path / "first"), "train": begun_once(config)}))
    peer: Any = SentenceTransformer(str(tmp_path / "first" / "model"), device="cpu")
    peer[0].model.load_state_dict(untrained(models[model], peer))
    theirs: Any = getattr(peers, loss)(peer, **more)

    def loss_of(examples: list[Any]) -> torch.Tensor:
        first = examples[0]
        if isinstance(first, Related):
            columns = [[e.texts[i] for e in examples] for i in range(len(first.texts))]
            labels = torch.zeros(len(examples))
        elif isinstance(first, Scored):
            columns = [[e.text for e in examples], [e.pair for e in examples]]
            labels = torch.tensor([e.score for e in examples])
        else:
            assert isinstance(first, Labelled)
            columns = [[e.text for e in examples]]
            labels = torch.tensor([int(e.label.split()[1]) for e in examples])
        return theirs([peer.preprocess(texts) for texts in columns], labels)

    assert_same_training(config, peer, loss_of)


def begun_once(config: RunConfig) -> Any:
    return config.train.model_copy(update={"max_steps": 1})


def untrained(model: Path, peer: Any) -> Any:
    """The weights of the base model, for the peer's transformer."""
    from transformers import AutoModel

    found = AutoModel.from_pretrained(model).state_dict()
    return {name: found[name] for name in peer[0].model.state_dict()}


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse"])
def test_a_reranker(loss: str, models: dict[str, Path], tmp_path: Path) -> None:
    config = begun("reranker", "scored", models["seq_cls"], tmp_path, reranker={"loss": loss})
    from siliang.train.prepare import prepare
    from siliang.train.types import Listener

    (tmp_path / "first").mkdir()
    start = prepare(config.model_copy(update={"output": str(tmp_path / "first")}), Listener(), tmp_path / "first")
    start.model.save_pretrained(tmp_path / "start")
    start.tokenizer.save_pretrained(tmp_path / "start")
    peer: Any = CrossEncoder(str(tmp_path / "start"), device="cpu", max_length=24)
    theirs: Any = BinaryCrossEntropyLoss(peer) if loss != "mse" else MSELoss(peer)

    def loss_of(examples: list[Any]) -> torch.Tensor:
        labels = torch.tensor([e.score for e in examples])
        return theirs([[e.text for e in examples], [e.pair for e in examples]], labels)

    assert_same_training(config, peer, loss_of)
