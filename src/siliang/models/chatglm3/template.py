"""How ChatGLM3 writes a conversation down, for transformers' sandboxed Jinja.

    [gMASK]sop<|system|>\n You are ...<|user|>\n Hello<|assistant|>\n Hi</s>

A message is its role's token, a line of metadata (the name of a tool, mostly empty), and the content. The space before
the content is the one that the tokenizer writes before every text, and so is the one before the line break, which it
adds by itself. What the assistant writes ends with the token of the next role, and only at the very end with
</s>: that token is part of the `generation` span, because the model must learn to write it in order to stop.
"""

CHAT_TEMPLATE = r"""
{%- set tokens = {
    'system': '<|system|>', 'user': '<|user|>', 'assistant': '<|assistant|>',
    'observation': '<|observation|>', 'tool': '<|observation|>'
} -%}
{%- set intro =
    'Answer the following questions as best as you can. You have access to the following tools:' -%}
{%- macro body(metadata, content) -%}
    {{ metadata }}{{ '\n' }}{{ ' ' + content if content else '' }}
{%- endmacro -%}
{%- macro text(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is mapping -%}{{ content | tojson }}
    {%- elif content is iterable -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
    {%- elif content is defined and content is not none -%}{{ content }}
    {%- endif -%}
{%- endmacro -%}
{%- macro listed(tools) -%}
    {%- set found = namespace(tools=[]) -%}
    {%- for tool in tools -%}
        {%- set found.tools = found.tools + [tool.function if tool.function is defined else tool] -%}
    {%- endfor -%}
    {{ '\n' + found.tools | tojson(indent=4) }}
{%- endmacro -%}
{%- macro call(function) -%}
    {%- if function.arguments is defined and function.arguments is not mapping -%}
        {{ raise_exception('The arguments of a tool call must be a dictionary.') }}
    {%- endif -%}
    {{ '```python\ntool_call(' }}
    {%- for name, value in (function.arguments or {}).items() -%}
        {{ name + '=' + '%r' | format(value) }}{{ ', ' if not loop.last else '' }}
    {%- endfor -%}
    {{ ')\n```' }}
{%- endmacro -%}
{{ '[gMASK]sop' }}
{%- if tools and messages[0].role != 'system' -%}
    {{ tokens.system + body('', intro + listed(tools)) }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in tokens -%}
        {{ raise_exception('ChatGLM3 has the roles ' + tokens | join(', ') + '; not ' + message.role) }}
    {%- endif -%}
    {%- set content = text(message.content) -%}
    {%- set metadata = message.metadata or '' -%}
    {%- if message.role == 'system' -%}
        {%- if message.tools -%}
            {%- set content = content + listed(message.tools) -%}
        {%- elif tools and loop.first -%}
            {%- set content = content + ('\n' if content else '') + intro + listed(tools) -%}
        {%- endif -%}
    {%- endif -%}
    {%- if loop.first or loop.previtem.role != 'assistant' -%}{{ tokens[message.role] }}{%- endif -%}
    {%- if message.role != 'assistant' -%}
        {{ body(metadata, content) }}
    {%- else -%}
        {%- set calls = message.tool_calls or [] -%}
        {%- if not loop.last -%}
            {%- set end = tokens[loop.nextitem.role] -%}
        {%- else -%}
            {%- set end = '<|assistant|>' if add_generation_prompt else '</s>' -%}
        {%- endif -%}
        {%- generation -%}
            {%- if content or not calls -%}{{ body(metadata, content) }}{%- endif -%}
            {%- for called in calls -%}
                {%- if content or not loop.first -%}{{ '<|assistant|>' }}{%- endif -%}
                {%- set function = called.function or called -%}
                {{ body(function.name, call(function)) }}
            {%- endfor -%}
            {{ end }}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}{{ '<|assistant|>' }}{%- endif -%}
""".strip()

# What the published tokenizer_config.json says: the same prompts, without end, tools or generation spans.
PUBLISHED_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|>\n {{ message['content'] }}"
    "{% else %}<|{{ message['role'] }}|>\n {{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
