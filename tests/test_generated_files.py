"""Texts that a run generates: of a file into a file, in batches, drawn with a seed, and up to a stop word."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from commands import refused, run
from every_task import configured, make_models
from tiny import write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Gemma3TextConfig, LlamaConfig

from siliang.data.messages import Conversation, Message
from siliang.engine.one_answer import without_padding
from siliang.models.positions import trained_length
from siliang.run_folder import OpenedRun, open_run
from siliang.train.run import train
from siliang.types import ConfigError, DataError, InterruptedRunError, ModelError, OutputError
from siliang.use import predict_file as module
from siliang.use.asked_rows import read_asked
from siliang.use.generate import as_asked, generate, write_texts
from siliang.use.predict_file import predict_file
from siliang.use.sampling import Sampling

TASKS = ("causal_lm", "seq_2_seq_lm")
QUESTIONS = ["one", "two three", "one two three", "no", "is it good", "one two"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    models, found = make_models(folder), dict[str, Path]()
    for task in TASKS:
        found[task] = folder / f"run-{task}"
        train(configured(task, models, folder).model_copy(update={"output": str(found[task])}))
    return found


@pytest.fixture(scope="module")
def opened(runs: dict[str, Path]) -> dict[str, OpenedRun]:
    return {task: open_run(folder) for task, folder in runs.items()}


@pytest.mark.parametrize("task", TASKS)
def test_a_merged_model_and_an_adapter_of_peft_write_as_the_run_does(
    task: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Neither has a run: both are asked in the tokenizer's own template, which merging saves."""
    run_folder, merged, of_peft = runs[task], tmp_path / "merged", tmp_path / "of-peft"
    assert run("merge", run_folder, "--output", merged).code == 0
    record = json.loads((run_folder / "run.json").read_text())
    kind = {"causal_lm": AutoModelForCausalLM, "seq_2_seq_lm": AutoModelForSeq2SeqLM}[task]
    base: Any = kind.from_pretrained(record["config"]["model"])
    peft.PeftModel.from_pretrained(base, str(run_folder / "adapter")).save_pretrained(str(of_peft))
    config = json.loads((of_peft / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = record["config"]["model"]
    (of_peft / "adapter_config.json").write_text(json.dumps(config))
    expected = run("generate", run_folder, "one two", "--max-new-tokens", 6)
    assert expected.code == 0, expected
    for folder in (merged, of_peft):
        found = run("generate", folder, "one two", "--max-new-tokens", 6)
        assert (found.code, found.out) == (0, expected.out), found
    chat = run("chat", merged, "--max-new-tokens", 6, stdin=b"one two\n")
    assert chat.code == 0 and expected.out.strip() in chat.out, chat
    del config["base_model_name_or_path"]
    (of_peft / "adapter_config.json").write_text(json.dumps(config))
    assert "give it with --base" in refused("generate", of_peft, "one")
    config["task_type"] = "SEQ_CLS"
    (of_peft / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "x"}))
    assert "its model is not one that writes" in refused("generate", of_peft, "one")


def test_a_system_message_has_no_place_before_a_plain_text(opened: dict[str, OpenedRun], tmp_path: Path) -> None:
    own = opened["causal_lm"]
    plain = replace(own, record=own.record.model_copy(update={"layout": "text", "columns": {}, "more_layouts": {}}))
    (tmp_path / "all.txt").write_text("one two\n")
    with pytest.raises(ConfigError, match=r"system = 'be brief': .*all\.txt:1 is a text that is continued"):
        list(read_asked(plain, str(tmp_path / "all.txt"), "be brief"))


def asked(*questions: str) -> list[Conversation]:
    return [Conversation((Message("user", question),)) for question in questions]


DRAWN = Sampling(8, temperature=1.0, top_p=0.9, top_k=20, repetition_penalty=1.2, seed=3)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "how", [Sampling(8), Sampling(8, repetition_penalty=1.5), DRAWN], ids=["greedy", "penalty", "drawn"]
)
def test_a_text_is_the_same_alone_and_in_any_batch(opened: dict[str, OpenedRun], task: str, how: Sampling) -> None:
    talks = asked(*QUESTIONS)
    alone = [write_texts(opened[task], [talk], how, numbers=[i])[0] for i, talk in enumerate(talks)]
    assert len(set(alone)) > 1 or task == "seq_2_seq_lm"  # whose base writes nothing but ends
    for size in (2, 6):
        assert write_texts(opened[task], talks, how, batch_size=size) == alone
    if how.temperature:
        assert write_texts(opened[task], talks, Sampling(8, temperature=1.0, seed=4)) != alone


def test_greedy_is_generates_own(opened: dict[str, OpenedRun]) -> None:
    """That of transformers, with its penalty of repetitions."""
    own = opened["causal_lm"]
    ids = torch.tensor([[5, 6, 7]])
    common: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    wanted = own.model.generate(input_ids=ids, repetition_penalty=1.4, **common)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours = without_padding(own.model, inputs, [2], decoder_only=True, penalty=1.4)
    assert own.model.generate(input_ids=ids, **ours, **common).tolist() == wanted.tolist()


@pytest.mark.parametrize(("name", "value"), [("prompt_name", "query"), ("top", 2), ("min_confidence", 0.5)])
def test_options_of_predictions_are_not_for_texts(
    opened: dict[str, OpenedRun], tmp_path: Path, name: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=name.replace("_", ".")):
        predict_file(replace(opened["causal_lm"], **{name: value}), "no.jsonl", tmp_path / "out.csv")  # type: ignore[arg-type]


def test_beyond_the_length_that_the_model_was_trained_for(opened: dict[str, OpenedRun]) -> None:
    """Rotary positions have no end. The default stays within that length, and more is a warning."""
    own = opened["causal_lm"]
    known = own.model.config.max_position_embeddings
    prompt = "one two three " * 10
    asked_for = len(own.task.prompt(own.tokenizer, own.config.data, asked(prompt)[0])[0])  # type: ignore[misc]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(own, prompt)
        generate(own, prompt, max_new_tokens=known - asked_for)
    says = f"more than the {known:,} tokens that the model was trained for: what"
    with pytest.warns(UserWarning, match=says):
        generate(own, prompt, max_new_tokens=known - asked_for + 1)


ORIGINAL = {"original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("rotations", "tokens"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, **ORIGINAL}, 64),
        ({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}, 64),
    ],
)
def test_the_trained_length_of_scaled_rotations(rotations: dict[str, Any], tokens: int) -> None:
    sizes: dict[str, Any] = {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 1e4, **rotations}}
    assert trained_length(LlamaConfig(**sizes)) == tokens


def test_the_trained_length_of_rotations_by_layer() -> None:
    """Gemma 3's factor is in the length already."""
    rotations = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3TextConfig(max_position_embeddings=64, rope_parameters=rotations)
    assert trained_length(config) == 64


def test_a_system_message_is_read_as_that_of_a_row(opened: dict[str, OpenedRun], tmp_path: Path) -> None:
    own = opened["causal_lm"]
    source = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "one", "system": " is \n"}, {"instruction": "one"}])
    own_message, given = [row.asked for row in read_asked(own, str(source), " is \n")]
    assert own_message == given == as_asked(own, "one", system=" is\t")
    assert as_asked(own, "one", system=" ") == as_asked(own, "one")
    with pytest.raises(ConfigError, match="the instruction is blank"):
        generate(own, " ")


def test_a_file_without_a_question(opened: dict[str, OpenedRun], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "words": "one"}])
    with pytest.raises(DataError, match=r"has no question, which is in a column .*; it has 'id', 'words'\. Rename"):
        list(read_asked(opened["causal_lm"], str(source)))


def test_a_partial_file_of_other_options(
    opened: dict[str, OpenedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITTEN_ROWS", 1)
    source, output = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "one"}] * 3), tmp_path / "out.jsonl"

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="Stopped after 1 rows"):
        predict_file(opened["causal_lm"], str(source), output, sampling=Sampling(3), progress=stop)
    with pytest.raises(OutputError, match="begun with max_new_tokens 3"):
        predict_file(opened["causal_lm"], str(source), output, sampling=Sampling(4))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "own", [{"repetition_penalty": 1.5}, {"encoder_repetition_penalty": 5.0}, {"use_cache": False}], ids=str
)
def test_the_models_own_settings(opened: dict[str, OpenedRun], task: str, own: dict[str, Any]) -> None:
    """Its penalty leaves the padding out, and a text is the same alone and in any batch; a cache is kept anyhow."""
    run, same_start = opened[task], asked(*(f"{'one two three ' * 8}{word}" for word in ("one", "two three", "four")))
    settings = run.model.generation_config
    before = {name: getattr(settings, name) for name in own}
    for name, value in own.items():
        setattr(settings, name, value)
    try:
        found = [write_texts(run, same_start, Sampling(8), batch_size=size) for size in (1, 2, 3)]
        assert found[0] == found[1] == found[2]
        if "repetition_penalty" in own and task == "causal_lm":
            assert found[0] == write_texts(run, same_start, Sampling(8, repetition_penalty=1.5), batch_size=3)
        if "repetition_penalty" in own:
            settings.repetition_penalty = 5.0
            off = write_texts(run, same_start, Sampling(8, repetition_penalty=1.0), batch_size=3)
            settings.repetition_penalty = None
            assert off == write_texts(run, same_start, Sampling(8), batch_size=3)
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


@pytest.mark.parametrize("name", ["repetition_penalty", "encoder_repetition_penalty"])
@pytest.mark.parametrize("value", [0, -1.0, "2"])
def test_a_penalty_that_is_none(opened: dict[str, OpenedRun], monkeypatch: Any, name: str, value: object) -> None:
    run = opened["causal_lm"]
    monkeypatch.setattr(run.model.generation_config, name, value)
    with pytest.raises(ModelError, match=f"cannot write: {name} = {value!r} must be above 0"):
        write_texts(run, asked("one"), Sampling(2))


def test_penalties_and_lengths_leave_the_padding_out(opened: dict[str, OpenedRun]) -> None:
    """Of two prompts, with three columns of padding in front of the second; 2 pads, and ends texts."""
    model: Any = opened["causal_lm"].model
    ids, mask = torch.tensor([[5, 6, 7, 8], [2, 2, 2, 9]]), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    inputs, scores = {"input_ids": ids, "attention_mask": mask}, torch.full((2, 10), 4.0)
    own = SimpleNamespace(repetition_penalty=None, encoder_repetition_penalty=2.0, min_length=5)
    settings = without_padding(SimpleNamespace(generation_config=own), inputs, [2], decoder_only=True)
    found = settings["logits_processor"](torch.cat([ids, torch.tensor([[3], [3]])], 1), scores)
    expected = torch.full((2, 10), 4.0)
    expected[0, 5:9], expected[1, 9], expected[1, 2] = 8.0, 8.0, -torch.inf  # 5 tokens and 2
    assert found.tolist() == expected.tolist()
    prompts = {"inputs": ids[:1], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    ours = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    for name, value in (("encoder_repetition_penalty", 5.0), ("min_length", 6)):
        changed = SimpleNamespace(**vars(own) | {"encoder_repetition_penalty": None, "min_length": None, name: value})
        settings = without_padding(SimpleNamespace(generation_config=changed), ours, [2], decoder_only=True)
        assert model.generate(**prompts, **settings).tolist() == model.generate(**prompts, **{name: value}).tolist()


def test_a_text_ends_exactly_in_front_of_a_stop_word(opened: dict[str, OpenedRun]) -> None:
    own = opened["causal_lm"]
    whole = generate(own, "one two", sampling=Sampling(10))
    word = whole.split()[2]
    pieces: list[str] = []
    cut = generate(own, "one two", sampling=Sampling(10, stop=("never", word)), on_text=pieces.append)
    assert cut == whole[: whole.index(word)] and "".join(pieces).strip() == cut.strip()
    assert write_texts(own, asked("one two", "no"), Sampling(10, stop=(word,)))[0] == cut


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0: must be above 0"),
        ({"top_k": 3}, "no effect at temperature 0"),
        ({"stop": ("",)}, "stop = "),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
    ],
)
def test_settings_that_mean_nothing(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Sampling(**wrong)


def rows() -> list[dict[str, Any]]:
    return [{"id": i, "instruction": text, "input": "", "output": "a secret"} for i, text in enumerate(QUESTIONS)]


def test_a_file_of_questions(runs: dict[str, Path], opened: dict[str, OpenedRun], tmp_path: Path) -> None:
    """In order, whatever the batches, without a look at the answers, and with or without their column."""
    source = write_jsonl(tmp_path / "a.jsonl", [*rows(), {"id": 9, "instruction": "", "input": "", "output": "x"}])
    output = tmp_path / "out.jsonl"
    ended = run("predict", runs["causal_lm"], "--data", source, "--output", output, "--max-new-tokens", 6)
    assert ended.code == 0, ended
    found = [json.loads(line) for line in output.read_text().splitlines()]
    alone = [generate(opened["causal_lm"], text, max_new_tokens=6) for text in QUESTIONS]
    assert [row["predicted_text"] for row in found] == [*alone, None] and [r["id"] for r in found] == [*range(6), 9]
    bare = write_jsonl(tmp_path / "b.jsonl", [{"instruction": text} for text in QUESTIONS])
    predict_file(opened["causal_lm"], str(bare), tmp_path / "bare.jsonl", sampling=Sampling(6))
    assert [json.loads(x)["predicted_text"] for x in (tmp_path / "bare.jsonl").read_text().splitlines()] == alone
    assert "does not generate text" not in ended.err


def test_a_stopped_file_resumes_with_the_same_texts(
    opened: dict[str, OpenedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITTEN_ROWS", 4)
    source, output = str(write_jsonl(tmp_path / "a.jsonl", rows())), tmp_path / "out.jsonl"
    own = opened["causal_lm"]
    predict_file(own, source, tmp_path / "whole.jsonl", sampling=DRAWN)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="Stopped after 4 rows"):
        predict_file(own, source, output, sampling=DRAWN, progress=stop)
    predict_file(own, source, output, sampling=DRAWN)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_options_of_generating(runs: dict[str, Path]) -> None:
    drawn = ("--temperature", 1.0, "--seed", 5, "--top-p", 0.9, "--max-new-tokens", 6, "--system", "is")
    first, second = (run("generate", runs["causal_lm"], "one", *drawn) for _ in range(2))
    assert first.code == 0 and first.out == second.out, first
    assert "no effect at temperature 0" in refused("generate", runs["causal_lm"], "one", "--top-k", 3)


USER, ANSWER = {"role": "user", "content": "one two"}, {"role": "assistant", "content": "no"}
ASKED_ALONE: tuple[dict[str, Any], ...] = (
    {"prompt": "one two"},
    {"question": "one two"},
    {"prompt": [USER]},
    {"instruction": "one two"},
    {"messages": [USER]},
    {"messages": [USER, ANSWER]},
    {"conversations": [{"from": "human", "value": "one two"}]},
    {"prompt": "one two", "completion": "no", "label": False},
    {"prompt": "one two", "chosen": "no", "rejected": "no"},
    {"messages": [USER, ANSWER], "rejected_response": "good"},
)
IN_PAIRS: tuple[dict[str, Any], ...] = (
    {"prompt": "one two", "chosen": "no", "rejected": "is"},
    {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "is"}]},
    {"conversations": [{"from": "human", "value": "one two"}], "chosen": "no", "rejected": "is"},
)
IN_A_LIST: tuple[dict[str, Any], ...] = ({"prompt": "one two", "responses": ["a", "b"], "scores": [1, 2]},)
RATED: tuple[dict[str, Any], ...] = ({"prompt": "one two", "completion": "no", "label": True},)


@pytest.mark.parametrize("task", ["preference", "kto"])
def test_a_file_for_a_run_of_preferences(task: str, tmp_path: Path) -> None:
    """Its rows need no answers, and the answers that they have are not what is asked."""
    config = configured(task, make_models(tmp_path), tmp_path)
    train(config)
    own = open_run(Path(config.output))
    wanted = generate(own, "one two", sampling=Sampling(6))
    with_answers = {"preference": IN_PAIRS, "kto": RATED}[task]
    for i, row in enumerate((*ASKED_ALONE, *with_answers)):
        source = write_jsonl(tmp_path / f"{i}.jsonl", [row, dict.fromkeys(row, "")])
        output = tmp_path / f"{i}-out.jsonl"
        assert predict_file(own, str(source), output, sampling=Sampling(6)) == 2, row
        found = [json.loads(line)["predicted_text"] for line in output.read_text().splitlines()]
        assert found == [wanted, None], row
    in_a_list = own.record.model_copy(update={"layout": "responses", "columns": {}})
    for row in IN_A_LIST:
        source = write_jsonl(tmp_path / "list.jsonl", [row])
        (read,) = read_asked(replace(own, record=in_a_list), str(source))
        assert read.asked == Conversation((Message("user", "one two"),)), row
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [{"chosen": "no", "rejected": "is", "id": 1}])
    with pytest.raises(DataError, match=r"has no question.*'prompt'.*it has 'chosen', 'rejected', 'id'"):
        predict_file(own, str(nothing), tmp_path / "none.jsonl")
