"""What strangers have written runs in a process with limits of the system: templates, patterns of module names."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make, word_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from siliang import IA3Config, LoraConfig, get_peft_model
from siliang.data.chat import ChatTemplate
from siliang.data.encode import Encoder
from siliang.data.jinja import as_jinja
from siliang.data.messages import Conversation, Message
from siliang.data.templates import TEMPLATES
from siliang.language import local
from siliang.safety import limits
from siliang.safety.limited.templates import CACHED_TEMPLATES
from siliang.safety.limits import LimitedProcess, LimitError, RefusedError
from siliang.types import DataError, ModelError, TargetError

TALK = Conversation((Message("user", "a"), Message("assistant", "b")))


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    monkeypatch.setattr(limits, "PATTERN_SECONDS", 0.5)


def pieces(template: str) -> Any:
    tokenizer: Any = word_tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(Encoder(tokenizer)).entries([TALK])[0][0].pieces


NESTED = (
    "{% set ns = namespace(a=[], b=[]) %}"
    "{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
)
LOOPS = "".join(f"{{% for {x} in range(9999) %}}" for x in "abc") + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "why"),
    [
        # Python sees nothing of an alarm within each of the first two
        (NESTED, "it runs for too long"),
        ("{{ 9 ** (9 ** 9) }}", "it runs for too long"),
        ("{% set x = 'a' * 10 ** 6 %}{{ x | replace('', x) | length }}", "(too long|memory)"),
        (LOOPS, "it runs for too long"),
        ("{{ 'a' * 10 ** 11 }}", "memory"),
        ("{% for i in range(99999) %}{% set x = 'a' * 10 ** 5 %}{{ x }}{% endfor %}", "it writes more than"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_templates_that_never_end_or_want_out(template: str, why: str, one_second: None) -> None:
    # what takes too much would take it for every other row too
    refused = DataError if why in ("unsafe", "underscore", "no loader") else ModelError
    with pytest.raises(refused, match=f"(refused by the|the model's) chat template.*: .*{why}"):
        pieces(template)
    # the next one has a fresh process
    assert "b" in "".join(
        p.text for p in pieces("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    )


def test_a_limit_is_said_in_both_languages() -> None:
    """Of the process: what a template writes, and what a tokenizer's rules would make."""
    with pytest.raises(ModelError) as caught:
        pieces("{% for i in range(999) %}{{ 'a' * 10 ** 5 }}{% endfor %}")
    assert "it writes more than" in caught.value.text and "输出超过" in local(caught.value.text, "zh")
    with pytest.raises(RefusedError) as refused:
        limits.check_tokenizer_rules('{"padding": {"strategy": {"Fixed": 9999999999}}}')
    assert str(refused.value).startswith("it pads texts to more than")
    assert "填充到超过" in local(refused.value.args[0], "zh")


def test_named_templates_without_one_for_conversations() -> None:
    tokenizer: Any = word_tokenizer()
    tokenizer.chat_template = {"other": "{{ messages }}"}
    with pytest.raises(ModelError, match=r"chat template cannot be used: .*\['other'\]"):
        ChatTemplate(Encoder(tokenizer)).entries([TALK])


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"([a-z_.0-9]+)+[A-Z]", "takes too long"),
        ("(?:a|b)?" * 200_000, "takes too (long|much)"),
        ("(" * 5000 + ")" * 5000, "not a regular expression"),
    ],
)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern", "feedforward_modules"]
)
def test_patterns_that_never_end(field: str, pattern: str, why: str, one_second: None) -> None:
    config: Any = {
        "target_modules": lambda: LoraConfig(target_modules=pattern),
        "exclude_modules": lambda: LoraConfig(exclude_modules=pattern),
        "rank_pattern": lambda: LoraConfig(rank_pattern={pattern: 4}),
        "layers_pattern": lambda: LoraConfig(layers_to_transform=[0], layers_pattern=pattern),
        "feedforward_modules": lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=pattern),
    }[field]()
    with pytest.raises(TargetError, match=f"{field}.* ({why})"):
        get_peft_model(make("llama"), config)


# ---- the same as transformers ----


def messages_of(talk: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in talk]


TALKS: list[tuple[list[dict[str, Any]], Any]] = [
    (messages_of([("system", "s é中\ud800"), ("user", "<b> 'q' & \"r\""), ("assistant", "x\n y ")]), None),
    (
        [
            {"role": "user", "content": "u"},
            {
                "role": "assistant",
                "content": "",
                "reasoning": "why",
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None, 2.5, True]}}}
                ],
            },
        ],
        [{"type": "function", "function": {"name": "f", "parameters": {"b": "é", "a": {}}}}],
    ),
]
WORDS: Any = word_tokenizer()
WRITTEN = {
    "all": "{{ messages }} {{ tools }} {{ documents }} {{ bos_token }} {{ add_generation_prompt }}",
    "json": "{{ messages | tojson }} {{ tools | tojson(indent=2) }}"
    "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
    "loops": "{%- for m in messages %}\n  {%- if loop.index > 1 %}{% break %}{% endif %}\n{{ m.content | trim }}\n"
    "{% endfor %}",
    "spaces": "  {% if true %}\n  a\n  {% endif %}\n b {{- ' c' }}  ",
    "answers": "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
    "macros": "{% macro f(x) %}[{{ x }}]{% endmacro %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ f(m.get('content')) }}{{ ns.n }}{% endfor %}"
    "{{ dict(a=1) }}{{ dict.fromkeys([1]) }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}|"
    "{{ m.name is defined }}{% endfor %}",
    "words": "{{ 'a b c' | wordwrap(2) }} {{ messages | pprint }} {{ 'x' | center(9) }} {{ [3, 1] | sort }}",
    "year": "{{ strftime_now('%Y-%m') }}",
    "named": as_jinja(TEMPLATES["chatml"], Encoder(WORDS)),
}


@pytest.mark.parametrize("talk", range(len(TALKS)))
@pytest.mark.parametrize("name", list(WRITTEN))
def test_the_text_is_that_of_transformers(name: str, talk: int) -> None:
    template, (messages, tools) = WRITTEN[name], TALKS[talk]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for prompt in (False, True):
        settings: dict[str, Any] = {"tools": tools, "chat_template": template, "add_generation_prompt": prompt, **names}
        texts, _ = render_jinja_template(conversations=[messages], **settings)
        marked, spans = render_jinja_template(conversations=[messages], return_assistant_tokens_mask=True, **settings)
        (text, nothing), (same, found) = (
            *limits.render(template, names, [(messages, tools, prompt, False)]),
            *limits.render(template, names, [(messages, tools, prompt, True)]),
        )
        assert [text, same, nothing] == [texts[0], marked[0], []]
        assert [tuple(span) for span in found] == spans[0]


def test_what_a_template_refuses_is_its_own_affair() -> None:
    template = "{% if messages[0].content == 'no' %}{{ raise_exception('not so') }}{% endif %}yes"
    jobs = [(messages_of([("user", text)]), None, False, False) for text in ("a", "no", "b")]
    assert limits.render(template, {}, jobs) == [("yes", []), "not so", ("yes", [])]
    with pytest.raises(RefusedError, match="Expected an expression"):
        limits.render("{% if %}", {}, jobs)


# ---- the process ----


@pytest.fixture
def process() -> Iterator[LimitedProcess]:
    found = LimitedProcess()
    yield found
    found.close()


def test_the_process_is_kept_and_holds_nothing_of_this_one(
    process: LimitedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    assert process.call("match", ["a+"], ["aa", "b"], True) == [[[], None]]
    assert process._process is not None
    pid = process._process.pid
    assert process.call("match", ["(", "b"], ["b"], False)[1] == [[]]
    assert process._process.pid == pid
    if sys.platform == "linux":
        about = Path(f"/proc/{pid}")
        assert b"correct-horse" not in (about / "environ").read_bytes()
        said = {line[:26].strip(): line[26:].split()[0] for line in (about / "limits").read_text().splitlines()}
        assert said["Max open files"] == said["Max file size"] == said["Max processes"] == "0"
        assert int(said["Max address space"]) < 3 * 2**30


def test_threads_share_the_process(process: LimitedProcess) -> None:
    answers: dict[int, Any] = {}

    def ask(i: int) -> None:
        answers[i] = [process.call("match", [f"{i}"], [f"{n}" for n in range(8)], True) for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert answers[i] == [[[[] if n == i else None for n in range(8)]]] * 20


def test_time_is_bounded_in_a_thread_as_well(process: LimitedProcess) -> None:
    found: list[BaseException] = []

    def ask() -> None:
        try:
            process.call("match", ["(a+)+b"], ["a" * 100], True, seconds=0.2)
        except LimitError as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert str(found[0]) == "it runs for too long"


@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of the system")
def test_no_alarm_and_no_limit_is_set_on_this_process(process: LimitedProcess) -> None:
    """An alarm that is left behind would raise anywhere."""
    import resource

    numbers = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE)
    before = [resource.getrlimit(number) for number in numbers], signal.getsignal(signal.SIGALRM)
    with pytest.raises(LimitError):
        process.call("match", ["(a+)+b"], ["a" * 100], True, seconds=0.2)
    assert ([resource.getrlimit(number) for number in numbers], signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_more_templates_than_the_process_keeps() -> None:
    job = ([{"role": "user", "content": "a"}], None, False, False)
    for _ in range(2):
        for i in range(CACHED_TEMPLATES + 2):
            assert limits.render(f"text {i}", {}, [job]) == [(f"text {i}", [])]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_one_of_its_own() -> None:
    code = """
import os, sys
from siliang.language import local
from siliang.safety import limits
limits.match(["(a)"], ["a"], whole=True)
first = limits._PROCESS._process.pid
child = os.fork()
if not child:
    assert limits.match(["(a)"], ["a"], whole=True) == [[("a",)]]
    os._exit(0 if limits._PROCESS._process.pid != first else 3)
assert os.waitpid(child, 0)[1] == 0
assert limits.match(["(b)"], ["a"], whole=True) == [[None]] and limits._PROCESS._process.pid == first
print(first)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not alive(int(done.stdout))


def alive(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_it_ends_with_the_process_that_asks() -> None:
    code = "import time; from siliang.safety import limits; limits.match(['(a)'], ['a'], whole=True)\n"
    code += "print(limits._PROCESS._process.pid, flush=True); time.sleep(600)"
    asks = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert asks.stdout is not None
    pid = int(asks.stdout.readline())
    assert alive_now(pid)
    asks.send_signal(signal.SIGKILL)
    asks.wait()
    asks.stdout.close()
    assert not alive(pid)


def alive_now(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_leaves_no_answer_behind(process: LimitedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    process.call("match", ["a"], ["a"], True)
    received = limits._receive

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.setattr(limits, "_receive", received)
        raise KeyboardInterrupt

    monkeypatch.setattr(limits, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.call("match", ["b"], ["a"], True)
    assert process.call("match", ["a"], ["a"], True) == [[[]]]
