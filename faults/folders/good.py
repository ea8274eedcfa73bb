"""Good folders, with nothing changed: all of them work, or what is refused elsewhere would say nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from faults.folders.bases import METHODS, TASKS, TEMPLATE, tiny_llama
from faults.folders.making import HELLO, USES, change_settings, copy, with_base, write
from faults.folders.sandbox import Case, Site, Step
from siliang import PeftModel

KIND = "good"


def _used(run: str, *steps: Step) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        copy(site, run)
        return steps

    return build


def _with_base(site: Site) -> Sequence[Step]:
    """A base model of its own, its chat template, and a template file."""
    base = with_base(site)
    write(base / "chat_template.jinja", TEMPLATE)
    change_settings(site, {"data/template": "chat"})
    return [HELLO, USES["chat"], USES["report"]]


def _with_template(site: Site) -> Sequence[Step]:
    copy(site, "lora")
    write(site.evil / "t.yaml", "user: 'Human: {content} '\nassistant: 'Assistant: '\nend: '</s>'\n")
    change_settings(site, {"data/template": "evil/t.yaml"})
    return [HELLO]


def _opened(site: Site) -> Sequence[Step]:
    copy(site, "adapter")
    model = tiny_llama()
    return [lambda: PeftModel.from_pretrained(model, Path("evil")).save_pretrained("saved")]


def _data(name: str) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        copy(site, name)
        return [("plan", "--model", site.shared / "bert", "--task", "seq_cls", "--data", "evil")]

    return build


CASES = [
    *(Case(KIND, f"a run: {use}", _used("lora", step), "works") for use, step in USES.items() if use != "check"),
    *(Case(KIND, f"a run of {name}: eval", _used(name, USES["eval"]), "works") for name in (*METHODS, *TASKS)),
    *(Case(KIND, f"a run of {name}: generate", _used(name, HELLO), "works") for name in METHODS),
    *(
        Case(KIND, f"a run of {name}: predict", _used(name, ("predict", "evil", text)), "works")
        for name, text in (("seq_cls", "w1"), ("token_cls", "w1 w2"), ("question_ans", "w1\tw1 w2 w3"))
    ),
    Case(KIND, "a run with its own base model", _with_base, "works"),
    Case(KIND, "a run with a template file", _with_template, "works"),
    Case(KIND, "an adapter, opened and saved", _opened, "works"),
    Case(KIND, "a comparison: report", _used("comparison", ("report", "evil")), "works"),
    *(Case(KIND, f"data: {name}", _data(name), "works") for name in ("set", "plain_set", "saved_set")),
]
