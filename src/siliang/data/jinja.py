"""A named template as a chat template (Jinja), for whoever serves the model: the same text as in training."""

from __future__ import annotations

import copy
from collections.abc import Collection

from siliang.data.encode import Encoder
from siliang.data.templates import Template, find_template
from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer

SERVED_LAYOUTS = ("text", "prepared")  # these were not written in a template


def with_chat_template(tokenizer: Tokenizer, template: str, layouts: Collection[str]) -> tuple[Tokenizer, str]:
    """The tokenizer to serve a model with that was trained in a template.

    Args:
        template: `data.template` of the training.
        layouts: Of its rows.

    Returns:
        A tokenizer whose chat template writes what training wrote, the one given where it does so already; and in a
        sentence what it is, and what differs.
    """
    named = find_template(template)
    if all(layout in SERVED_LAYOUTS for layout in layouts):
        return tokenizer, ""
    if named is None:
        return tokenizer, Bilingual("the tokenizer's own, with which it was trained", "分词器自己的模板，与训练时相同")
    served = copy.deepcopy(tokenizer)
    served.chat_template = as_chat_template(named, Encoder(tokenizer))
    apart = Bilingual("", "")
    if named.user_with_input:
        apart = Bilingual("; an instruction and its input go into one question there", "；其中指令和输入合为一个问题")
    name = named.name
    return served, Bilingual(f"{name}, with which it was trained{apart}", f"{name}，与训练时相同{apart.zh}")


def as_chat_template(template: Template, encoder: Encoder) -> str:
    """A template as Jinja, for transformers' apply_chat_template.

    Where this tokenizer makes the space in front of an answer part of the answer's first token, the generation prompt
    ends before that space, as in training.
    """
    t, q = template, _Quoted(encoder)
    prompt = t.assistant.removesuffix(" ") if encoder.joins_space else t.assistant
    if t.system_inside:
        system, inside = "''", f"({q.filled(t.system, content='ns.system')} if ns.system and ns.first else '')"
    else:
        system, inside = f"({q.filled(t.system, content='ns.system')} if ns.system else '')", "''"
    tools = q.filled(t.tools, tools="(tools | tojson)")
    call = q.filled(t.call, name="f.name", arguments="args(f.arguments)", arguments_python="python(f.arguments)")
    reasoning = q.filled(t.reasoning, reasoning="m.reasoning_content")
    thought = f"{{%- if m.reasoning_content -%}}{{{{ {reasoning} }}}}{{%- endif -%}}" if t.reasoning else ""
    lead = q.filled(t.lead, name="(m.tool_calls[0].function.name if m.tool_calls else '')")
    lines = [
        "{%- macro text(c) -%}{%- if c is string -%}{{ c }}{%- elif c -%}{%- for p in c -%}{{ p.text }}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}",
        "{%- macro args(a) -%}{{ a if a is string else (a | tojson) }}{%- endmacro -%}",
        "{%- macro python(a) -%}{%- if a is string -%}{{ a }}{%- else -%}{%- for k, v in a.items() -%}"
        "{{ k ~ '=' ~ ('%r' | format(v)) ~ (', ' if not loop.last else '') }}{%- endfor -%}{%- endif -%}"
        "{%- endmacro -%}",
        "{%- set ns = namespace(system='', before='', given=false, first=true) -%}",
        "{%- for m in messages -%}{%- if m.role == 'system' -%}",
        "{%- set ns.system = ns.system ~ ('\\n' if ns.given else '') ~ text(m.content) -%}{%- set ns.given = true -%}",
        "{%- endif -%}{%- endfor -%}",
        f"{{%- if not ns.system -%}}{{%- set ns.system = {q(t.default_system)} -%}}{{%- endif -%}}",
        f"{{%- if tools -%}}{{%- set ns.system = ns.system ~ ('\\n\\n' if ns.system else '') ~ {tools} -%}}"
        "{%- endif -%}",
        f"{{{{ {q(t.begin)} ~ {system} }}}}",
        "{%- for m in messages -%}",
        "{%- if m.role == 'system' -%}{%- if ns.before -%}"
        f"{{{{ raise_exception('{t.name} has a place for a system message in front only') }}}}"
        "{%- endif -%}{%- else -%}",
        f"{{%- if ns.before == 'assistant' -%}}{{{{ {q(t.between)} }}}}{{%- endif -%}}",
        "{%- if m.role == 'assistant' -%}",
        f"{{{{ {q(t.assistant)} ~ {lead} }}}}{thought}{{{{ text(m.content) }}}}",
        "{%- for c in m.tool_calls or [] -%}{%- set f = c.function or c -%}"
        f"{{{{ ('\\n' if m.content or not loop.first else '') ~ {call} }}}}{{%- endfor -%}}",
        f"{{{{ {q.end(t.end)} }}}}",
        f"{{%- elif m.role == 'tool' -%}}{{{{ {q.filled(t.tool or t.user, content='text(m.content)')} }}}}",
        f"{{%- else -%}}{{{{ {q.filled(t.user, inside, content='text(m.content)')} }}}}",
        "{%- set ns.first = false -%}{%- endif -%}",
        "{%- set ns.before = m.role -%}{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{ {q(prompt)} }}}}{{%- endif -%}}",
    ]
    return "\n".join(lines)


class _Quoted:
    """Writes a template's texts as Jinja's."""

    def __init__(self, encoder: Encoder) -> None:
        tokenizer = encoder.tokenizer
        self._encoder = encoder
        eos = "" if encoder.eos is None else str(tokenizer.convert_ids_to_tokens(encoder.eos))
        start = "".join(map(str, tokenizer.convert_ids_to_tokens(encoder.start)))
        self._own = {"{start}": start, "{bos}": tokenizer.bos_token or "", "{eos}": eos}

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
