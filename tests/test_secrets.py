"""Tokens and passwords reach nothing that is written and nothing that is printed, whole, in half or encoded."""

from __future__ import annotations

import ast
import html
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from commands import Ended, run
from tiny import WORDS, write_jsonl

import siliang
from siliang.config import RunConfig, describe
from siliang.records import Record
from siliang.run_folder import read_config
from siliang.safety.safe_json import dump_json
from siliang.safety.safe_yaml import dump_yaml, parse_yaml
from siliang.secrets import HIDDEN, redacted, redacted_part, shortened, without_secrets
from siliang.terminal import StreamedText

ABC = "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xY"  # 32 letters and digits
OWN = """correct "horse"<b>'s & 100% battery"""  # a password that every encoding changes
# A token of each kind; the secret part of what it stands in.
TOKENS = {
    "hugging face": f"hf_{ABC}ab",
    "hugging face, an organization": f"api_org_{ABC}ab",
    "openai": f"sk-{ABC}{ABC}",
    "openai, a project": f"sk-proj-{ABC}_-{ABC}",
    "anthropic": f"sk-ant-api03-{ABC}-{ABC}_AA",
    "google": f"AIza{ABC}abc",
    "google, a session": f"ya29.a0Af_{ABC}",
    "amazon": "AKIAQ3EGRT5XYZ7ABCDE",
    "amazon, a session": "ASIAQ3EGRT5XYZ7ABCDE",
    "github": f"ghp_{ABC}abcd",
    "github, an app": f"ghs_{ABC}abcd",
    "github, fine-grained": f"github_pat_11{ABC[:20]}_{ABC}",
    "gitlab": f"glpat-{ABC[:20]}",
    "slack": f"xoxb-123456789012-1234567890123-{ABC[:24]}",
    "discord": f"MTIzNDU2Nzg5MDEyMzQ1Njc4.GaBcDe.{ABC}",
    "telegram": f"1234567890:AAF{ABC}",
    "stripe": f"sk_live_{ABC[:24]}",
    "stripe, restricted": f"rk_live_{ABC[:24]}",
    "stripe, a webhook": f"whsec_{ABC}",
    "sendgrid": f"SG.{ABC[:22]}.{ABC}",
    "jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.{ABC}",
}
IN_TEXT = {
    "https://{}@host.example/x": f"user:{ABC[:12]}",
    "https:/user:{}@host.example/x": ABC[:12],  # as a path has it
    "git+https://{}@host.example/x": ABC[:20],
    "https://host.example/x?token={}&y=1": ABC[:12],
    "https://host.example/x?y=1&api_key={}": ABC[:12],
    "https://host.example/x?y=1&access_token={}": ABC[:12],
    "https://host.example/x?X-Amz-Expires=1&X-Amz-Signature={}": ABC[:12],
    "https://x.blob.core.windows.net/c?sv=2024&sig={}&se=2": f"{ABC}%2Fa%3D",
    "DefaultEndpointsProtocol=https;AccountKey={};x": f"{ABC}a/b+c==",
    "https://hooks.slack.com/services/{}": f"T0123/B0123/{ABC[:24]}",
    "https://discord.com/api/webhooks/{}": f"123456789012345678/{ABC}",
    "Authorization: Bearer {}": ABC[:16],
    "Authorization: Basic {}": "dXNlcjpwYXNzd29yZA==",
    "aws_secret_access_key = {}": f"{ABC}/aB3+xyz",
    'password: "{}"': ABC[:12],
    '{{"api_key": "{}"}}': ABC[:12],
    "{}": "-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/=\nIBAAK\n-----END RSA PRIVATE KEY-----",
}
ENCODINGS = {
    "plain": str,
    "repr": repr,
    "json": json.dumps,
    "html": html.escape,
    "percent": lambda text: quote(text, safe=""),
    "shell": shlex.quote,
    "behind a line's end": lambda text: repr(f"x\n{text}"),
    "in a path": lambda text: f"/data/{text}/x.jsonl",
    "in a name": lambda text: f"run_{text}",
}


def forms(secret: str) -> set[str]:
    """A secret as it must not be found: in its encodings, and its beginning alone."""
    whole = {encode(secret).strip("'\"") for encode in (str, repr, json.dumps, html.escape, shlex.quote)}
    return whole | {quote(secret), quote(secret, safe=""), secret[:12], html.escape(secret[:12]), quote(secret[:12])}


# ---- one text ----


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_by_their_shape(kind: str, encoding: str) -> None:
    hidden = without_secrets(f"see {ENCODINGS[encoding](TOKENS[kind])} there")
    assert HIDDEN in hidden and TOKENS[kind][:12] not in hidden and ABC[:8] not in hidden
    assert hidden.startswith("see ") and hidden.endswith(" there")


@pytest.mark.parametrize("where", IN_TEXT)
def test_secrets_by_what_stands_around_them(where: str) -> None:
    secret = IN_TEXT[where]
    for encode in (str, repr, json.dumps, html.escape):
        hidden = without_secrets(encode(f"x {where.format(secret)} y"))
        assert HIDDEN in hidden and secret[5:12] not in hidden, hidden
    assert without_secrets(where.format(secret)) in (where.format(HIDDEN), f"https:/{HIDDEN}@host.example/x")


@pytest.mark.parametrize(
    "name", ["MY_API_KEY", "WANDB_API_KEY", "DB_PASSWORD", "AZURE_OPENAI_KEY", "X_SECRET", "hf_token"]
)
def test_values_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for secret in (OWN, "0123456789abcdef0123456789abcdef01234567", "pass\nword\twith ends"):
        monkeypatch.setenv(name, secret)
        for encode in ENCODINGS.values():
            hidden = without_secrets(encode(f"<{secret}>"))
            assert HIDDEN in hidden and not any(form in hidden for form in forms(secret)), hidden
    monkeypatch.setenv("PLACE_URL", "postgres://user:long-password@host/db")
    assert without_secrets("the long-password is") == f"the {HIDDEN} is"


@pytest.mark.parametrize(
    "text",
    [
        '{"model": "hf_tiny", "sha256": "9f86d081884c7d659a2feaa0c55ad015", "url": "https://huggingface.co/a/b"}',
        "task-classification-of-something-long and a risk-assessment-of-every-kind",
        "the basic training of bearer instruments",
        "pad_token: [PAD], eos_token = </s>, tokens: 12345678, token 5",
        "the password: at least eight letters",
        "data.separator = ';', step 3/10, 12:34:56, a?b=c&d=e",
        "git@host.example:a/b ssh://git@host.example/a",
        "C:\\users\\me\\data.csv, D:/x/y, ../checkpoint-40",
        "sk-learn, pk-1, rk-2, glad-handed, api_organisation",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_numbers_and_paths_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIN_PASSWORD", "12345678")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))  # a place, and no secret
    values = {"bytes": 91234567890, "x": 0.12345678, "said": "12345678", "more": "9123456780", "at": str(tmp_path)}
    hidden = values | {"said": HIDDEN}
    assert redacted(values) == hidden
    assert json.loads(dump_json(values)) == hidden and parse_yaml(dump_yaml(values)) == hidden


def test_keys_are_hidden_and_stay_apart() -> None:
    first, second = TOKENS["github"], TOKENS["gitlab"]
    assert redacted({first: 1, second: {"password": "short"}}) == {HIDDEN: 1, f"{HIDDEN} 2": {"password": HIDDEN}}


@pytest.mark.parametrize("kind", TOKENS)
def test_nothing_is_cut_before_it_is_hidden(kind: str) -> None:
    token = TOKENS[kind]
    text = f"the token is {token}, and so on"
    for most in range(len(text)):
        assert token[:6] not in shortened(text, most)
        assert token[:6] not in redacted_part(text, 0, most) and token[-6:] not in redacted_part(text, most)
    assert redacted_part(text, 0) == f"the token is {HIDDEN}, and so on" and redacted_part(text, len(text) - 2) == "on"


def test_messages_are_cut_by_one_function() -> None:
    """`{text[:80]}` and `{text!r:.80}` would leave the first part of a token: `shortened` hides it first."""
    source = Path(siliang.__file__).parent
    found = []
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Subscript):
                cut, of = node.value.slice, ast.unparse(node.value.value)
                most = cut.upper if isinstance(cut, ast.Slice) else None
                fixed = isinstance(most, ast.Constant) or (isinstance(most, ast.Name) and most.id.isupper())
                if fixed and not re.search("sha256|digest", of):
                    found.append(f"{path.relative_to(source)}:{node.lineno}: {ast.unparse(node.value)}")
            if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
                by_format = re.fullmatch(r"f'\.\d+'", ast.unparse(node.format_spec))
                found += [f"{path.relative_to(source)}:{node.lineno}: {ast.unparse(node)}"] if by_format else []
    assert not found  # a digest's first digits may be shown


@pytest.mark.parametrize("kind", TOKENS)
def test_secrets_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", OWN)
    text = f"说 {TOKENS[kind]}说 then {OWN}, and https://u:{ABC[:9]}@h Bearer {ABC[:16]} and the end {TOKENS[kind]}"
    for size in (1, 3, 7, 40):
        pieces = StreamedText()
        said = [pieces.add(text[i : i + size]) for i in range(0, len(text), size)] + [pieces.end()]
        assert "".join(said) == without_secrets(text)
    assert sum(bool(piece) for piece in said) > 2  # it is not all held back


# ---- every command ----


@pytest.fixture(scope="module")
def secrets() -> Iterator[dict[str, str]]:
    """What must be found nowhere, by what it is; one of them in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_PASSWORD", OWN)
        yield TOKENS | {"own": OWN} | IN_TEXT


def planted(secrets: dict[str, str]) -> list[str]:
    """What is put somewhere: tokens, and texts around the other secrets."""
    return [kind.format(secret) if kind in IN_TEXT else secret for kind, secret in secrets.items()]


class Watched:
    """A folder with everything that stands in it, and what commands print."""

    def __init__(self, folder: Path, secrets: dict[str, str]) -> None:
        self.folder, self.forms = folder, {form: kind for kind, secret in secrets.items() for form in forms(secret)}

    def run(self, *words: object, code: int | None = 0, stdin: bytes = b"", terminal: bool = False) -> Ended:
        ended = run(*words, stdin=stdin, terminal=terminal)
        assert code is None or ended.code == code, (words, ended)
        assert "a bug in siliang" not in ended.err, ended.err
        self.look(ended.out, f"printed by {words}")
        self.look(ended.err, f"said by {words}")
        return ended

    def look(self, text: str, where: str) -> None:
        for form, kind in self.forms.items():
            assert form not in text, (where, kind, text[max(0, text.find(form) - 80) :][:200])

    def look_at_files(self, *but: Path) -> None:
        for path in self.folder.rglob("*"):
            if path.is_file() and not any(path.is_relative_to(other) for other in but):
                self.look(path.read_bytes().decode("utf-8", "replace"), str(path))


@pytest.fixture(scope="module")
def places(secrets: dict[str, str], model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data and settings in whose names, columns, labels and texts the secrets stand."""
    folder = tmp_path_factory.mktemp("places") / secrets["hugging face"]
    for model in ("bert", "llama"):
        shutil.copytree(model_folders[model], folder / secrets["github"] / model)
    kinds = planted(secrets)
    labels, words = (f"{secrets['gitlab']}", "other"), " ".join(WORDS[:30])
    rows = [{"text": f"{words} {kinds[i % len(kinds)]} {words}", "label": labels[i % 2]} for i in range(60)]
    write_jsonl(folder / f"{secrets['openai']}.jsonl", rows)
    talks = [
        {"instruction": f"say {words} {kinds[i % len(kinds)]}", "output": f"{words} {kinds[i % len(kinds)]}"}
        for i in range(40)
    ]
    (folder / "talks").mkdir()
    write_jsonl(folder / "talks" / f"{OWN}.jsonl", talks)
    write_jsonl(folder / "bad.jsonl", [*rows, {"text": [secrets["slack"]], secrets["stripe"]: secrets["jwt"]}])
    write_jsonl(folder / "columns.jsonl", [{secrets["slack"]: row["text"], "label": row["label"]} for row in rows])
    return folder


def test_a_classifier_with_secrets_everywhere(places: Path, secrets: dict[str, str], tmp_path: Path) -> None:
    watched = Watched(tmp_path, secrets)
    run_folder, data = tmp_path / "run", places / f"{secrets['openai']}.jsonl"
    flags = ["--model", places / secrets["github"] / "bert", "--data", data, "--task", "seq_cls"]
    sets = ["train.max_steps=3", "data.max_length=64", "train.save_every=2"]
    given = [word for setting in (*sets, "accept=[SL002]") for word in ("--set", setting)]
    for terminal in (False, True):
        watched.run("check", *flags, *given, terminal=terminal, code=None)
    watched.run("check", *flags, *given, "--json", code=None)
    there = ("--memory", "8GB", "--device", "cpu")
    watched.run("plan", *flags, *given, *there, "--method", "lora", "--write", tmp_path / "plan.yaml")
    watched.run("plan", tmp_path / "plan.yaml", *there, "--json")
    watched.run("train", *flags, *given, "--output", run_folder)
    watched.run("train", "--resume", run_folder, "--set", "train.max_steps=4")  # its data is found again
    assert Record.read(run_folder).config["data"]["train"].endswith(f"{HIDDEN}/{HIDDEN}.jsonl")
    assert read_config(run_folder).data.train == str(data)
    text = f"the film {secrets['anthropic']} and {OWN}"
    for words in ((), ("--json",)):
        watched.run("predict", run_folder, text, *words)
        watched.run("predict", run_folder, data, *words, terminal=True)
    watched.run("chat", run_folder, stdin=text.encode())
    watched.run("report", run_folder, "--output", tmp_path / "page.html")
    watched.run("eval", run_folder, code=None)
    watched.run("eval", run_folder, "--data", places / "bad.jsonl", code=2)
    watched.run("merge", run_folder, "--output", tmp_path / "merged", code=None)
    watched.run("train", *flags, *given, "--method", "full", "--output", tmp_path / "full")
    columns = ["--set", f"data.columns.text={secrets['slack']}"]
    watched.run("train", *flags[:3], places / "columns.jsonl", *flags[4:], *given, *columns, "--output", tmp_path / "c")
    watched.run("check", *flags[:3], places / "columns.jsonl", *flags[4:], *given, code=None)
    watched.run("check", *flags[:3], places / "bad.jsonl", *flags[4:], *given, code=None)
    watched.look_at_files()


def test_a_writer_with_secrets_everywhere(places: Path, secrets: dict[str, str], tmp_path: Path) -> None:
    watched = Watched(tmp_path, secrets)
    flags = [
        "--model",
        places / secrets["github"] / "llama",
        "--data",
        places / "talks" / f"{OWN}.jsonl",
        "--task",
        "causal_lm",
    ]
    given = ["--set", "train.max_steps=2", "--set", "accept=[SL002]", "--set", "data.max_length=128"]
    for terminal in (False, True):
        watched.run("check", *flags, *given, terminal=terminal, code=None)
    watched.run("train", *flags, *given, "--output", tmp_path / "run", terminal=True)
    for terminal in (False, True):
        watched.run("generate", tmp_path / "run", f"say {secrets['jwt']}", "--max-new-tokens", 3, terminal=terminal)
        watched.run("chat", tmp_path / "run", "--max-new-tokens", 3, stdin=OWN.encode(), terminal=terminal)
    watched.run("merge", tmp_path / "run", "--output", tmp_path / "merged")
    entry = f"[{{name: lora, label: '{secrets['google']}'}}, {{name: bitfit, label: b}}]"
    prompts = json.dumps([secrets["telegram"], f"x {OWN}"])
    compared = [*flags, "--set", f"methods={entry}", "--set", f"prompts={prompts}", "--seeds", 1, *given]
    watched.run("compare", *compared, "--output", tmp_path / "compared")
    watched.run("report", tmp_path / "compared", "--lang", "zh", terminal=True, code=None)
    watched.look_at_files()


def test_every_setting_and_flag(
    secrets: dict[str, str],
    model_folders: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What is wrong with a setting says what it is: with any secret in any of them."""
    watched = Watched(tmp_path, secrets)
    kinds, places_of_settings = planted(secrets), tmp_path_factory.mktemp("settings")
    names = [name for name, *_ in describe(RunConfig)] + [
        "method.target_modules",
        "method.r",
        "method.x",
        "unknown",
        "data.unknown",
    ]
    flags = ("--model", model_folders["bert"], "--data", tmp_path / "data.csv", "--task", "seq_cls")
    (tmp_path / "data.csv").write_text("text,label\n" + "the film,a\nthe story,b\n" * 10)
    for i, name in enumerate(names):
        secret = kinds[i % len(kinds)]
        given = (secret, json.dumps([secret, 3]), json.dumps({secret: secret}), f"x{'y' * 190} {secret}")[i % 4]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("siliang.check.gather_input", _stop)
            watched.run("check", *flags, "--set", f"{name}={given}", code=2)
    commands = ("check", "train", "plan", "compare", "report", "eval", "predict", "generate", "chat", "merge", "x")
    for i, secret in enumerate(kinds):
        command = commands[i % len(commands)]
        watched.run(command, secret, code=2)
        watched.run(command, f"--{secret}", code=2)
        watched.run(command, "--output", f"{'y' * 90}-{secret}", secret, secret, code=2)
    for secret in kinds:
        watched.run("explain", secret, code=2)
        watched.run("eval", tmp_path, "--debug", "--base", secret, code=2)
        settings = places_of_settings / "run.yaml"
        settings.write_text(dump_yaml({"model": "x", "task": "seq_cls"}) + json.dumps({"a": secret})[1:-1])
        watched.run("train", settings, code=2)


def _stop(*_: object) -> None:
    from siliang.types import DataError

    raise DataError("far enough")
