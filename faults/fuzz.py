"""Hostile and broken files: each either works or ends in a SiliangError; no hang, no other error, no file outside.

Half of the cases are whole files with some bytes changed, half are made by hypothesis of what such a file may hold.
"""

from __future__ import annotations

import json
import os
import random
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase
from hypothesis.errors import NonInteractiveExampleWarning
from safetensors.torch import save

from faults.runs import Place
from siliang import LoraConfig, PeftModel, get_peft_model
from siliang.config import RunConfig
from siliang.data.chat import ChatTemplate
from siliang.data.encode import Encoder
from siliang.data.load import load_examples
from siliang.data.messages import Conversation, Message
from siliang.models.tokenizers import load_tokenizer
from siliang.records import Record
from siliang.safety.safe_yaml import read_yaml
from siliang.tasks import TASKS
from siliang.types import SiliangError, TaskType

HANG_S = 20


@dataclass
class Target:
    """One kind of file.

    Attributes:
        seeds: Whole files to begin with.
        made: Contents that hypothesis generates.
        read: What siliang does with such a file.
    """

    name: str
    seeds: list[bytes]
    made: st.SearchStrategy[bytes]
    read: Callable[[bytes], object]


@dataclass
class Fuzzed:
    """Counts by kind of file.

    Attributes:
        worked: Cases in which the file was good enough.
        refused: Cases that ended in a SiliangError.
        failures: Everything else, the first of each kind with its content.
        outside: Files that appeared outside of the folder.
    """

    worked: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    n_failures: int = 0
    outside: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.worked.total() + self.refused.total() + self.n_failures

    @property
    def passed(self) -> bool:
        return self.cases > 0 and not self.n_failures and not self.outside


class HangError(BaseException):
    """A case took too long."""


def fuzz(place: Place, folder: Path, *, cases: int, seed: int = 0, only: str | None = None) -> Fuzzed:
    """So many cases, in equal parts for each kind of file.

    Args:
        folder: An empty one, in the middle of which it happens.
    """
    found, chance = Fuzzed(), random.Random(seed)
    inner = folder / "outer" / "inner"
    inner.mkdir(parents=True)
    targets = [t for t in make_targets(place, inner) if only in (None, t.name)]
    here = Path.cwd()
    os.chdir(inner)
    warnings.filterwarnings("ignore")
    try:
        for target in targets:
            share = cases // len(targets)
            for _ in range(share // 2):
                _try(target, _changed(chance.choice(target.seeds), chance), found)
            for content in _examples(target.made, share - share // 2, seed):
                _try(target, content, found)
    finally:
        os.chdir(here)
    found.outside = [str(p) for p in folder.rglob("*") if p != folder / "outer" and not p.is_relative_to(inner)]
    return found


def _try(target: Target, content: bytes, found: Fuzzed) -> None:
    try:
        with _not_for_ever(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(content)
        found.worked[target.name] += 1
    except SiliangError:
        found.refused[target.name] += 1
    except (Exception, HangError):
        _fail(target, content, found, traceback.format_exc())


def _fail(target: Target, content: bytes, found: Fuzzed, why: str) -> None:
    found.n_failures += 1
    where = [line.strip() for line in why.splitlines() if "siliang" in line and line.strip().startswith("File")]
    key = f"{target.name}: {why.strip().splitlines()[-1][:120]} at {where[-1] if where else '?'}"
    found.failures.setdefault(key, (content[:2000], why))


@contextmanager
def _not_for_ever() -> Iterator[None]:
    """Uses a separate timer: the tried code may use the alarm."""

    def stop(number: int, frame: Any) -> None:
        raise HangError(f"more than {HANG_S} s of the processor's time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


PIECES = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"'", b"{", b"}", b"[", b"]", b":", b",", b"\n", b"\r", b"\t", b"\\u0000",
    b"\\ud800", b"null", b"NaN", b"-1", b"0", b"1e999", b"9" * 400, b"9" * 5000, b"../../x", b"/etc/passwd", b"&a ",
    b"*a", b"!!int ", b"!!python/object:os.system ", b"{% for i in range(99999) %}{% endfor %}",
    b"{{ messages }}", b"true",
    b"[" * 3000, b"{\"a\":" * 3000, b"- " * 200, b"(a+)+$", b"\xe5\x9b\x9b",
)  # fmt: skip


def _changed(content: bytes, chance: random.Random) -> bytes:
    """With a few changes: bits, bytes, pieces that mean something, parts cut out, doubled or moved."""
    out = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        at = chance.randrange(len(out) + 1)
        to = min(len(out), at + chance.choice((1, 2, 8, 64)))
        match chance.randrange(6):
            case 0 if out:
                out[at % len(out)] ^= 1 << chance.randrange(8)
            case 1 if out:
                out[at % len(out)] = chance.randrange(256)
            case 2:
                out[at:at] = chance.choice(PIECES)
            case 3:
                out[at:to] = chance.choice(PIECES)
            case 4:
                del out[at:to]
            case _:
                out[chance.randrange(len(out) + 1) : 0] = out[at:to]
    return bytes(out)


def _examples(made: st.SearchStrategy[bytes], count: int, seed: int) -> list[bytes]:
    out: list[bytes] = []

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=InMemoryExampleDatabase(),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(made)
    def collect(content: bytes) -> None:
        out.append(content)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonInteractiveExampleWarning)
        collect()
    return (out * (1 + count // max(len(out), 1)))[:count]


# ---- the kinds of files ----

TEXTS = st.text(max_size=30) | st.sampled_from(
    [
        "../../../x",
        "/etc/passwd",
        "a/b",
        "(a+)+$",
        "lora",
        "all-linear",
        "q_proj",
        "skip 3",
        "8h",
        "99999999999GB",
        "NaN",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXTS, v, max_size=4), max_leaves=12)


def make_targets(place: Place, folder: Path) -> list[Target]:
    """All kinds, with siliang's ways of reading each."""
    return [
        _adapter_config(place, folder),
        _tensors(place, folder),
        _run_yaml(place, folder),
        *_rows(folder),
        _run_json(folder),
        _chat_template(place),
    ]


def _adapter(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    model = get_peft_model(_plain(), LoraConfig(r=4, target_modules=["first", "second"]))
    model.save_pretrained(folder)
    return model.peft_config["default"], model.injection.adapters["default"].tensors()


class _Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (torch.nn.Linear(8, 8) for _ in range(3))
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.second(self.first(x))))


def _plain() -> Any:
    torch.manual_seed(0)
    return _Plain()


def _opened(folder: Path) -> None:
    model = _plain()
    opened = PeftModel.from_pretrained(model, folder)
    opened(torch.ones(1, 8))


def _adapter_config(place: Place, folder: Path) -> Target:
    where = folder / "adapter-config"
    _adapter(where)
    path = where / "adapter_config.json"
    seed = json.loads(path.read_text())
    others = [{"peft_type": kind, "num_virtual_tokens": 4} for kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")]
    keys = st.sampled_from(
        [*seed, "num_virtual_tokens", "token_dim", "num_layers", "encoder_hidden_size", "use_qalora"]
    )
    changes = st.dictionaries(keys | TEXTS, VALUES, max_size=5)
    whole = changes.map(lambda c: json.dumps(seed | c).encode("utf-8", "surrogatepass"))
    some = VALUES.map(lambda v: json.dumps(v).encode("utf-8", "surrogatepass"))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        _opened(where)

    return Target("adapter_config.json", [json.dumps(s).encode() for s in (seed, *others)], whole | some, read)


def _tensors(place: Place, folder: Path) -> Target:
    where = folder / "tensors"
    _, tensors = _adapter(where)
    path = where / "adapter_model.safetensors"
    seed = path.read_bytes()
    keys = list(tensors)
    shapes = st.lists(st.integers(0, 9), max_size=3)
    kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float64])
    made = st.builds(
        lambda names, shape, kind, value: save(
            {n: torch.full(shape, value).to(kind) for n in names} | {k: t for k, t in tensors.items() if k not in names}
        ),
        st.lists(st.sampled_from(keys) | st.text(min_size=1, max_size=20), max_size=4, unique=True),
        shapes,
        kinds,
        st.floats(width=32),
    )
    header = st.builds(
        lambda values, rest: (len(text := json.dumps(values).encode())).to_bytes(8, "little") + text + rest,
        st.dictionaries(
            TEXTS,
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "BF16", "X", ""]),
                    "shape": st.lists(st.integers(-1, 2**63), max_size=3),
                    "data_offsets": st.lists(st.integers(-1, 2**63), min_size=2, max_size=2),
                }
            )
            | VALUES,
            max_size=3,
        ),
        st.binary(max_size=64),
    )

    def read(content: bytes) -> None:
        path.write_bytes(content)
        _opened(where)

    return Target("safetensors", [seed], made | header | st.binary(max_size=200), read)


def _run_yaml(place: Place, folder: Path) -> Target:
    path = folder / "run.yaml"
    config = place.config(folder / "out")
    seed = config.to_yaml()
    whole = yaml.safe_load(seed)
    sections = {"": list(RunConfig.model_fields), "train": list(whole["train"]), "data": list(whole["data"])}
    sections["method"] = ["name", "r", "lora_alpha", "target_modules", "init_lora_weights", "loftq_config", "bias"]

    def change(pairs: list[tuple[str, str, Any]]) -> bytes:
        values = yaml.safe_load(seed)
        for section, key, value in pairs:
            inner = values.setdefault(section, {}) if section else values
            if isinstance(inner, dict):
                inner[key] = value
        return yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")

    pairs = st.one_of(*(st.tuples(st.just(s), st.sampled_from(keys) | TEXTS, VALUES) for s, keys in sections.items()))
    bombs = st.sampled_from([_bomb(n, m) for n in (5, 9, 30) for m in (2, 9)] + [b"a: &a [*a]", b"- " * 5000])

    def read(content: bytes) -> None:
        path.write_bytes(content)
        RunConfig.build(read_yaml(path), source=str(path))

    small = b"model: m\ntask: seq_cls\ndata: {train: d.csv}\noutput: o\ntrain: {max_time: 8h, on_nan: skip 5}\n"
    return Target("run.yaml", [seed.encode(), small], st.lists(pairs, max_size=4).map(change) | bombs, read)


def _bomb(levels: int, times: int) -> bytes:
    """A few lines whose aliases unfold to times ** levels values."""
    lines = ["a0: &a0 x"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * times)}]" for i in range(1, levels)]
    return "\n".join(lines).encode()


def _rows(folder: Path) -> list[Target]:
    rows = [{"text": f"the film was {w}", "label": w} for w in ("good", "bad")] * 4
    keys = (
        st.sampled_from(["text", "label", "messages", "instruction", "output", "tokens", "tags", "text_pair"]) | TEXTS
    )
    row = st.dictionaries(keys, VALUES, max_size=4)
    lines = st.lists(row, max_size=5).map(lambda v: "\n".join(map(json.dumps, v)).encode("utf-8", "surrogatepass"))
    fields = st.lists(st.lists(TEXTS, max_size=4), max_size=5)
    table = fields.map(lambda v: "\n".join(",".join(r) for r in v).encode("utf-8", "surrogatepass"))
    jsonl = "".join(json.dumps(r) + "\n" for r in rows).encode()
    chat = "".join(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
        for _ in range(4)
    ).encode()
    listed = json.dumps(rows).encode()
    csv = b"text,label\n" + b"".join(f"{r['text']},{r['label']}\n".encode() for r in rows)
    cases = [
        ("jsonl", ".jsonl", [jsonl, chat], lines | st.binary(max_size=100)),
        (
            "json",
            ".json",
            [listed],
            st.lists(row, max_size=5).map(lambda v: json.dumps(v).encode()) | VALUES.map(_json),
        ),
        ("csv", ".csv", [csv], table | st.binary(max_size=100)),
    ]

    def reader(path: Path) -> Callable[[bytes], None]:
        chance = random.Random(0)

        def read(content: bytes) -> None:
            path.write_bytes(content)
            task = chance.choice((TaskType.SEQ_CLS, TaskType.CAUSAL_LM, TaskType.TOKEN_CLS, TaskType.SEQ_2_SEQ_LM))
            values = {"train": str(path), "skip_bad_rows": chance.random() < 0.5, "test_size": 0.0}
            config = {"model": "m", "task": task, "data": values, "output": "o"}
            load_examples(RunConfig.build(config).data, TASKS[task].data, seed=0)

        return read

    return [Target(name, seeds, made, reader(folder / f"data{suffix}")) for name, suffix, seeds, made in cases]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _run_json(folder: Path) -> Target:
    device = {"kind": "cpu", "name": "x", "threads": 1, "memory_bytes": 1}
    seed: dict[str, Any] = {
        "started_at": "2026-01-01T00:00:00",
        "config": {},
        "seed": 0,
        "versions": {},
        "device": device,
        "precision": "fp32",
        "learning_rate": 1e-3,
        "model_sha256": "a" * 64,
        "data_sha256": "b" * 64,
        "parameters": {"trained": 1, "total": 2},
        "rows": {"train": 1, "eval": 1},
        "steps": [{"step": 1, "epoch": 0.1, "loss": 1.0}],
    }
    Record.model_validate(seed)
    changes = st.dictionaries(st.sampled_from(list(Record.model_fields)) | TEXTS, VALUES, max_size=4)
    made = changes.map(lambda c: json.dumps(seed | c).encode("utf-8", "surrogatepass")) | VALUES.map(_json)

    def read(content: bytes) -> None:
        (folder / "run.json").write_bytes(content)
        Record.read(folder)

    return Target("run.json", [json.dumps(seed).encode()], made, read)


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>' + m['content'] }}{% elif m['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% else %}{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
HOSTILE = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch ../escaped') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('x') }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{{ 'a' * 10 ** 11 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '%999999999999d' % 1 }}",
    "{{ lipsum(n=99999999) }}",
    "{{ 'a' | center(99999999999) }}",
)


def _chat_template(place: Place) -> Target:
    tokenizer = load_tokenizer(str(place.model))
    talk = Conversation((Message("user", "a </s> b"), Message("assistant", "c"), Message("user", "d")))
    words = [
        "{{",
        "}}",
        "{%",
        "%}",
        "for m in messages",
        "endfor",
        "if",
        "endif",
        "m['content']",
        "set x = ",
        "'a'",
        "*",
    ]
    words += ["99", "range(9)", "|tojson", "+", "m.role", "generation", "endgeneration", "<s>", "(", ")", "loop", "}"]
    made = st.lists(st.sampled_from(words) | TEXTS, max_size=14).map(" ".join)
    slow = st.sampled_from(HOSTILE[:5] + HOSTILE[9:])  # those that run to the limit are tried once, as seeds below

    def read(content: bytes) -> None:
        tokenizer.chat_template = content.decode("utf-8", "replace")
        ChatTemplate(Encoder(tokenizer)).entries([talk])

    encoded = (made | slow).map(lambda t: t.encode("utf-8", "surrogatepass"))
    return Target("chat template", [TEMPLATE.encode()], encoded, read)


def hostile_templates(place: Place) -> list[str]:
    """The malicious templates that were not refused."""
    read = _chat_template(place).read
    passed = []
    for template in HOSTILE:
        try:
            read(template.encode())
            passed.append(template)
        except SiliangError:
            continue
    return passed
