"""Templates as Jinja: for training, and for the program that serves the model, which writes the same text."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping

from siliang.data.encode import Encoder
from siliang.data.templates import BORDER, FieldTemplate, Template, find_template, template_for
from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer

WITHOUT_TEMPLATE = ("text", "prepared")  # layouts
Arguments = Mapping[str, bool | int | float | str]


def need_no_template(layouts: Collection[str]) -> bool:
    """Whether no rows of these layouts are written in a template."""
    return all(layout in WITHOUT_TEMPLATE for layout in layouts)


def with_chat_template(
    tokenizer: Tokenizer, template: str, layouts: Collection[str], arguments: Arguments | None = None
) -> tuple[Tokenizer, str]:
    """The tokenizer to serve a model with that was trained in a template.

    Args:
        template: `data.template` of the training.
        layouts: Of its rows.
        arguments: `data.template_arguments` of the training: they become the defaults.

    Returns:
        A tokenizer whose chat template writes what training wrote, the one given where it does so already; and in a
        sentence what it is, and what differs.
    """
    if need_no_template(layouts):
        return tokenizer, ""
    named, given = find_template(template_for(template, tokenizer.chat_template)), dict(arguments or {})
    with_given = f", with {json.dumps(given, ensure_ascii=False)}" if given else ""
    if named is None:
        served, own = tokenizer, tokenizer.chat_template
        if given and own:
            served = copy.deepcopy(tokenizer)
            texts = {name: defaults(given) + text for name, text in own.items()} if isinstance(own, dict) else None
            served.chat_template = texts or defaults(given) + str(own)
        return served, Bilingual(
            f"the tokenizer's own, with which it was trained{with_given}",
            f"分词器自己的模板，与训练时相同{with_given.replace(', with ', '，参数为 ')}",
        )
    served = copy.deepcopy(tokenizer)
    served.chat_template = as_jinja(named, Encoder(tokenizer), given, served=True)
    apart = Bilingual("", "")
    if isinstance(named, FieldTemplate) and named.user_with_input:
        apart = Bilingual("; an instruction and its input go into one question there", "；其中指令和输入合为一个问题")
    name = named.name
    return served, Bilingual(
        f"{name}, with which it was trained{with_given}{apart}",
        f"{name}，与训练时相同{with_given.replace(', with ', '，参数为 ')}{apart.zh}",
    )


def as_jinja(template: Template, encoder: Encoder, arguments: Arguments | None = None, *, served: bool = False) -> str:
    """A template as Jinja, for this tokenizer.

    Args:
        arguments: Values of the template's variables, where the caller gives none.
        served: For other programs, which tokenize the whole text: where this tokenizer makes the space in front of an
            answer part of the answer's first token, the generation prompt ends before that space.
    """
    head = defaults(arguments or {})
    if isinstance(template, FieldTemplate):
        return head + _of_fields(template, encoder, served=served)
    quoted, text = _Quoted(encoder), template.text
    if template.end and encoder.marker(template.end) is None:
        text = text.replace(template.end, quoted.eos)
    if encoder.tokenizer.eos_token is None and quoted.eos:
        head += f"{{%- set eos_token = {quoted('{eos}')} -%}}"
    return head + text


def defaults(arguments: Arguments) -> str:
    """Jinja that gives variables their values, unless the caller does."""
    return "".join(
        f"{{%- set {name} = {name} if {name} is defined else {json.dumps(value)} -%}}"
        for name, value in arguments.items()
    )


def _of_fields(template: FieldTemplate, encoder: Encoder, *, served: bool) -> str:
    t, q = template, _Quoted(encoder)
    prompt = t.assistant.removesuffix(" ") if served and encoder.joins_space else t.assistant
    if t.system_inside:
        system, inside = "''", f"({q.filled(t.system, content='ns.system')} if ns.system and ns.first else '')"
    else:
        system, inside = f"({q.filled(t.system, content='ns.system')} if ns.system else '')", "''"
    tools = q.filled(t.tools, tools="(tools | tojson)")
    call = q.filled(t.call, name="f.name", arguments="args(f.arguments)", arguments_python="python(f.arguments)")
    reasoning = q.filled(t.reasoning, reasoning="m.reasoning_content")
    thought = f"{{%- if m.reasoning_content -%}}{{{{ {reasoning} }}}}{{%- endif -%}}" if t.reasoning else ""
    lead = q.filled(t.lead, name="(m.tool_calls[0].function.name if m.tool_calls else '')")
    with_input = q.filled(t.user_with_input, inside, instruction="m.instruction", input="m.input")
    question = q.filled(t.user, inside, content="text(m.content)")
    asked = f"({with_input} if m.input else {question})" if t.user_with_input else question
    default = q(t.default_system)
    if t.default_system_with_input:
        default = f"({q(t.default_system_with_input)} if ns.input else {default})"
    border = q(BORDER) if t.apart and not served else "''"
    lines = [
        "{%- macro text(c) -%}{%- if c is string -%}{{ c }}{%- elif c -%}{%- for p in c -%}{{ p.text }}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}",
        "{%- macro args(a) -%}{{ a if a is string else (a | tojson) }}{%- endmacro -%}",
        "{%- macro python(a) -%}{%- if a is string -%}{{ a }}{%- else -%}{%- for k, v in a.items() -%}"
        "{{ k ~ '=' ~ ('%r' | format(v)) ~ (', ' if not loop.last else '') }}{%- endfor -%}{%- endif -%}"
        "{%- endmacro -%}",
        "{%- set ns = namespace(system='', before='', given=false, first=true, asked=false, input='') -%}",
        "{%- for m in messages -%}{%- if m.role == 'system' -%}",
        "{%- set ns.system = ns.system ~ ('\\n' if ns.given else '') ~ text(m.content) -%}{%- set ns.given = true -%}",
        "{%- elif not ns.asked -%}{%- set ns.asked = true -%}{%- set ns.input = m.input or '' -%}",
        "{%- endif -%}{%- endfor -%}",
        f"{{%- if not ns.system -%}}{{%- set ns.system = {default} -%}}{{%- endif -%}}",
        f"{{%- if tools -%}}{{%- set ns.system = ns.system ~ ('\\n\\n' if ns.system else '') ~ {tools} -%}}"
        "{%- endif -%}",
        f"{{{{ {q(t.begin)} ~ {system} }}}}",
        "{%- for m in messages -%}",
        "{%- if m.role == 'system' -%}{%- if ns.before -%}"
        f"{{{{ raise_exception('{t.name} has a place for a system message in front only') }}}}"
        "{%- endif -%}{%- else -%}",
        f"{{%- if ns.before == 'assistant' -%}}{{{{ {q(t.between)} }}}}{{%- endif -%}}",
        "{%- if m.role == 'assistant' -%}",
        f"{{{{ {q(t.assistant)} ~ {lead} ~ {border} }}}}{thought}{{{{ text(m.content) }}}}",
        "{%- for c in m.tool_calls or [] -%}{%- set f = c.function or c -%}"
        f"{{{{ ('\\n' if m.content or not loop.first else '') ~ {call} }}}}{{%- endfor -%}}",
        f"{{{{ {q.end(t.end)} }}}}",
        f"{{%- elif m.role == 'tool' -%}}{{{{ {q.filled(t.tool or t.user, content='text(m.content)')} }}}}",
        f"{{%- else -%}}{{{{ {asked} }}}}",
        "{%- set ns.first = false -%}{%- endif -%}",
        "{%- set ns.before = m.role -%}{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{ ({q(t.between)} if ns.before == 'assistant' else '') }}}}"
        f"{{{{ {q(prompt)} }}}}"
        "{%- endif -%}",
    ]
    return "\n".join(lines)


class _Quoted:
    """Writes a template's texts as Jinja's."""

    def __init__(self, encoder: Encoder) -> None:
        tokenizer = encoder.tokenizer
        self._encoder = encoder
        self.eos = "" if encoder.eos is None else str(tokenizer.convert_ids_to_tokens(encoder.eos))
        start = "".join(map(str, tokenizer.convert_ids_to_tokens(encoder.start)))
        self._own = {"{start}": start, "{bos}": tokenizer.bos_token or "", "{eos}": self.eos}

    def __call__(self, text: str) -> str:
        for name, value in self._own.items():
            text = text.replace(name, value)
        escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        return f"'{escaped}'"

    def end(self, text: str) -> str:
        """What ends an answer: the one token that it is, or the end of sequence."""
        return self(text if self._encoder.marker(text) is not None else "{eos}")

    def filled(self, text: str, inside: str = "''", **words: str) -> str:
        """A field's text, with expressions in its placeholders; `inside` goes in front of the first."""
        parts: list[str] = []
        rest = text
        while rest:
            places = [(rest.find("{" + name + "}"), name) for name in words]
            at, name = min((p for p in places if p[0] >= 0), default=(-1, ""))
            if at < 0:
                parts.append(self(rest))
                break
            parts += [self(rest[:at]), inside, words[name]]
            inside = "''"
            rest = rest[at + len(name) + 2 :]
        return f"({' ~ '.join(p for p in parts if p != chr(39) * 2) or chr(39) * 2})"
