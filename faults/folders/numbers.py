"""Kind 8: numbers that are too long to be read, and records that are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from faults.folders.making import HELLO, REMOVED, USES, change_json, change_yaml, copy, sealed, with_base, write
from faults.folders.sandbox import Case, Expected, Site, Step

KIND = "numbers"

NUMBERS = {
    "sixty times sixty": ":".join(["1"] * 200_000),
    "sixty times sixty, with a point": ":".join(["1"] * 200_000) + ".5",
    "binary": "0b" + "1" * 900_000,
    "octal": "0" + "7" * 900_000,
    "hexadecimal": "0x" + "f" * 900_000,
    "decimal": "9" * 900_000,
    "with underscores": "1" + "_0" * 400_000,
    "an exponent": "1e" + "9" * 50_000,
    "of 400 digits": "1" + "0" * 400,
    "of 5,000 digits": "9" * 5000,
    "a date": "9999-99-99",
    "a time": "2001-12-14t21:59:43." + "9" * 100_000 + "-05:00",
    "infinity": ".inf",
    "not a number": ".nan",
    "negative": "-1",
    "a binary text": "!!binary " + "A" * 800_000,
    "a set": "!!set {a: , b: }",
    "an ordered map": "!!omap [a: 1]",
}
YAML = {
    "many keys": "\n".join(f"k{i}: 1" for i in range(60_000)),
    "many documents": "---\na: 1\n" * 50_000,
    "many anchors": "\n".join(f"k{i}: &a{i} x" for i in range(50_000)),
    "a bomb": "\n".join(["a0: &a0 x", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]),
    "a bomb of merges": "\n".join(
        ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], y{i}: 1}}" for i in range(1, 9))]
    ),
    "itself": "a: &a [*a]",
    "deep lists": "a: " + "[" * 5000,
    "deep blocks": "\n".join(" " * i + "- " for i in range(900)),
    "a long line without an end": '"' + "a" * 900_000,
    "a key that is a structure": "? [a, b]\n: x",
    "the same key twice": "model: a\nmodel: b\n",
    "percent": "%YAML 9.9\n---\na: 1",
    "tags": "%TAG ! tag:evil,2000:\n---\na: !x 1",
    "NUL": "model: \0",
    "surrogates": 'model: "\\ud800"',
    "an emoji": "model: 🦊\ntask: 🦊",
    "empty": "",
    "a list": "- a\n",
    "a number alone": "5",
    "UTF-16": "\ufeffmodel: x",
}


def _yaml(text: str) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        write(site.evil / "run.yaml", text)
        return [HELLO]

    return build


def _value(name: str, text: str) -> Callable[[Site], Sequence[Step]]:
    """run.yaml with a setting's text in place."""

    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        path = site.evil / "run.yaml"
        change_yaml(path, {name: "PLACE"})
        write(path, path.read_text().replace("PLACE", text))
        return [HELLO]

    return build


RECORD: dict[str, dict[str, Any]] = {
    "a status that is none": {"status": "evil"},
    "a config that is a list": {"config": []},
    "a config without a task": {"config": {"model": "x"}},
    "a config without data": {"config/data": REMOVED},
    "data that are a text": {"config/data": "x"},
    "a method without a name": {"config/method": {}},
    "a method that is a text": {"config/method": "lora"},
    "a task that is none": {"config/task": "evil"},
    "adjusted settings that are not there": {"adjusted": {"train.nothing.more": 1}},
    "adjusted settings of no section": {"adjusted": {"x.y": 1, "": 2}},
    "adjusted settings that are numbers": {"adjusted": {"train.batch_size": {"a": [1]}}},
    "steps that are texts": {"steps": ["x"]},
    "steps of numbers that are none": {"steps/0/loss": "NaN", "steps/0/step": 10**400},
    "a step of 10^400": {"steps/0/step": 10**400},
    "negative steps": {"steps/0/step": -5, "steps/0/epoch": -1.0},
    "figures beyond numbers": {"final": {"eval_loss": 10**400, "perplexity": "Infinity"}},
    "figures that are texts": {"final": {"eval_loss": "good"}},
    "a precision that is none": {"precision": "evil"},
    "a precision that is a number": {"precision": 5},
    "labels that are numbers": {"labels": [1, 2]},
    "labels of a text": {"labels": "good"},
    "no labels": {"labels": None},
    "columns that are a list": {"columns": ["text"]},
    "model_files that are a list": {"model_files": ["config.json"]},
    "model_files that lead out": {"model_files": {"../../../outside/x": "0" * 64}},
    "data_files without a hash": {"data_files": [{"path": "x"}]},
    "data_files that lead out": {"data_files": [{"path": "/etc/passwd", "sha256": "0" * 64}]},
    "parameters below zero": {"parameters": {"trained": -1, "total": 0}},
    "memory of 10^400": {"memory/peak_bytes": 10**400},
    "memory that is a list": {"memory": [1]},
    "a schema of the future": {"schema_version": 99},
    "a schema that is a text": {"schema_version": "1"},
    "a further field": {"evil": 1},
    "a seed of 10^400": {"seed": 10**400},
    "a started_at that is a number": {"started_at": 5},
    "a learning rate of 10^400": {"learning_rate": 10**400},
    "a device of no kind": {"device": {}},
    "rows below zero": {"rows": {"train": -1, "eval": -1}},
    "seconds that are none": {"seconds": {"train": "NaN"}},
    "versions that are numbers": {"versions": {"siliang": 5}},
    "no config": {"config": REMOVED},
    "an unknown layout": {"layout": "evil"},
    "answers that are none": {"unanswered": "x"},
    "best_step far away": {"best_step": 10**30},
}
JSON_TEXTS = {
    "a number of 5,000 digits": '{"seed": ' + "9" * 5000 + "}",
    "a number of 900,000 digits": '{"seed": ' + "9" * 900_000 + "}",
    "a float of 900,000 digits": '{"seed": 1.' + "9" * 900_000 + "}",
    "an exponent of 900,000 digits": '{"seed": 1e' + "9" * 900_000 + "}",
    "deep lists": "[" * 200_000,
    "deep mappings": '{"a":' * 100_000,
    "a number": "1",
    "a list": "[]",
    "null": "null",
    "nothing": "",
    "bytes": "\x00\x01",
    "half": '{"status": "completed"',
    "the same key many times": "{" + ",".join(['"status": "completed"'] * 100_000) + "}",
    "surrogates": '{"status": "\\ud800"}',
    "NaN": '{"status": NaN}',
}
FILES = {
    "run.json": "run.json",
    "manifest.json": "adapter/manifest.json",
    "adapter_config.json": "adapter/adapter_config.json",
    "a checkpoint's state": "checkpoints/checkpoint-2/state.json",
    "a checkpoint's manifest": "checkpoints/checkpoint-2/manifest.json",
}
BASES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)


def _record(change: dict[str, Any], *steps: str, expected: Expected = "either") -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        change_json(site.evil / "run.json", change)
        return [USES[step] for step in steps]

    return build


def _file(name: str, text: str, step: Step) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        write(site.evil / name, text)
        for folder in ("adapter", "checkpoints/checkpoint-2"):
            if not name.endswith("manifest.json"):
                sealed(site.evil / folder)
        return [step]

    return build


def _base(name: str, text: str) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        write(with_base(site) / name, text)
        return [HELLO]

    return build


# in the order of the file: step, best, no_better, optimizer, scheduler, scaler, random, since_log, tokens_trained, ...
STATE: dict[str, dict[str, Any]] = {
    "a step of 10^30": {"dict/0/1": 10**30},
    "a negative step": {"dict/0/1": -1},
    "a step of another checkpoint": {"dict/0/1": 4},
    "no step": {"dict/0": REMOVED},
    "a best step that is a text": {"dict/1/1": "../../../outside"},
    "no optimizer": {"dict/3": REMOVED},
    "a scheduler of steps to come": {"dict/4/1": {"dict": [["last_epoch", 10**30]]}},
    "tokens below zero": {"dict/8/1": -1},
}


def _state(change: dict[str, Any], file: str = "state.json") -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        change_json(site.evil / "checkpoints" / "checkpoint-2" / file, change)
        sealed(site.evil / "checkpoints" / "checkpoint-2")
        return [USES["resume"]]

    return build


COMPARISON: dict[str, dict[str, Any]] = {
    "a folder that leads out": {"trials/0/folder": "../../outside"},
    "an absolute folder": {"trials/0/folder": "/etc"},
    "a folder of dots": {"trials/0/folder": "runs/../../../outside"},
    "an empty folder": {"trials/0/folder": ""},
    "a folder with NUL": {"trials/0/folder": "a\0b"},
    "a folder of a backslash": {"trials/0/folder": "..\\..\\outside"},
    "a seed of 10^400": {"trials/0/seed": 10**400},
    "a config without methods": {"config/methods": REMOVED},
    "methods that are texts": {"config/methods": ["lora"]},
    "a method without a label": {"config/methods": [{"name": "lora"}]},
    "a config without a task": {"config/task": REMOVED},
    "a task that is none": {"config/task": "evil"},
    "given that is a list": {"given": []},
    "figures of the base beyond numbers": {"base": {"accuracy": 10**400}},
    "figures of the base that are none": {"base": {"accuracy": "NaN", "x": "Infinity"}},
    "trials that are none": {"trials": []},
    "trials of a purpose that is none": {"trials/0/purpose": "evil"},
    "the same trial twice": {"trials/1/folder": "runs/lora/seed-42"},
    "steps below zero": {"steps": {"lora": -5}},
    "chosen settings of others": {"chosen": {"evil": {"x": 1}}},
    "a schema of the future": {"schema_version": 99},
    "a further field": {"evil": 1},
    "attempts below zero": {"trials/0/attempts": -1},
}


def _compared(change: dict[str, Any]) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "comparison")
        change_json(site.evil / "comparison.json", change)
        # without trials all are made, which takes long
        return [("report", "evil"), *([] if change == {"trials": []} else [("compare", "evil/compare.yaml")])]

    return build


ANSWERS: dict[str, dict[str, Any]] = {
    "rows that are texts": {"rows": ["x"]},
    "a probability of 10^400": {"rows/0/probability": 10**400},
    "a probability that is none": {"rows/0/probability": "NaN"},
    "a share above one": {"majority": 7.0},
    "a share of 10^400": {"majority": 10**400},
    "classes below zero": {"classes": -1},
    "figures that are texts": {"metrics": {"rouge_l": "x"}},
    "an answer of a million letters": {"rows/0/given": "x" * 1_000_000},
    "a further field": {"evil": 1},
    "prompts of a list": {"prompts": [[]]},
}


def _answered(change: dict[str, Any]) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "comparison")
        change_json(site.evil / "runs" / "lora" / "seed-42" / "answers.json", change)
        return [("report", "evil")]

    return build


CASES = [
    *(Case(KIND, f"run.yaml, a number: {name}", _value("train/seed", text)) for name, text in NUMBERS.items()),
    *(Case(KIND, f"run.yaml, a name: {name}", _value("model", text)) for name, text in list(NUMBERS.items())[:9]),
    *(Case(KIND, f"run.yaml: {name}", _yaml(text)) for name, text in YAML.items()),
    *(
        Case(KIND, f"run.json: {name}", _record(change, "generate", "report", "eval"), "either")
        for name, change in RECORD.items()
    ),
    *(
        Case(KIND, f"run.json before going on: {name}", _record(change, "resume"), "either")
        for name, change in list(RECORD.items())[:16]
    ),
    *(
        Case(KIND, f"{what}: {name}", _file(file, text, USES["resume"] if "checkpoint" in file else HELLO), "either")
        for what, file in FILES.items()
        for name, text in list(JSON_TEXTS.items())[: 15 if what == "run.json" else 6]
    ),
    *(
        Case(KIND, f"the base model's {file}: {name}", _base(file, text), "either")
        for file in BASES
        for name, text in list(JSON_TEXTS.items())[:7]
    ),
    *(Case(KIND, f"a checkpoint: {name}", _state(change), "either") for name, change in STATE.items()),
    *(Case(KIND, f"comparison.json: {name}", _compared(change), "either") for name, change in COMPARISON.items()),
    *(Case(KIND, f"answers.json: {name}", _answered(change), "either") for name, change in ANSWERS.items()),
]
