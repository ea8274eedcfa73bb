"""Tokenizers that strangers have written: what their rules make of a text is counted and tried before they are read."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tiny import make, word_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers

from siliang import PromptTuningConfig, get_peft_model
from siliang.config import DataConfig
from siliang.data import tokens
from siliang.data.examples import Text
from siliang.data.tokens import tokenize
from siliang.models.tokenizer_file import check_tokenizer
from siliang.models.tokenizers import load_tokenizer, load_tokenizer_alone
from siliang.safety.limits import RefusedError, check_tokenizer_rules, run_in_time
from siliang.tasks import CAUSAL_LM
from siliang.types import ModelError, TaskType

WORDS = json.loads(word_tokenizer().backend_tokenizer.to_str())
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
CHARSMAP = base64.b64encode((4).to_bytes(4, "little") + b"\0\0\0\0" + b"x" * 1000 + b"\0").decode()


def sequence(*rules: Any, of: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", of: list(rules)}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"normalizer": sequence(*[REPLACE] * 26)}, "67,108,864 characters of one"),
        ({"normalizer": sequence(*[sequence(*[REPLACE] * 3)] * 3)}, "512 characters of one"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y" * 100}},
            "101 characters of one",
        ),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "y" * 100}}, "101 characters of one"),
        ({"decoder": sequence(*[REPLACE] * 26, of="decoders")}, "67,108,864 characters of one"),
        ({"normalizer": sequence(*[{"type": "NFD"}] * 2000)}, "more than 100 rules"),
        ({"normalizer": sequence({"type": "Prepend", "prepend": "y" * 10**5})}, "more than 20,000 characters"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "an entry of more than 100 bytes"),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(a+)+b"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            "retry",
        ),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}}, ""),
        ({"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0}}, "pads texts to more than"),
        ({"added_tokens": [{"id": i} for i in range(100_001)]}, "adds more than 100,000 tokens"),
        (
            {"post_processor": {"type": "TemplateProcessing", "special_tokens": {"a": {"ids": [0] * 10**6}}}},
            "more than 100",
        ),
        ({"model": {**WORDS["model"], "vocab": {"[UNK]": 0, "a": 2**24 + 1}}}, "the id 16,777,217"),
        ({"added_tokens": [{"id": 4 * 10**9, "content": "a"}]}, "the id 4,000,000,000"),
        (
            {
                "post_processor": {
                    "type": "Sequence",
                    "processors": [
                        {
                            "type": "TemplateProcessing",
                            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
                            "pair": [],
                            "special_tokens": {},
                        }
                    ]
                    * 10,
                }
            },
            "1,024 characters of one",
        ),
        ({"normalizer": 5}, ""),
    ],
)
def test_rules_that_make_much_of_little(
    changed: dict[str, Any], why: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders["llama"], folder)
    (folder / "tokenizer.json").write_text(json.dumps(WORDS | changed))
    with pytest.raises(ModelError, match=rf"tokenizer.json cannot be used: .*{why}"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("with_model", [True, False])
def test_the_tokenizer_that_an_adapters_prompt_names(
    with_model: bool, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders["llama"], folder)
    (folder / "tokenizer.json").write_text(json.dumps(WORDS | {"normalizer": sequence(*[REPLACE] * 26)}))
    if not with_model:
        (folder / "config.json").unlink()
    text: dict[str, Any] = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "aaa", "num_virtual_tokens": 2}
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, tokenizer_name_or_path=str(folder), **text)
    with pytest.raises(ModelError, match=r"tokenizer.json cannot be used: .*67,108,864 characters of one"):
        get_peft_model(make("llama"), config)


@pytest.mark.parametrize("unknown", ["x", None])
def test_a_tokenizer_that_has_no_word_for_others(
    unknown: str | None, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders["llama"], folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"] |= {"unk_token": "nowhere", "vocab": {"w": 0, "v": 1}}
    values["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(values))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"unk_token": unknown}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="its tokenizer makes no tokens of a text"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("file", ["vocab.json", "added_tokens.json"])
def test_numbers_of_tokens_have_a_limit(file: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders["llama"], folder)
    (folder / file).write_text('{"a": 4000000000}')
    with pytest.raises(ModelError, match=rf"{file} gives a token the id 4,000,000,000: at most 16,777,216"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"model_max_length": "long"}, "model_max_length = 'long' in its tokenizer_config.json is not a number"),
        ({"extra_special_tokens": [f"t{i}" for i in range(10_001)]}, "10,001 extra_special_tokens: at most 10,000"),
        ({"additional_special_tokens": ["t"] * 10_001}, "10,001 additional_special_tokens: at most 10,000"),
    ],
)
def test_settings_of_a_tokenizer(
    changed: dict[str, Any], why: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders["llama"], folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ModelError, match=why):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "1" * 100_000])
def test_what_is_no_tokenizer(text: str) -> None:
    with pytest.raises(RefusedError):
        check_tokenizer_rules(text)


@pytest.mark.shared
@pytest.mark.parametrize("normalizer", ["NFKC", "NFKD", "BertNormalizer"])
def test_usual_tokenizers_pass(normalizer: str, shared: Path) -> None:
    text = (shared / "tokenizers" / "minimind" / "tokenizer.json").read_text()
    check_tokenizer_rules(text)
    check_tokenizer_rules(
        json.dumps(json.loads(text) | {"normalizer": json.loads(getattr(normalizers, normalizer)().__getstate__())})
    )


def test_a_pattern_that_gives_up_on_some_text() -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(q+)+z"), "isolated")
    data = DataConfig(train="x", template="plain")
    with pytest.raises(ModelError, match=r"tokenizer cannot read .*retry-limit"):
        tokenize([Text("q" * 1000)], tokenizer, data, CAUSAL_LM.data)


def test_a_pattern_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SECONDS", 0.3)
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("q*q*(?!.)"), "isolated")
    data = DataConfig(train="x", template="plain")
    with pytest.raises(ModelError, match="tokenizer cannot read 1,501 characters: it takes too long"):
        tokenize([Text("q" * 1500 + "y")], tokenizer, data, CAUSAL_LM.data)


def test_in_time() -> None:
    assert run_in_time(lambda: 5, 60) == 5
    with pytest.raises(ZeroDivisionError):
        run_in_time(lambda: 1 // 0, 60)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("time.sleep(600)", "it takes too long\n"),
        ("[0 for _ in iter(int, 1)]", "it takes too long\n"),
        ("time.sleep(0.5)", ""),  # on a busy machine: it has computed nothing
    ],
)
def test_what_takes_too_long(work: str, said: str) -> None:
    code = "import time\nfrom siliang.safety.limits import LimitError, run_in_time\n"
    code += f"try:\n    run_in_time(lambda: {work}, 0.1)\nexcept LimitError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"])
def test_a_file_of_words_that_is_too_large(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**36)  # of which nothing is on the disk
    with pytest.raises(ModelError, match=rf"{name} has 68,719,476,736 bytes"):
        check_tokenizer(str(tmp_path))


def test_a_sentencepiece_model_that_makes_many_characters_of_one(tmp_path: Path) -> None:
    make("t5").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    (tmp_path / "lines").write_text("\n".join(f"the film was good and bad, dull and bright {i}" for i in range(300)))
    for becomes in (["62"], ["62"] * 2000):  # of each a
        (tmp_path / "rules").write_text("61\t" + " ".join(becomes) + "\n")
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "lines"),
            model_prefix=str(tmp_path / "spiece"),
            normalization_rule_tsv=str(tmp_path / "rules"),
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        if len(becomes) == 1:
            assert load_tokenizer(str(tmp_path))("a film")["input_ids"]
    for load in (load_tokenizer, lambda name: load_tokenizer_alone(name, {})):
        with pytest.raises(ModelError, match=r"its table of characters has an entry of more than 100 bytes"):
            load(str(tmp_path))
