"""Rows in a stream: every entry once a pass, blocks that can be made again, runs that resume exactly."""

import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked import changed, train_on
from safetensors.torch import load_file
from tiny import WORDS, make, word_tokenizer, write_jsonl

from siliang.check import find, gather_input
from siliang.config import DataConfig, RunConfig
from siliang.config.sources import Source
from siliang.data.example_reader import ExampleReader
from siliang.data.stream import Block, Shares, TokenStream, head
from siliang.records import Record
from siliang.run_folder import open_run
from siliang.tasks import CAUSAL_LM
from siliang.train.run import train
from siliang.types import ConfigError, DataError
from siliang.use.evaluate import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
TOKENIZER = word_tokenizer()


def texts(n: int, first: int = 0) -> list[dict[str, str]]:
    """Texts of 1 to 40 words; each begins with its own number, in words."""
    numbers = ("three", "four", "five", "six", "seven", "eight", "nine")
    return [
        {
            "text": " ".join(
                [numbers[i // 49 % 7], numbers[i // 7 % 7], numbers[i % 7], *WORDS[i % 20 : i % 20 + 5 * i % 38]]
            )
        }
        for i in range(first, first + n)
    ]


def stream_of(data: DataConfig, step: int = 4) -> TokenStream:
    shares = Shares.of(data, ExampleReader(data, CAUSAL_LM.data))
    return TokenStream(data, CAUSAL_LM.data, TOKENIZER, shares, labels=None, step=step)


def entries(block: Block) -> list[tuple[str, list[int]]]:
    rows = block.tokens.column("row").tolist()
    return [(block.places[row], block.tokens[i]["input_ids"]) for i, row in enumerate(rows)]


@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=3),
    buffer=st.integers(1, 25),
    step=st.integers(1, 6),
    temperature=st.sampled_from([None, 1.0, 3.0]),
    held_out=st.integers(0, 2),
)
@settings(max_examples=25, deadline=None)
def test_any_block_can_be_made_again(
    sizes: list[int], buffer: int, step: int, temperature: float | None, held_out: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    files = [str(write_jsonl(folder / f"{i}.jsonl", texts(n, 40 * i))) for i, n in enumerate(sizes)]
    mixing = temperature if len(files) > 1 else None
    data = DataConfig(
        train=list(files), streaming=True, shuffle_buffer=buffer, max_length=16, held_out_rows=held_out,
        mix_temperature=mixing,
    )  # fmt: skip
    try:
        stream = stream_of(data, step)
        blocks = [entries(stream.block(k)) for k in range(6)]
    except DataError as error:
        assert "has no row left" in str(error)
        return
    assert all(len(block) == stream.steps * step for block in blocks)
    for k in range(6):
        first = stream_of(data, step)
        first.block(max(k - 1, 0))
        again = stream_of(data, step)
        again.load_state_dict(json.loads(json.dumps(first.state_dict(k))))
        assert entries(again.block(k)) == blocks[k]
        if k < 5:
            assert entries(again.block(k + 1)) == blocks[k + 1]
    if len(files) == 1:  # in order, each row once a pass, all of its windows
        places = [place for block in blocks for place, _ in block]
        runs = [place for i, place in enumerate(places) if i == 0 or places[i - 1] != place]
        lines = [int(place.rpartition(":")[2]) for place in runs]
        first_line = 1 + sum(stream._shares.held_out)
        if sizes[0] + 1 - first_line > 1:
            wanted = [first_line + i % (sizes[0] + 1 - first_line) for i in range(len(lines))]
            assert lines == wanted


def test_sources_have_their_shares_in_every_stretch(tmp_path: Path) -> None:
    files = [str(write_jsonl(tmp_path / f"{i}.jsonl", texts(n))) for i, n in enumerate((300, 30, 3))]
    for temperature, wanted in ((None, (300, 30, 3)), (2.0, (300**0.5, 30**0.5, 3**0.5))):
        data = DataConfig(
            train=list(files),
            streaming=True,
            shuffle_buffer=50,
            test_size=0,
            max_length=64,
            mix_temperature=temperature,
        )
        stream = stream_of(data)
        places = [place for k in range(8) for place, _ in entries(stream.block(k))]
        for end in (100, 200, 400):
            found = Counter(place.rpartition(":")[0] for place in places[:end])
            for file, part in zip(files, wanted, strict=True):
                assert abs(found[file] - end * part / sum(wanted)) <= 2


def test_the_other_half_of_a_source_comes_in_the_next_pass(tmp_path: Path) -> None:
    whole, half = (str(write_jsonl(tmp_path / f"{name}.jsonl", texts(20))) for name in ("whole", "half"))
    sources: list[str | Source] = [whole, Source(path=half, weight=0.5)]
    data = DataConfig(train=sources, streaming=True, shuffle_buffer=30, test_size=0, max_length=64)
    stream = stream_of(data, step=1)
    passes = [{place for place, _ in entries(stream.block(k))} for k in range(2)]
    halves = [{place for place in places if place.startswith(half)} for places in passes]
    assert [len(part) for part in halves] == [10, 10] and not halves[0] & halves[1]


def model_at(folder: Path) -> Path:
    make("llama").save_pretrained(folder / "model")  # type: ignore[operator]
    TOKENIZER.save_pretrained(folder / "model")
    return folder / "model"


def streamed(folder: Path, output: str, rows: int = 40, data: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    path = folder / "rows.jsonl"
    path.exists() or write_jsonl(path, texts(rows))
    model = folder / "model"
    model.exists() or model_at(folder)
    own = {"train": str(path), "streaming": True, "shuffle_buffer": 10, "max_length": 16, "held_out_rows": 5}
    constant = {"max_steps": 30, "batch_size": 4, "schedule": "constant", "warmup_fraction": 0.0, "precision": "fp32"}
    return RunConfig.build(
        {
            "model": str(model),
            "task": "causal_lm",
            "method": {"name": "lora", "r": 4, "lora_dropout": 0.1},
            "data": own | (data or {}),
            "train": constant | {"learning_rate": 1e-2, "log_every": 1} | more,
            "accept": ["SL002", "SL042"],
            "output": str(folder / output),
        }
    )


def losses(record: Record) -> list[float]:
    return [line.loss for line in record.steps if line.loss is not None]


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_streamed_run_resumes_with_the_same_bits(tmp_path: Path) -> None:
    """Also in the middle of a block, between two blocks, and in its second pass."""
    whole = train(streamed(tmp_path, "whole"))
    assert len({line.epoch for line in whole.steps}) > 1  # it has passed over its rows more than once
    for stops in ((2,), (3, 7), (20, 26)):  # a block has 3 steps
        name = "-".join(map(str, stops))
        for i, stop in enumerate(stops):
            train(streamed(tmp_path, name, max_steps=stop, save_every=1), resume=i > 0)
        again = train(streamed(tmp_path, name, save_every=1), resume=True)
        assert losses(again) == losses(whole)
        expected, found = weights(tmp_path / "whole"), weights(tmp_path / name)
        assert all(bool((expected[key] == found[key]).all()) for key in expected)
        assert again.tokens_trained == whole.tokens_trained
    assert evaluate(open_run(tmp_path / "whole"))["loss"] == pytest.approx(whole.final["eval_loss"], rel=1e-6)
    assert whole.rows.eval == len(gather_input(streamed(tmp_path, "x")).eval)


def test_ranks_share_the_steps_of_a_stream(tmp_path: Path) -> None:
    config = streamed(tmp_path, "one", max_steps=5)
    config.method.model_extra["lora_dropout"] = 0.0  # type: ignore[index]
    one = train(config)
    endings = train_on(changed(config, tmp_path / "two", "ddp"), 2)
    assert [e.code for e in endings] == [0, 0], endings[0].output
    two = Record.read(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert two.final["eval_loss"] == pytest.approx(one.final["eval_loss"], rel=1e-4)
    assert two.tokens_trained == one.tokens_trained


def test_only_what_is_trained_is_read(tmp_path: Path) -> None:
    """The rest may be of any size; a bad row stops the run where it comes."""
    path = write_jsonl(tmp_path / "rows.jsonl", texts(2_200))
    with path.open("a") as file:
        file.write("no json\n")
    config = streamed(tmp_path, "run", max_steps=3)
    said: list[str] = []
    subject = gather_input(config)
    assert len(subject.examples.train) == 2_000 and not [f for f in find(subject) if f.severity == "error"]
    assert "the first 2,000 rows" in " ".join(subject.examples.notes)
    assert train(config).status == "completed" and not said
    whole = streamed(tmp_path, "all", max_steps=1_000, eval_every=None)
    with pytest.raises(DataError, match=r"rows.jsonl:2201"):
        stream = stream_of(whole.data)
        for k in range(1_000):
            stream.block(k)
    skipping = streamed(tmp_path, "all", data={"skip_bad_rows": True})
    stream = stream_of(skipping.data)
    while stream.passes < 1:
        stream.block(stream._at)
    assert len(stream.skipped) == 1 and "rows.jsonl:2201" in next(iter(stream.skipped))


@pytest.mark.parametrize(
    ("task", "data", "train_settings", "said"),
    [
        ("causal_lm", {}, {"max_steps": None}, r"data.streaming = true needs train.max_steps"),
        ("preference", {}, {}, r"data.streaming = true: the loss of preference is one of a whole step"),
        ("reward", {}, {}, r"data.streaming = true: the loss of reward"),
        ("embedding", {}, {}, r"data.streaming = true: the loss of embedding is one of a whole step"),
        ("question_ans", {}, {}, r"data.streaming = true: question_ans must know beforehand"),
        ("seq_cls", {}, {}, r"data.streaming = true: seq_cls must know all classes or tags beforehand: .*data.labels"),
        ("causal_lm", {"validation_size": 0.1}, {}, r"data.validation_size needs all rows"),
    ],
)
def test_what_a_stream_cannot_give(task: str, data: dict[str, Any], train_settings: dict[str, Any], said: str) -> None:
    values = {
        "model": "m",
        "task": task,
        "data": {"train": "x.jsonl", "streaming": True} | data,
        "train": {"max_steps": 3} | train_settings,
        "output": "o",
    }
    with pytest.raises(ConfigError, match=said) as refused:
        gather_input(RunConfig.build(values))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "txt", "glob", "folder"])
def test_every_kind_of_file_streams(kind: str, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = texts(30)
    table = Dataset.from_list(rows)
    source = tmp_path / f"rows.{kind}"
    match kind:
        case "csv":
            table.to_csv(source)
        case "parquet":
            table.to_parquet(source)
        case "arrow":
            table.save_to_disk(tmp_path / "saved")
            source = tmp_path / "saved"
        case "txt":
            source.write_text("\n".join(row["text"] for row in rows))
        case "glob":
            for i in range(3):
                write_jsonl(tmp_path / f"part-{i}.jsonl", rows[10 * i : 10 * i + 10])
            source = tmp_path / "part-*.jsonl"
        case _:
            (tmp_path / "all").mkdir()
            write_jsonl(tmp_path / "all" / "train.jsonl", rows)
            source = tmp_path / "all"
    data = DataConfig(train=str(source), streaming=True, shuffle_buffer=60, test_size=0, max_length=64)
    found = [ids for _, ids in entries(stream_of(data).block(0))]
    wanted = [[*TOKENIZER(row["text"], add_special_tokens=False)["input_ids"], 2] for row in rows]
    assert found == [*wanted, *wanted]


RUN = """
import resource, sys
from siliang.config import RunConfig
from siliang.train.run import train
import yaml
train(RunConfig.build(yaml.safe_load(open(sys.argv[1]))))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    """300 MB of texts, streamed to their end, in the memory of a run on 1 MB."""
    line = json.dumps({"text": " ".join(WORDS * 40)}) + "\n"
    peaks = []
    for name, nbytes in (("small", 1e6), ("large", 300e6)):
        folder = tmp_path / name
        folder.mkdir()
        with (folder / "rows.jsonl").open("w") as file:
            for _ in range(int(nbytes / len(line))):
                file.write(line)
        config = streamed(folder, "run", data={"shuffle_buffer": 500, "max_length": 64}, max_steps=2, batch_size=8)
        (folder / "run.json").write_text(json.dumps(config.model_dump(mode="json")))
        done = subprocess.run([sys.executable, "-c", RUN, folder / "run.json"], stdout=-1, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 100_000  # KB
    stream = stream_of(config.data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while stream.passes < 1:
        stream.block(stream._at)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000


def test_a_file_that_is_held_out_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": f"good film {i}"}) + "\n" for i in range(5)))
    data = DataConfig.model_validate({"train": str(path), "streaming": True, "held_out_rows": 5})
    reader = ExampleReader(data, CAUSAL_LM.data)
    with pytest.raises(DataError, match=r"has 5 rows, and data.held_out_rows = 5 holds out all of them"):
        head(data, reader, Shares.of(data, reader))
