"""Keeps passwords and access tokens out of all output.

Secrets are texts with the shapes of known tokens, and the values of environment variables whose names indicate a
secret. Values are redacted before they are encoded or cut: `redacted` before writing a file, `without_secrets` before
printing, `shortened`, `short_repr` and `redacted_part` before cutting.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"
LONGEST = 4096  # characters searched for secrets beyond the end of a cut text
LEAST = 8  # characters of a secret of the environment: shorter ones would hide parts of ordinary words

# The place where a token may begin: not after a letter or digit, except for an escape such as \n, \x1b or %20.
_START = r"(?:(?<![A-Za-z0-9])|(?<=\\[abfnrtv0])|(?<=\\x[0-9A-Fa-f]{2})|(?<=\\u[0-9A-Fa-f]{4})|(?<=%[0-9A-Fa-f]{2}))"
_SECRET_WORDS = (
    r"(?:passw(?:or)?d|passphrase|pwd|secret|client[_-]?secret|api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key"
    r"|account[_-]?key|shared[_-]?access[_-]?key|auth[_-]?key|signing[_-]?key|encryption[_-]?key"
    r"|(?:access|auth|api|hub|hf|bearer|refresh|secret|session|user|private|deploy|id|bot|x[_-]?amz[_-]?security)"
    r"[_-]?token)"
)

# For each shape: hints, one of which is in the lower-case text if the shape is, and the shape. Its group is the secret.
_SHAPES: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (tuple(hints.split()), re.compile(_START + shape if anchored else shape))
    for hints, anchored, shape in (
        # ---- by their beginning ----
        ("hf_ api_org_", False, r"(?:hf_(?:oauth_|jwt_)?|api_org_)[A-Za-z0-9]{16,}"),  # Hugging Face
        ("sk-", False, r"sk-(?:ant|proj|or|svcacct|admin)-[A-Za-z0-9_-]{16,}"),
        ("sk- pk- rk-", True, r"(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}"),  # OpenAI, Anthropic, OpenRouter, DeepSeek
        ("sk_ pk_ rk_", True, r"(?:sk|pk|rk)_(?:live|test|prod)_[A-Za-z0-9_]{8,}"),  # Stripe
        ("whsec_", False, r"whsec_[A-Za-z0-9+/=]{16,}"),
        ("gh", False, r"gh[pousr]_[A-Za-z0-9]{20,}"),  # GitHub
        ("github_pat_", False, r"github_pat_\w{20,}"),
        ("gl", False, r"gl(?:pat|dt|rt|rtr|cbt|ptt|ft|imt|agent|soat|ffct)-[A-Za-z0-9_.-]{16,}"),  # GitLab
        ("aiza", False, r"AIza[A-Za-z0-9_-]{30,}"),  # Google
        ("ya29.", False, r"ya29\.[A-Za-z0-9._-]{10,}"),
        ("gocspx-", False, r"GOCSPX-[A-Za-z0-9_-]{16,}"),
        ("1//0", True, r"1//0[A-Za-z0-9_-]{20,}"),
        ("akia asia abia acca", False, r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])"),  # Amazon
        ("xox xapp-", False, r"(?:xox[a-z](?:\.xox[a-z])?|xapp)-[A-Za-z0-9-]{10,}"),  # Slack
        ("hooks.slack.com", False, r"hooks\.slack\.com/(?:services|workflows)/([A-Za-z0-9/_-]{12,})"),
        ("/webhooks/", False, r"/api/webhooks/(\d{10,}/[A-Za-z0-9_-]{20,})"),  # Discord
        (".", True, r"[MNO][A-Za-z0-9_-]{22,27}\.[A-Za-z0-9_-]{6,7}\.[A-Za-z0-9_-]{27,}"),
        ("mfa.", True, r"mfa\.[A-Za-z0-9_-]{20,}"),
        (": %3a", False, r"(?<!\d)\d{8,10}(?::|%3[Aa])[A-Za-z0-9_-]{34,36}(?![A-Za-z0-9_-])"),  # Telegram
        ("sg.", True, r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),  # SendGrid
        ("npm_ gsk_ r8_ ntn_ figd_ sbp_ hvs. pplx- xai- nvapi- dapi dop_v1_ doo_v1_ pypi- wandb_v1_ pul- pmak-", True,
         r"(?:npm_|gsk_|r8_|ntn_|figd_|sbp_|hvs\.|pplx-|xai-|nvapi-|dapi|do[opr]_v1_|pypi-|wandb_v1_|pul-|PMAK-)"
         r"[A-Za-z0-9_-]{24,}"),
        ("lin_api_ shpat_ shpss_ lsv2_ age-secret-key-", True,
         r"(?:lin_api_|shp(?:at|ss|ca|pa)_|lsv2_(?:pt|sk)_|AGE-SECRET-KEY-)[A-Za-z0-9_]{16,}"),
        ("eyj", False, r"eyJ[A-Za-z0-9_-]{8,}(?:(?:\.|%2[Ee])[A-Za-z0-9_-]*){1,4}"),  # JSON web tokens
        # ---- by the text around them ----
        ("-----begin", False,
         r"-----BEGIN(?:[A-Z0-9 +]|%20)*PRIVATE(?: |%20|\+)KEY-----(?:(?!-----)[\s\S]){0,20000}"
         r"(?:-----END(?:[A-Z0-9 +]|%20)*PRIVATE(?: |%20|\+)KEY-----)?"),
        # https://user:password@host and https://token@host; in a path they have one slash
        (":/", False, r":/{1,3}([^\s/:@\"'<>]*:[^\s/\"'<>]+)@"),
        (":/", False, r":/{1,3}([^\s/:@\"'<>]{16,})@"),
        ("%3a", False, r"(?i)%3A(?:/{1,2}|%2F%2F|%2F)([^\s/\"'<>&]+)%40"),
        ("= %3d", False,  # of a URL's query; after &amp; in HTML
         r"(?i)(?:[?&;#,]|%3F|%26)(?:[\w.-]*[_.-])?"
         r"(?:token|secret|password|passwd|pwd|apikey|key|sig|signature|credential|auth|authorization"
         r"|accesskeyid|accesstoken|authtoken)(?:=|%3D)((?:(?!%26)[^\s&#\"'<>;\\])+)"),
        ("accountkey sharedaccess", False,  # Azure
         r"(?i)(?:AccountKey|SharedAccessKey|SharedAccessSignature)\s*=\s*([^\s;\"'<>]{8,})"),
        ("bearer", False, r"(?i)bearer(?:\s+|%20|\+)(?=\S*\d|\S{20})([A-Za-z0-9._~+/=%-]{8,})"),
        ("basic", False, r"[Bb]asic(?:\s+|%20)(?=\S*[\d=]|[A-Za-z]*[a-z][A-Z])([A-Za-z0-9+/=%]{8,})"),
        ("authorization", False, r"(?i)authorization[\"'\\]*\s*[:=]\s*[\"'\\]*(?:\w+\s+)?([^\s\"',\\]{6,})"),
        # password = "..." and api_key: ..., of settings files, also with the quotes of JSON or a shell
        ("pass pwd secret key token", False,
         rf"(?i)(?<![A-Za-z0-9]){_SECRET_WORDS}(?:[\"'\\]|&quot;|&#3[49];)*\s*[:=]\s*(?:[\"'\\]|&quot;|&#3[49];)*"
         r"(?![\"'{\[(])(?=[^\s\"']*[\d+/=])([^\s\"',;&\\<>)\]}]{8,})"),
        ("aws_secret_access_key secretaccesskey", False,
         r"(?i)(?:aws_secret_access_key|secretaccesskey)[\"'\\]*(?:\s|%20)*(?:[:=]|%3D|%3A)(?:\s|%20)*"
         r"[\"'\\]*([A-Za-z0-9/+=%]{16,})"),
    )
)  # fmt: skip

# The words in an environment variable's name that indicate a secret, unless the end of the name excludes it.
_NAMES = re.compile(
    r"(?:^|_)(?:\w*TOKEN|\w*SECRET|\w*PASSWORD|PASSWD|PASSPHRASE|PASS|\w*API_?KEY|\w*ACCESS_?KEY|KEY|APIKEY"
    r"|CREDENTIALS?|AUTH|AUTHORIZATION|CONNECTION_STRING|COOKIE|DSN|PAT)(?:_|$)",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(r"_(?:PATH|FILE|DIR|HOME|SOCK|URL|HOST|PORT|USER|NAME|TYPE|TTL|TIMEOUT)$", re.IGNORECASE)
_USERINFO = re.compile(r":/{1,3}[^\s/:@]*:([^\s/]+)@")
_SECRET_KEY = re.compile(rf"(?i)(?:^|[_.-]){_SECRET_WORDS}$")


def redacted(value: Any) -> Any:
    """A structure with all its texts and keys `without_secrets`. Numbers are not changed; in an encoded text, a
    password of digits could match part of a number."""
    return _redacted(value, environment_secrets())


def without_secrets(text: str) -> str:
    """The text with its secrets hidden: texts with the shapes of tokens, and the secrets of the environment."""
    return _hidden(text, environment_secrets())


def shortened(value: object, most: int, more: str = "") -> str:
    """The first `most` characters of a text, followed by `more` if it is longer. Secrets are hidden before the cut,
    since the first half of a token does not look like one."""
    full = value if isinstance(value, str) else str(value)
    text = without_secrets(full[: most + LONGEST])
    return text if len(text) <= most else f"{text[:most]}{more}"


def short_repr(value: object, most: int = 80) -> str:
    """The repr of a value for errors, without secrets, and shortened."""
    return shortened(repr(redacted(value)), most, " ...")


def redacted_part(text: str, start: int, end: int | None = None) -> str:
    """`text[start:end]` with all parts of the whole text's secrets hidden."""
    end = len(text) if end is None else min(end, len(text))
    pieces, at = [], start
    for first, last in secret_places(text):
        if last <= at or first >= end:
            continue
        pieces += [text[at : max(first, at)], HIDDEN]
        at = last
    return "".join([*pieces, text[at:end]])


def secret_places(text: str) -> list[tuple[int, int]]:
    """The positions of secrets in a text: (first character, the one after the last), in order, without overlaps."""
    return _places(text, environment_secrets())


def environment_secrets() -> tuple[str, ...]:
    """The secrets of this process's environment, in all their escaped forms, the longest first."""
    return _secrets_among(tuple(os.environ.items()))


@lru_cache(4)
def _secrets_among(variables: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    secrets: set[str] = set()
    for name, value in variables:
        if _NAMES.search(name) and not _NO_SECRET.search(name) and not _is_path(value):
            secrets.add(value.strip())
        secrets.update(m[1] for m in _USERINFO.finditer(value))
    return tuple(sorted({form for secret in secrets if len(secret) >= LEAST for form in _forms(secret)}, key=_longest))


def _redacted(value: object, own: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _hidden(value, own)
    if isinstance(value, dict):
        redacted_values: dict[object, object] = {}
        for key, inner in value.items():
            name = _hidden(key, own) if isinstance(key, str) else key
            shown, n = name, 2
            while shown in redacted_values:  # two keys that differ only in their secrets
                shown, n = f"{name} {n}", n + 1
            secret = isinstance(key, str) and isinstance(inner, str) and inner and _SECRET_KEY.search(key)
            redacted_values[shown] = HIDDEN if secret else _redacted(inner, own)
        return redacted_values
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(inner, own) for inner in value]
    return value


def _hidden(text: str, own: tuple[str, ...]) -> str:
    for first, last in reversed(_places(text, own)):
        text = text[:first] + HIDDEN + text[last:]
    return text


def _places(text: str, own: tuple[str, ...]) -> list[tuple[int, int]]:
    if len(text) < LEAST:
        return []
    places: list[tuple[int, int]] = []
    for secret in own:
        at = text.find(secret)
        while at >= 0:
            if not _within_a_number(text, at, secret):
                places.append((at, at + len(secret)))
            at = text.find(secret, at + len(secret))
    low = text.lower()
    for hints, shape in _SHAPES:
        if any(hint in low for hint in hints):
            places += [m.span(1 if m.re.groups else 0) for m in shape.finditer(text)]
    return _joined(sorted(place for place in places if text[slice(*place)] not in ("", HIDDEN)))


def _joined(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, last in places:
        if joined and first < joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return joined


def _within_a_number(text: str, at: int, secret: str) -> bool:
    """Whether a password of digits is part of a longer number, and so not the password."""
    around = text[at - 1 : at] + text[at + len(secret) : at + len(secret) + 1]
    return secret.isdecimal() and any(c.isdecimal() for c in around)


def _is_path(value: str) -> bool:
    return value.startswith(("/", "./", "~/")) and os.path.exists(os.path.expanduser(value))  # noqa: PTH110, PTH111


def _longest(text: str) -> tuple[int, str]:
    return -len(text), text


def _forms(secret: str) -> set[str]:
    """A secret as it is, and with the escapes of Python, JSON, HTML, URLs and shells."""
    forms = {secret, *(line.strip() for line in secret.splitlines())}
    escaped = repr(secret)[1:-1]
    forms |= {escaped, repr(secret + "'")[1:-2], repr(secret + "\"'")[1:-4], ascii(secret)[1:-1]}
    forms |= {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    forms |= {html.escape(secret), html.escape(secret).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")}
    forms |= {quote(secret), quote(secret, safe=""), quote_plus(secret), quote(secret, safe="").lower()}
    forms |= {shlex.quote(secret).strip("'")}
    return {form for form in forms if len(form) >= LEAST}
