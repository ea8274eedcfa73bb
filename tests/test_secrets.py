"""Tokens and passwords reach nothing that is written and nothing that is printed, whole, in half or encoded."""

from __future__ import annotations

import html
import json
import shlex
from pathlib import Path
from urllib.parse import quote

import pytest

from siliang.safe_json import dump_json
from siliang.safe_yaml import dump_yaml, parse_yaml
from siliang.secrets import HIDDEN, part, redacted, shortened, without_secrets
from siliang.terminal import Pieces

ABC = "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xY"  # 32 letters and digits
OWN = """correct "horse"<b>'s & 100% bat/tery"""  # a password that every encoding changes
# A token of each kind; the secret part of what it stands in.
TOKENS = {
    "hugging face": f"hf_{ABC}ab",
    "hugging face, an organisation": f"api_org_{ABC}ab",
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
    "git+https://{}@host.example/x": ABC[:20],
    "https://host.example/x?token={}&y=1": ABC[:12],
    "https://host.example/x?y=1&api_key={}": ABC[:12],
    "https://host.example/x?y=1&access_token={}#z": ABC[:12],
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
    assert without_secrets(where.format(secret)) == where.format(HIDDEN)


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
        assert token[:6] not in part(text, 0, most) and token[-6:] not in part(text, most)
    assert part(text, 0) == f"the token is {HIDDEN}, and so on" and part(text, len(text) - 2) == "on"


@pytest.mark.parametrize("kind", TOKENS)
def test_secrets_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", OWN)
    text = f"说 {TOKENS[kind]}说 then {OWN}, and https://u:{ABC[:9]}@h Bearer {ABC[:16]} and the end {TOKENS[kind]}"
    for size in (1, 3, 7, 40):
        pieces = Pieces()
        said = [pieces.add(text[i : i + size]) for i in range(0, len(text), size)] + [pieces.end()]
        assert "".join(said) == without_secrets(text)
    assert sum(bool(piece) for piece in said) > 2  # it is not all held back
