"""Kind 9: what a cluster's worker sends back, and settings of clusters and launchers in a stranger's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from faults.folders.making import USES, change_json, change_settings, change_yaml, copy, link, victim, victims, write
from faults.folders.sandbox import Case, Site, Step
from siliang.compare.packed import Packed, files_of, unpack
from siliang.compare.received import IncomingFolder, checked

KIND = "ray"

NAMES = {
    "that leads up": "../../outside/evil.txt",
    "that leads up by dots inside": "a/../../../outside/evil.txt",
    "of an absolute path": "OUT/evil.txt",
    "that is empty": "",
    "of a dot": ".",
    "of two dots": "..",
    "with NUL": "a\0b",
    "of a backslash": "..\\..\\outside\\evil.txt",
    "of the home": "~/evil.txt",
    "that is a number": 5,
    "that is nothing": None,
    "in bytes": b"../../outside/evil.txt",
    "of a folder and a file": "run.json/x",
    "of 5,000 letters": "x" * 5000,
    "of a thousand folders": "/".join(["a"] * 1000),
    "of a stream": "run.json:evil",
    "of a device": "/dev/null",
    "of another run's folder": "../lora-2/run.json",
}


def _incoming(site: Site) -> IncomingFolder:
    (site.work / "runs").mkdir(exist_ok=True)
    return IncomingFolder(site.work / "runs" / "lora", 0, "evil")


def _sent(*messages: Any) -> Callable[[Site], Sequence[Step]]:
    """What a worker sends of the run's folder."""

    def build(site: Site) -> Sequence[Step]:
        incoming = _incoming(site)

        def named(value: Any) -> Any:
            return value.replace("OUT", str(site.outside)) if isinstance(value, str) else value

        def receive() -> None:
            for message in messages:
                known = {key: named(value) for key, value in message.items()} if isinstance(message, dict) else message
                if (heard := checked(known))["kind"] in ("file", "folder"):
                    incoming.receive(heard)

        return [receive]

    return build


def _file(name: Any, content: Any = b"evil") -> dict[str, Any]:
    return {"kind": "file", "name": name, "bytes": content}


def _unpacked(name: Any) -> Callable[[Site], Sequence[Step]]:
    """Files for a worker, under names that whoever asks has given."""

    def build(site: Site) -> Sequence[Step]:
        path = name.replace("OUT", str(site.outside)) if isinstance(name, str) else name
        packed = Packed("files-" + "0" * 32, ((path, (b"evil",)),))
        return [lambda: unpack(packed, site.work / "unpacked", lambda piece: piece)]

    return build


def _through_link(site: Site) -> Sequence[Step]:
    """The first file cannot be a link, but a folder that is there already may be one."""
    incoming = _incoming(site)
    link(site.work / "runs" / f".lora.tmp{os.getpid()}", victims(site))
    return [lambda: incoming.receive(_file("keep.txt"))]


def _over_link(site: Site) -> Sequence[Step]:
    incoming = _incoming(site)
    link(site.work / "runs" / "lora", victims(site))
    return [lambda: (incoming.receive(_file("run.json")), incoming.receive({"kind": "folder", "nbytes": 4}))]


def _old_link(site: Site) -> Sequence[Step]:
    incoming = _incoming(site)
    (site.work / "runs" / "lora").mkdir()
    link(site.work / "runs" / ".lora.tmp-old", victims(site))
    return [lambda: (incoming.receive(_file("run.json")), incoming.receive({"kind": "folder", "nbytes": 4}))]


def _carried(site: Site) -> Sequence[Step]:
    """What the user's machine sends to a worker: a data set's folder with a link out of it."""
    copy(site, "plain_set")
    link(site.evil / "data" / "more", victims(site))
    link(site.evil / "data" / "x.jsonl", victim(site, "secret.jsonl"))

    def names() -> str:
        return "\n".join(map(str, files_of(str(site.evil))))

    return [names]


SETTINGS: dict[str, dict[str, Any]] = {
    "a launcher": {"launcher": "evil"},
    "ray": {"ray": "evil:6379"},
    "Ray's environment": {"runtime_env": {"working_dir": "/etc", "pip": ["evil"]}},
    "a strategy that is none": {"distributed": {"strategy": "evil"}},
    "DeepSpeed's file": {"distributed": {"strategy": "deepspeed", "config": "/etc/passwd"}},
    "DeepSpeed with a file": {"distributed": {"strategy": "zero3", "deepspeed": "../given/ds.json"}},
    "DeepSpeed": {"distributed": {"strategy": "zero3"}},
    "FSDP": {"distributed": {"strategy": "fsdp"}},
    "a command of the trainer": {"train/report_to": "wandb"},
    "a trainer's argument": {"train/push_to_hub": True},
    "a trainer's log folder": {"train/logging_dir": "../outside"},
    "torch's compiler": {"train/torch_compile": True},
    "an optimizer of the hub": {"train/optim_target_modules": "evil"},
    "quantization of another kind": {"quantization": {"bits": 4, "quant_type": "evil"}},
    "a start of a training": {"train/resume_from_checkpoint": "../outside"},
}


def _set(change: dict[str, Any], step: str) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        write(site.root / "given" / "ds.json", json.dumps({"zero_optimization": {"stage": 3}}))
        site.mine.append(site.root / "given")  # settings say where to read
        change_settings(site, change)
        return [USES[step]]

    return build


def _launched(name: str, content: str) -> Callable[[Site], Sequence[Step]]:
    """A launcher's own configuration in the folder."""

    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        for folder in (site.work, site.evil):
            write(folder / name, content.replace("MARK", str(site.mark)))
        return [("train", "evil/run.yaml", "--output", "new", "--set", "accept=[SL002,SL003,SL006,SL010,SL012]")]

    return build


def _compare(change: dict[str, Any]) -> Callable[[Site], Sequence[Step]]:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "comparison")
        change_yaml(site.evil / "compare.yaml", change)
        change_json(site.evil / "comparison.json", {"status": "running"})
        return [("compare", "evil/compare.yaml")]

    return build


CASES = [
    *(Case(KIND, f"a file's name {what}", _sent(_file(name)), "either") for what, name in NAMES.items()),
    *(
        Case(KIND, f"unpacked: a name {what}", _unpacked(name), "either")
        for what, name in NAMES.items()
        if what not in ("of 5,000 letters", "of a thousand folders")  # which no file that was packed can have
    ),
    *(
        Case(KIND, f"a message {what}", _sent(*messages), "either")
        for what, messages in {
            "of bytes that are text": [_file("run.json", "evil")],
            "of bytes that are a number": [_file("run.json", 10**12)],
            "without a name": [{"kind": "file", "bytes": b"x"}],
            "without bytes": [{"kind": "file", "name": "run.json"}],
            "of a count beyond numbers": [_file("run.json"), {"kind": "folder", "nbytes": 10**400}],
            "of a count that is a text": [_file("run.json"), {"kind": "folder", "nbytes": "4"}],
            "of a folder before its files": [{"kind": "folder", "nbytes": 0}],
            "of a file in a file": [_file("run.json"), _file("run.json/x")],
            "of a file named as a folder": [_file("a/b"), _file("a")],
            "that is a text": ["evil"],
            "that is nothing": [None],
            "that is a list": [[1]],
            "of a kind that is none": [{"kind": "evil"}],
            "of a kind that is a list": [{"kind": ["file"]}],
            "of progress that is a text": [{"kind": "progress", "progress": "x"}],
            "of figures that are texts": [{"kind": "done", "found": {"accuracy": "1.0"}}],
            "of figures by number": [{"kind": "done", "found": {1: 1.0}}],
            "of a version that is a text": [
                {"kind": "ready", "node": "x", "node_id": "y", "versions": "z", "cache": "c"}
            ],
            "of code": [_file("adapter/evil.py")],
            "of a pickle": [_file("adapter/evil.pkl")],
            "of a page": [_file("report.html")],
            "of a hidden file": [_file("adapter/.bashrc.json")],
        }.items()
    ),
    Case(KIND, "a temporary folder that is a link", _through_link, "either"),
    Case(KIND, "a run's folder that is a link", _over_link, "either"),
    Case(KIND, "an old folder that is a link", _old_link, "either"),
    Case(KIND, "a data set that is sent has links", _carried, "either", hides=("keep.txt", "x.jsonl")),
    *(Case(KIND, f"run.yaml: {name}", _set(change, "train"), "either") for name, change in SETTINGS.items()),
    *(
        Case(KIND, f"run.yaml of a run that goes on: {name}", _set(change, "resume"), "either")
        for name, change in list(SETTINGS.items())[3:8]
    ),
    *(
        Case(KIND, f"a launcher's file: {name}", _launched(name, content), "either")
        for name, content in {
            "default_config.yaml": "deepspeed_config: {deepspeed_config_file: /etc/passwd}\nmain_process_ip: x\n",
            "accelerate.yaml": "compute_environment: LOCAL_MACHINE\nmain_process_ip: localhost\n",
            "ds_config.json": '{"zero_optimization": {"stage": 3}}',
            ".deepspeed_env": "PYTHONSTARTUP=MARK\n",
            "hostfile": "localhost slots=2\n",
            ".env": "HF_ENDPOINT=http://localhost:9\nHF_TOKEN=x\n",
            "pyproject.toml": "[tool.siliang]\nremote_code = 'x'\n",
            "sitecustomize.py": "open('MARK', 'w')\n",
            ".netrc": "machine localhost login a password b\n",
        }.items()
    ),
    *(
        Case(KIND, f"compare.yaml: {name}", _compare(change), "either")
        for name, change in {
            "Ray's address": {"ray": "localhost:6379"},
            "jobs": {"jobs": 10**6},
            "an output outside": {"output": "../outside/new"},
            "an absolute output": {"output": "/etc/new"},
            "a seed for each grain of sand": {"seeds": 10**9},
            "a search of many": {"search": {"learning_rate": [0.1] * 5000, "r": [4] * 5000}},
            "a label that leads out": {"methods": [{"name": "lora", "label": "../../../outside/x"}]},
            "labels that are one": {
                "methods": [{"name": "lora", "label": "a/b"}, {"name": "lora", "r": 2, "label": "a b"}]
            },
        }.items()
    ),
]
