"""Kind 7: sequences that a terminal obeys, and names that a shell obeys, in data, labels and what models write."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults.folders.making import HELLO, USES, change_json, change_settings, copy, sealed, with_base, write
from faults.folders.sandbox import Case, Site, Step

KIND = "terminals"

SEQUENCES = {
    "colour": "\x1b[31mred",
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "a link": "\x1b]8;;http://evil\x1b\\x\x1b]8;;\x1b\\",
    "one character of C1": "\x9b31mred",
    "an operating system's command of C1": "\x9d0;owned\x9c",
    "backspaces": "rm\b\bls",
    "a carriage return": "all well\rerror",
    "a bell": "\x07\x07",
    "right to left": "a\u202egnp.exe\u202c",
    "isolates": "a\u2066b\u2069\u200f",
    "a device's answer": "\x1b[c\x1b[6n\x1bZ",
    "a line's end of Unicode": "a\u2028b\u2029c\x85d",
    "a form feed": "a\x0c\x0bb",
    "delete": "a\x7fb",
}
ALL = "".join(SEQUENCES.values())


def _tokens(site: Site) -> Sequence[Step]:
    """The model writes words that are sequences."""
    base = with_base(site)

    def change(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        values["model"]["vocab"] = {(w if n < 8 else f"{w}\x1b[3{n % 8}m\x9b2J"): n for w, n in vocabulary.items()}

    change_json(base / "tokenizer.json", change)
    return [("generate", "evil", "w1", "--max-new-tokens", "4"), USES["chat"]]


def _decoded(site: Site) -> Sequence[Step]:
    """A decoder puts a sequence between the words."""
    base = with_base(site)
    rule = {"type": "Replace", "pattern": {"String": "w"}, "content": "\x1b]0;x\x07"}
    change_json(base / "tokenizer.json", {"decoder": rule})
    return [("generate", "evil", "w1", "--max-new-tokens", "4"), ("generate", "evil", "w1", "--base"), USES["chat"]]


def _labels(text: str) -> Callable[[Site], Sequence[Step]]:
    """A classifier's labels."""

    def build(site: Site) -> Sequence[Step]:
        copy(site, "seq_cls")
        change_json(site.evil / "run.json", {"labels": [f"bad{text}", f"good{text}"]})
        return [("predict", "evil", "w1"), ("predict", "evil", "w1", "--json"), USES["report"]]

    return build


def _rows(text: str) -> Callable[[Site], Sequence[Step]]:
    """A stranger's data."""

    def build(site: Site) -> Sequence[Step]:
        rows = [{"text": f"w{i}{text}", "label": f"{('bad', 'good')[i % 2]}{text}", f"x{text}": 1} for i in range(20)]
        write(site.evil / "train.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        flags = ("--model", site.shared / "bert", "--task", "seq_cls", "--data", "evil/train.jsonl")
        return [("check", *flags), ("plan", *flags)]

    return build


def _column(name: str, content: Callable[[str], str]) -> Case:
    """A file of data of another kind."""

    def build(site: Site) -> Sequence[Step]:
        write(site.evil / name, content(ALL))
        return [("check", "--model", site.shared / "bert", "--task", "seq_cls", "--data", f"evil/{name}")]

    return Case(KIND, f"data: {name}", build, "either")


def _named(name: str, step: Callable[[Path], Sequence[Step]], base: str = "lora") -> Callable[[Site], Sequence[Step]]:
    """The stranger's folder has such a name."""

    def build(site: Site) -> Sequence[Step]:
        copy(site, base, site.work / name)
        return step(Path(name))

    return build


def _setting(name: str, value: Any, *steps: str) -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        change_settings(site, {name: value})
        return [USES[step] for step in steps or ("check", "generate", "resume")]

    return Case(KIND, f"run.yaml: {name}", build, "either")


def _record(name: str, value: Any) -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        change_json(site.evil / "run.json", {name: value})
        return [USES["report"], USES["generate"]]

    return Case(KIND, f"run.json: {name}", build, "either")


def _compared(name: str, change: dict[str, Any], file: str = "comparison.json") -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "comparison")
        change_json(site.evil / file, change)
        return [("report", "evil")]

    return Case(KIND, f"{file}: {name}", build, "either")


def _adapter(name: str, change: dict[str, Any]) -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        change_json(site.evil / "adapter" / "adapter_config.json", change)
        sealed(site.evil / "adapter")
        return [HELLO]

    return Case(KIND, f"adapter_config.json: {name}", build, "either")


def _text(name: str, file: str, content: str, step: Step) -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        write(site.evil / file, content)
        return [step]

    return Case(KIND, name, build, "either")


# ---- shells ----

SHELL = (
    "$(touch MARK)",
    "`touch MARK`",
    "a;touch MARK;",
    "a'b$(touch MARK)'",
    '"$(touch MARK)"',
    "a|touch MARK",
    "a&touch MARK&",
    "-rf $(touch MARK)",
    "a\\'$(touch MARK)",
)
COMMAND = re.compile(r"siliang (?:train|compare|report|generate|chat|predict|eval|merge|plan|check|explain)\b[^\n`<>]*")


def run_commands(site: Site, text: str) -> str | None:
    """Gives the commands that were suggested to a shell whose siliang does nothing."""
    pages = [p.read_text(encoding="utf-8") for p in site.work.glob("**/report.html")]
    there = site.work / "shell"
    there.mkdir()
    for found in COMMAND.findall("\n".join((text, *pages))):
        for part in (found, found.replace("&#39;", "'").replace("&#34;", '"').replace("&amp;", "&")):
            program = f"siliang() {{ :; }}\n{part.rstrip('., )')}\n"
            subprocess.run(["/bin/bash", "-c", program], cwd=there, capture_output=True, timeout=20)
            if any(there.iterdir()):
                return f"a command that is suggested runs what a name says: {part[:200]}"
    return None


def _shell(number: int, name: str, steps: Callable[[str], Sequence[Step]], base: str, what: str) -> Case:
    name = name.replace("MARK", "m")

    def build(site: Site) -> Sequence[Step]:
        copy(site, base, site.work / name)
        if base == "lora" and what == "unfinished":
            change_json(site.work / name / "run.json", {"status": "interrupted"})
            shutil.rmtree(site.work / name / "adapter")
        return steps(name)

    return Case(KIND, f"shell: {what}, {number}", build, "either", look=run_commands)


CASES = [
    *(Case(KIND, f"labels: {name}", _labels(text), "either") for name, text in SEQUENCES.items()),
    *(Case(KIND, f"data: {name}", _rows(text), "either") for name, text in SEQUENCES.items()),
    Case(KIND, "words of the model", _tokens, "either"),
    Case(KIND, "a decoder", _decoded, "either"),
    _column("a.csv", lambda t: f"text,label{t}\nw1{t},good\nw2,bad{t}\n"),
    _column("a.tsv", lambda t: f"text\tlabel{t}\nw1{t}\tgood\nw2\tbad{t}\n"),
    _column("a.txt", lambda t: f"w1{t}\nw2\n" * 9),
    _column("a.json", lambda t: json.dumps([{f"text{t}": t, "label": t}] * 20)),
    _column("a.bio", lambda t: f"w1{t} O\nw2 B-{t}\n\n" * 9),
    _column(f"a{ALL}.jsonl".replace("/", ""), lambda t: "{}\n"),
    *(
        Case(
            KIND,
            f"a folder's name: {name}",
            _named(
                f"e{text}".replace("/", ""),
                lambda p: [
                    ("generate", p, "w1", "--max-new-tokens", "1"),
                    ("train", "--resume", p),
                    ("report", p / "x"),
                ],
            ),
            "either",
        )
        for name, text in list(SEQUENCES.items())[:9]
    ),
    *(
        _setting(name, ALL)
        for name in ("data/template", "data/columns/text", "train/best", "model", "revision", "method/name", ALL)
    ),
    *(
        _record(name, ALL)
        for name in (
            "error",
            "started_at",
            "precision",
            "device/name",
            "config/method/name",
            "columns/text",
            "versions/torch",
        )
    ),
    *(
        _compared(name, {name: ALL})
        for name in ("trials/0/error", "trials/0/method", "config/methods/0/label", "started_at", "status")
    ),
    _compared(
        "what is asked",
        {"rows/0/asked": ALL, "rows/0/given": ALL, "rows/0/where": ALL},
        "runs/lora/seed-42/answers.json",
    ),
    *(
        _adapter(name, {name: ALL})
        for name in ("base_model_name_or_path", "target_modules", "peft_type", "task_type", "bias", ALL)
    ),
    _text("yaml that is none", "run.yaml", f"model: [{ALL}\n", HELLO),
    _text("JSON that is none", "run.json", f'{{"{ALL}": ', HELLO),
    _text(
        "a manifest of names",
        "adapter/manifest.json",
        json.dumps({"version": 1, "files": {ALL: {"bytes": 1, "sha256": "x"}}}),
        HELLO,
    ),
    _text(
        "a template of names",
        "t.yaml",
        f"name: x\n'{json.dumps(ALL)}': x\n",
        ("check", "evil/run.yaml", "--set", "data.template=evil/t.yaml"),
    ),
    *(
        _shell(n, name, lambda folder: [("report", folder)], "comparison", "a comparison")
        for n, name in enumerate(SHELL)
    ),
    *(
        _shell(n, name, lambda folder: [("generate", folder, "w1")], "lora", "unfinished")
        for n, name in enumerate(SHELL)
    ),
    *(
        _shell(n, name, lambda folder: [("report", folder, "--output", "report.html")], "lora", "a run")
        for n, name in enumerate(SHELL)
    ),
]
