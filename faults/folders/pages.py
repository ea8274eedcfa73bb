"""Kind 10: a comparison's metrics that disagree with its runs' records, and pages that do more than display."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from faults.folders.making import REMOVED, change_json, change_yaml, copy, write
from faults.folders.sandbox import Case, Site, Step

KIND = "pages"
LORA = "runs/lora/seed-42"

# ---- figures that do not agree ----

FIGURES: dict[str, tuple[str, dict[str, Any]]] = {
    "the base's accuracy": ("comparison.json", {"base": {"accuracy": 0.1, "eval_loss": 9.0}}),
    "a run's seed": ("comparison.json", {"trials/0/seed": 7}),
    "a run's method": ("comparison.json", {"trials/0/method": "bitfit"}),
    "a run's settings": ("comparison.json", {"trials/0/settings": {"learning_rate": 0.5}}),
    "the held-out share": ("comparison.json", {"config/data/test_size": 0.5}),
    "the seed of the split": ("comparison.json", {"config/data/seed": 9}),
    "the task": ("comparison.json", {"config/task": "CAUSAL_LM"}),
    "the length": ("comparison.json", {"config/data/max_length": 500}),
    "the steps": ("comparison.json", {"config/train/max_steps": 500}),
    "the model's files": ("comparison.json", {"model_files": {"config.json": "0" * 64}}),
    "the data's files": ("comparison.json", {"data_files": [{"path": "x", "sha256": "0" * 64}]}),
    "one run twice": ("comparison.json", {"trials/0/folder": "runs/bitfit/seed-42"}),
    "one run's base model's files": (f"{LORA}/run.json", {"model_files/config.json": "0" * 64}),
    "one run's weights": (f"{LORA}/run.json", {"model_sha256": "0" * 64}),
    "one run's data": (f"{LORA}/run.json", {"data_sha256": "0" * 64}),
    "one run's rows": (f"{LORA}/run.json", {"rows/eval": 3000}),
    "one run's split": (f"{LORA}/run.json", {"config/data/test_size": 0.5}),
    "one run's seed": (f"{LORA}/run.json", {"seed": 7}),
    "one run's method": (f"{LORA}/run.json", {"config/method/name": "ia3"}),
    "one run's rank": (f"{LORA}/run.json", {"config/method/r": 64}),
    "one run's task": (f"{LORA}/run.json", {"config/task": "TOKEN_CLS"}),
    "one run's accuracy": (f"{LORA}/run.json", {"final/accuracy": 1.0}),
    "one run's accuracy above one": (f"{LORA}/run.json", {"final/accuracy": 7.0}),
    "one run's status": (f"{LORA}/run.json", {"status": "failed", "error": "not finished"}),
    "the answers": (f"{LORA}/answers.json", {"rows/0/correct": True, "rows/0/given": "good", "rows/0/right": "bad"}),
    "the answers' rows": (f"{LORA}/answers.json", {"rows/0/where": "another.jsonl:1"}),
    "the answers' right words": (f"{LORA}/answers.json", {"rows/0/right": "good", "rows/0/correct": True}),
    "the share of the largest class": (f"{LORA}/answers.json", {"majority": 0.01}),
    "the number of classes": (f"{LORA}/answers.json", {"classes": 50}),
    "the answers' figures": (f"{LORA}/answers.json", {"metrics": {"accuracy": 1.0}}),
}
# What the table, the page or an error has to say of them.
REPORTED = re.compile(
    r"(?i)\b(differs?|disagrees?|does not (agree|fit|match|belong)|do not (agree|fit|match|belong)|not what|"
    r"is another|are other|other than|not the same|twice|cannot be|not finished|is damaged|not a share|above 1|"
    r"without its|from 0 to 1|no such)\b"
)


# Of the answers, and of hashes that only one record has, there is nothing else to compare them with.
UNREPORTED = (
    "one run's weights",
    "one run's data",
    "one run's rows",
    "the answers' rows",
    "the share of the largest class",
    "the number of classes",
    "the answers' figures",
)


def _figures(name: str, file: str, change: dict[str, Any]) -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "comparison")
        (site.evil / "report.html").unlink(missing_ok=True)
        change_json(site.evil / file, change)
        return [("report", "evil")]

    return Case(KIND, f"figures: {name}", build, "either", look=_shows if name in UNREPORTED else _says)


def _says(site: Site, text: str) -> str | None:
    page = site.evil / "report.html"
    words = _Page.of(page).text if page.is_file() else ""
    return None if REPORTED.search(text) or REPORTED.search(words) else "neither the table nor the page reports it"


# ---- markup ----

MARKUP = {
    "a script": "<script>document.title='owned'</script>",
    "the end of a script": "</script><script>x()</script>",
    "an image": "<img src=x onerror=alert(1)>",
    "an attribute": '" onmouseover="alert(1)',
    "a quote": "' onfocus='alert(1)' autofocus='",
    "svg": "<svg onload=alert(1)><animate onbegin=alert(1)>",
    "a style": "</style><style>*{background:url(http://evil/)}</style>",
    "a frame": "<iframe srcdoc='<script>x</script>'></iframe>",
    "a link": "<a href='javascript:alert(1)'>x</a>",
    "a base": "<base href='http://evil/'><meta http-equiv=refresh content='0;url=http://evil'>",
    "a form": "<form action=http://evil><input name=x>",
    "an entity": "&lt;script&gt;alert(1)&lt;/script&gt;&#60;b&#62;",
    "a comment": "--><script>x</script><!--",
    "CDATA": "]]><script>x</script>",
    "Jinja": "{{ 7 * 191 }}{% raw %}{{ config }}{% endraw %}",
    "an expression": "${alert(1)}`+alert(1)+`",
    "a template's end": "</textarea></title></svg></pre><script>x</script>",
}
PLACES: dict[str, tuple[str, str]] = {
    "a method's label": ("comparison.json", "trials/0/method"),
    "an error": ("comparison.json", "trials/0/error"),
    "what is asked": (f"{LORA}/answers.json", "rows/0/asked"),
    "what is given": (f"{LORA}/answers.json", "rows/0/given"),
    "where it is asked": (f"{LORA}/answers.json", "rows/0/where"),
    "a device's name": (f"{LORA}/run.json", "device/name"),
    "a run's model": (f"{LORA}/run.json", "config/model"),
    "the settings": ("comparison.json", "given/model"),
    "a version": (f"{LORA}/run.json", "versions/torch"),
    "a figure's name": (f"{LORA}/run.json", "final/NAME"),
}


class _Page(HTMLParser):
    """What a page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.bad, self.scripts = "", [], 0
        self._in: list[str] = []

    @classmethod
    def of(cls, path: Path) -> _Page:
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in.append(tag)
        self.scripts += tag == "script"
        if tag in ("iframe", "object", "embed", "base", "form", "img"):
            self.bad.append(f"<{tag}>")
        for name, value in attrs:
            if name.startswith("on") or name == "srcdoc":
                self.bad.append(f"{tag} {name}={value}")
            if name in ("href", "src", "action", "xlink:href") and not re.match(r"(data:,|#|$)", value or ""):
                self.bad.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._in[-1:]):
            self.text += data


def _shows(site: Site, text: str) -> str | None:
    for path in (p for p in site.work.glob("**/report.html") if p.is_file()):
        page = _Page.of(path)
        if page.bad or page.scripts > 1 or "1337" in page.text:
            return f"the page does more than show: {page.bad[:3]}, {page.scripts} scripts"
    return None


def _marked(name: str, markup: str, file: str, place: str) -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "comparison")
        change_json(site.evil / file, {place: markup} if "NAME" not in place else {place.replace("NAME", markup): 0.5})
        return [("report", "evil")]

    return Case(KIND, f"markup: {name}", build, "either", look=_shows)


def _changed(name: str, change: Callable[[Site], object]) -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "comparison")
        change(site)
        return [("report", "evil")]

    return Case(KIND, name, build, "either", look=_shows)


MANY: dict[str, Callable[[Site], object]] = {
    "a log of 100,000 steps": lambda site: change_json(
        site.evil / LORA / "run.json", lambda r: r.update(steps=[r["steps"][0] | {"step": i} for i in range(100_000)])
    ),
    "answers of 20,000 rows": lambda site: change_json(
        site.evil / LORA / "answers.json", lambda r: r.update(rows=r["rows"] * 7000)
    ),
    "2,000 trials": lambda site: change_json(
        site.evil / "comparison.json", lambda r: r.update(trials=r["trials"] * 1000)
    ),
    "labels of 100,000 letters": lambda site: change_json(
        site.evil / "comparison.json", {"trials/0/method": "x" * 100_000}
    ),
    "a figure of many names": lambda site: change_json(
        site.evil / LORA / "run.json", {"final": {f"x{i}": 0.5 for i in range(20_000)}}
    ),
    "figures for a plot that are none": lambda site: change_json(
        site.evil / LORA / "run.json", {"memory/peak_bytes": 0, "parameters/trained": 0, "seconds/train": 0.0}
    ),
    "figures for a plot that are huge": lambda site: change_json(
        site.evil / LORA / "run.json",
        {"memory/peak_bytes": 10**30, "parameters/trained": 10**30, "seconds/train": 1e300},
    ),
    "losses that are none": lambda site: change_json(
        site.evil / LORA / "run.json", lambda r: [s.update(loss="NaN") for s in r["steps"]] and None
    ),
    "compare.yaml of another comparison": lambda site: change_yaml(
        site.evil / "compare.yaml", {"model": "x", "seeds": 99}
    ),
    "no answers": lambda site: (site.evil / LORA / "answers.json").unlink(),
    "no record": lambda site: (site.evil / LORA / "run.json").unlink(),
    "a page that is a folder": lambda site: (
        (site.evil / "report.html").unlink(missing_ok=True),
        (site.evil / "report.html").mkdir(),
    ),
    "no trials": lambda site: change_json(site.evil / "comparison.json", {"trials": REMOVED}),
    "answers of another kind": lambda site: write(site.evil / LORA / "answers.json", "[]"),
}

CASES = [
    *(_figures(name, file, change) for name, (file, change) in FIGURES.items()),
    *(
        _marked(f"{name}, as {place}", markup, *PLACES[place])
        for i, (name, markup) in enumerate(MARKUP.items())
        for place in (list(PLACES)[i % len(PLACES)], list(PLACES)[(i + 3) % len(PLACES)])
    ),
    *(_changed(name, change) for name, change in MANY.items()),
]
