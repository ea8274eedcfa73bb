"""Kind 6: secrets of the user's, in whatever siliang is given, that must reach no file and no terminal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from faults.folders.making import HELLO, USES, change_settings, copy, write
from faults.folders.sandbox import Case, Site, Step

KIND = "secrets"

# by their shape alone: none of them is in the environment
SHAPES = {
    "Hugging Face's": "hf_" + "aBcDeFgHiJ" * 3 + "kLmN",
    "Hugging Face's for an organization": "api_org_" + "aBcDeFgHiJ" * 3 + "kLmN",
    "OpenAI's": "sk-" + "aB3dE6gH9j" * 4,
    "OpenAI's for a project": "sk-proj-" + "aB3dE6gH9j" * 6,
    "Anthropic's": "sk-ant-api03-" + "aB3dE6gH9j" * 6,
    "GitHub's": "ghp_" + "aB3dE6gH9j" * 3 + "kLmN12",
    "GitHub's, fine-grained": "github_pat_" + "aB3dE6gH9j" * 2 + "_" + "aB3dE6gH9j" * 4,
    "GitLab's": "glpat-" + "aB3dE6gH9jkLmN12pQrS",
    "Slack's": "xoxb-" + "123456789012-1234567890123-" + "aB3dE6gH9jkLmN12pQrSaB3d",
    "Slack's webhook": "https://hooks.slack.com/services/T00000000/B00000000/" + "aB3dE6gH9jkLmN12pQrSaB3d",
    "Amazon's": "AKIA" + "ABCDEFGHIJ234567",
    "Amazon's for a session": "ASIA" + "ABCDEFGHIJ234567",
    "Google's": "AIza" + "aB3dE6gH9j" * 3 + "kLmN1",
    "Stripe's": "sk_live_" + "aB3dE6gH9jkLmN12pQrSaB3d",
    "npm's": "npm_" + "aB3dE6gH9j" * 3 + "kLmN12",
    "PyPI's": "pypi-AgEIcHlwaS5vcmc" + "aB3dE6gH9j" * 6,
    "a JWT": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9."
    + "eyJzdWIiOiIxMjM0NTY3ODkwIn0."
    + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "a user and password": "https://me:pass-word-9@example.com/x",
    "a user's token": "https://tok3n-of-mine-99@example.com/x",
    "a token in a query": "https://example.com/x?token=aB3dE6gH9jkLmN12",
    "a signature in a query": "https://example.com/x?X-Amz-Signature=aB3dE6gH9jkLmN12pQrS&sig=aB3dE6gH9jkLm",
    "a bearer": "Bearer aB3dE6gH9jkLmN12pQrS",
}
GITHUB = SHAPES["GitHub's"]
OWN = {"MY_API_KEY": "correct-horse-battery", "DB_PASSWORD": "staple zebra/4.7", "HF_TOKEN": "tokenwithoutshape1"}
NUMBER = {"PIN_SECRET": "12345678"}


def told(shape: str) -> str:
    """The part of a secret that must not be seen."""
    for begin in (
        "https://me:",
        "https://example.com/x?token=",
        "https://example.com/x?X-Amz-Signature=",
        "https://",
        "Bearer ",
    ):
        if shape.startswith(begin):
            return shape.removeprefix(begin).partition("@")[0].partition("&")[0]
    return shape


def _data_named(word: str) -> Callable[[Site], Sequence[Step]]:
    """Data in a folder whose name holds a secret."""

    def build(site: Site) -> Sequence[Step]:
        name = word.replace("/", "_").replace(":", "_")
        path = site.root / "given" / name / "rows.jsonl"
        path.parent.mkdir(parents=True)
        shutil.copy(site.shared / "causal_lm.jsonl", path)
        site.mine.append(path.parent)
        sets = [
            x for s in ("train.max_steps=1", "accept=[SL002,SL003,SL006]", "data.max_length=32") for x in ("--set", s)
        ]
        flags = ("--model", site.shared / "llama", "--task", "causal_lm", "--data", path)
        return [("check", *flags), ("plan", *flags), ("train", *flags, "--output", "run", *sets), ("report", "run")]

    return build


def _setting(name: str, word: str, *, value: Any = None) -> Callable[[Site], Sequence[Step]]:
    """A setting of a handed-over run.yaml holds a secret, which is used and again written."""

    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        change_settings(site, {name: word if value is None else value})
        return [USES["check"]]

    return build


def _environment(step: Sequence[Step], change: Callable[[Site], object]) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        os.environ.update(OWN | NUMBER)
        change(site)
        return step

    return build


PLACES = (
    "model",
    "revision",
    "output",
    "adapter",
    "data/train",
    "data/eval",
    "data/template",
    "data/columns/instruction",
    "data/labels/0",
    "data/add_tokens/0",
    "method/target_modules",
    "method/tokenizer_name_or_path",
    "train/best",
    "remote_code",
)


def _in_settings(place: str) -> Case:
    word = SHAPES["Hugging Face's"]

    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        name = place.removesuffix("/0")
        change_settings(site, {name: [word] if place.endswith("/0") else word})
        return [USES["check"], USES["plan"], USES["train"]]

    return Case(KIND, f"in a setting: {place}", build, "either", hides=(word,))


def _row(word: str) -> Callable[[Site], Sequence[Step]]:
    """A secret in rows of data, in labels, and in what is asked."""

    def build(site: Site) -> Sequence[Step]:
        os.environ.update(OWN)
        rows = [{"text": f"w{i} {word}", "label": (word, "good")[i % 2]} for i in range(20)]
        path = write(site.root / "given" / "rows.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        site.mine.append(path.parent)
        return [("check", "--model", site.shared / "bert", "--task", "seq_cls", "--data", path, "--examples", "1")]

    return build


def _failing(step: tuple[object, ...]) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        os.environ.update(OWN)
        copy(site, "lora")
        return [step]

    return build


LONG = "x" * 250 + SHAPES["Hugging Face's"]

CASES = [
    *(
        Case(KIND, f"by shape, in a name: {name}", _data_named(word), "either", hides=(told(word),))
        for name, word in list(SHAPES.items())[:6]
    ),
    *(
        Case(
            KIND,
            f"by shape, in a setting: {name}",
            _setting("data/columns/instruction", word),
            "either",
            hides=(told(word),),
        )
        for name, word in SHAPES.items()
    ),
    *map(_in_settings, PLACES),
    *(
        Case(
            KIND,
            f"of the environment: {name}, asked of a run",
            _failing(("generate", "evil", word)),
            "either",
            hides=(word,),
        )
        for name, word in OWN.items()
    ),
    *(
        Case(
            KIND,
            f"in an error: {' '.join(map(str, step))[:40]}",
            _failing(step),
            "refused",
            hides=(*OWN.values(), SHAPES["GitHub's"][4:]),
        )
        for step in (
            ("generate", OWN["MY_API_KEY"], "w1"),
            ("train", "--model", OWN["HF_TOKEN"], "--task", "causal_lm", "--data", "x.jsonl", "--output", "o"),
            ("report", f"evil/{GITHUB}"),
            ("train", "--resume", f"x/{OWN['MY_API_KEY']}"),
            ("generate", "evil", "w1", "--base", f"https://me:{GITHUB}@h/x"),
            ("check", "--set", f"data.train={OWN['MY_API_KEY']}", "--model", "m", "--task", "seq_cls"),
            ("plan", "--nothing", OWN["MY_API_KEY"]),
            (OWN["MY_API_KEY"],),
        )
    ),
    Case(
        KIND,
        "cut before it is hidden",
        _failing(("generate", LONG, "w1")),
        "refused",
        hides=(SHAPES["Hugging Face's"][:20],),
    ),
    Case(
        KIND,
        "a number of the environment leaves numbers whole",
        _environment([HELLO, USES["merge"]], lambda site: copy(site, "lora")),
        "works",
    ),
]
