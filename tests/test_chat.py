"""Asking base models and runs: whatever the base's generation_config wishes, and whatever the runs stand on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused, run

from siliang.data.messages import Message
from siliang.run_folder import open_run
from siliang.use.generate import generate

QUICK = ("--set", "train.max_steps=2", "--set", "data.max_length=32")


@pytest.fixture(scope="module")
def folders(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run on a llama of its own, whose generation_config the tests change, and one on a BLOOM."""
    place = tmp_path_factory.mktemp("chat")
    shutil.copytree(model_folders["llama"], place / "own-llama")
    found = {"base": place / "own-llama"}
    for name, model in (("llama", place / "own-llama"), ("bloom", model_folders["bloom"])):
        found[name] = place / name
        flags = ("--model", model, "--data", instruction_file, "--task", "causal_lm", "--output", found[name])
        assert run("train", *flags, *QUICK).code == 0
    return found


WISHES: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"num_return_sequences": 3, "do_sample": True},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True, "output_hidden_states": True},
    {"dola_layers": "high"},
    {"prompt_lookup_num_tokens": 3},
    {"force_words_ids": [[5]], "num_beams": 2},
    {"temperature": 0.5, "top_p": 0.5, "do_sample": True},
    {"max_length": 4},
    {"use_cache": False},
]


@pytest.mark.parametrize("wishes", WISHES, ids=lambda wishes: "-".join(wishes))
def test_whatever_the_base_wishes(folders: dict[str, Path], wishes: dict[str, Any]) -> None:
    (folders["base"] / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | wishes))
    written = run("generate", folders["llama"], "say one", "--max-new-tokens", 4)
    asked = run("chat", folders["llama"], "--max-new-tokens", 4, stdin=b"say one\n")
    assert written.code == 0 and asked.code == 0, (written, asked)
    assert "Traceback" not in asked.err + written.err
    base, own = asked.out.splitlines()[1:3]
    assert base.startswith("base: ") and own.removeprefix(f"{folders['llama']}: ").strip() == written.out.strip()


def test_runs_of_different_bases(folders: dict[str, Path]) -> None:
    (folders["base"] / "generation_config.json").unlink(missing_ok=True)
    ended = run("chat", folders["llama"], folders["bloom"], "--max-new-tokens", 3, stdin=b"say one\n")
    names = [line.partition(": ")[0] for line in ended.out.splitlines()[1:] if line]
    assert names == ["base own-llama", "base bloom", str(folders["llama"]), str(folders["bloom"])], ended
    # each answers as when it is alone
    alone = [run("generate", folders[n], "say one", "--max-new-tokens", 3).out.strip() for n in ("llama", "bloom")]
    assert [line.partition(": ")[2].strip() for line in ended.out.splitlines()[3:5]] == alone


def test_runs_that_do_different_things(
    folders: dict[str, Path], model_folders: dict[str, Path], review_file: Path, tmp_path: Path
) -> None:
    flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls", "--output", tmp_path / "c")
    assert run("train", *flags, *QUICK).code == 0
    assert "one after the other" in refused("chat", folders["llama"], tmp_path / "c")
    ended = run("chat", tmp_path / "c", stdin=f"the film\n/save {tmp_path}/said.jsonl\n".encode())
    assert "keep no conversation" in ended.err and not (tmp_path / "said.jsonl").exists(), ended


def test_wishes_that_cannot_be_followed(folders: dict[str, Path]) -> None:
    (folders["base"] / "generation_config.json").write_text(json.dumps({"stop_strings": ["film"]}))  # of words: no
    for words in (("generate", folders["llama"], "say one"), ("generate", folders["llama"], "say", "--base")):
        assert "generation_config.json" in refused(*words)


def test_a_chat_keeps_its_turns(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each answer is that of the whole conversation; /reset begins anew, /save writes what was said."""
    (folders["base"] / "generation_config.json").unlink(missing_ok=True)
    saved = tmp_path / "said.jsonl"
    lines = f"say one\nsay two\n/save {saved}\n/save {saved}\n/reset\nsay two\n/save\n/rest\n/system is\nsay two\n"
    ended = run("chat", folders["llama"], "--max-new-tokens", 4, stdin=lines.encode())
    assert ended.code == 0 and "exists already" in ended.err, ended
    assert "/save lacks the name of a file" in ended.err and "/rest is not a command" in ended.err
    name = str(folders["llama"])
    answers = [line.removeprefix(f"{name}:").strip() for line in ended.out.splitlines() if line.startswith(name)]
    rows = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert [row["model"] for row in rows] == ["base", name]
    assert [m["role"] for m in rows[1]["messages"]] == ["user", "assistant"] * 2
    opened = open_run(folders["llama"], dtype=torch.float32)  # as the chat computes
    turns = [Message(m["role"], m["content"]) for m in rows[1]["messages"]]
    first = generate(opened, "say one", max_new_tokens=4)
    second = generate(opened, "say two", history=turns[:2], max_new_tokens=4)
    third = generate(opened, "say two", max_new_tokens=4)
    fourth = generate(opened, "say two", system="is", max_new_tokens=4)
    assert answers == [text.strip() for text in (first, second, third, fourth)]


def test_what_is_a_command(folders: dict[str, Path], tmp_path: Path) -> None:
    """A slash and letters, in any case: what is none, or has words too many, is refused and asked of no model."""
    (folders["base"] / "generation_config.json").unlink(missing_ok=True)
    refusals = {
        "/foo bar": "/foo is not a command. There are /system TEXT, /reset, /save FILE.jsonl, /help, /exit and /quit",
        "/sys hi": "/sys is not a command",
        "/systemX hi": "/systemX is not a command",
        "/帮助": "/帮助 is not a command",
        "/reset now": "/reset takes no words behind it",
        "/EXIT now": "/EXIT takes no words behind it",
        f"/save {tmp_path}/early.jsonl": "there is no conversation to save yet",
    }
    asked = ["/usr/bin/x", "/ 3", "//", " /foo bar"]
    saved = tmp_path / "said.jsonl"
    ends = {
        f"/save {tmp_path}/said.json": "choose a name that ends with .jsonl",
        f"/save {tmp_path}/none/said.jsonl": "There is no folder",
        f"/SAVE\t{saved}": "",
        f"/save {saved}": "exists already",
    }
    lines = [*refusals, "/HELP", "/System is", "/Reset", *asked, *ends, "/Quit", "never asked"]
    ended = run("chat", folders["llama"], "--max-new-tokens", 1, stdin="\n".join(lines).encode())
    said = ended.err.strip().splitlines()
    wanted = [words for words in (*refusals.values(), *ends.values()) if words]
    assert ended.code == 0 and len(said) == len(wanted), ended
    assert all(words in line for words, line in zip(wanted, said, strict=True)), said
    assert "a blank in front sends the line to the models" in said[0] and "/exit, /quit " in ended.out
    assert "never asked" not in ended.out
    rows = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    turns = [[m["content"] for m in row["messages"] if m["role"] != "assistant"] for row in rows]
    assert turns == [["is", *(text.strip() for text in asked)]] * 2
    read = run("check", "--model", folders["base"], "--data", saved, "--task", "causal_lm", "--strict", "--json")
    assert read.code < 2, read  # what is saved is data
