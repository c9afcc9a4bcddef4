# ruff: noqa: E501, as the templates are laid out
"""Chat templates for tests, written for them after the formats of well-known models.

They imitate what matters to a reader of conversations: the markers of turns, default system texts,
where tools and calls stand, which reasoning is left out, and what the generation prompt supplies.
`REPLY` says, in plain Python and without a template, what the assistant writes in each.
"""

import json

CHATML = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

TAGGED = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' }}{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

SMOLLM = (
    """{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\nYou are a small helper.<|im_end|>\n' }}
{%- endif -%}"""
    + CHATML
)

LLAMA3 = """{{- '<|begin_of_text|>' -}}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' -}}
{%- for tool in tools or [] -%}{{- tool | tojson(indent=2) + '\n\n' -}}{%- endfor -%}
{{- system + '<|eot_id|>' -}}
{%- for m in rest -%}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length != 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' -}}
{{- call.arguments | tojson + '}<|eot_id|>' -}}
{%- elif m.role == 'tool' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""

_TOOLS = """{%- if tools -%}
{{ '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}
{{- '# Tools\n<tools>' }}
{%- for tool in tools -%}{{ '\n' + tool | tojson }}{%- endfor -%}
{{ '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' -%}
{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif -%}"""
_CALLS = """{%- for call in m.tool_calls or [] -%}
{{ '\n' if (m.content or not loop.first) else '' }}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}
{%- endfor -%}"""
_TOOL_TURN = """{%- elif m.role == 'tool' -%}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}"""

QWEN25 = (
    _TOOLS
    + """{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' + m.content }}"""
    + _CALLS
    + """{{ '<|im_end|>\n' }}"""
    + _TOOL_TURN
    + """{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
)

QWEN3 = (
    _TOOLS
    + """{%- set ns = namespace(query=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' and not m.content.startswith('<tool_response>') -%}
{%- set ns.query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{%- set content = m.content -%}{%- set reasoning = m.reasoning_content or '' -%}
{%- if not reasoning and '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.query and (loop.last or reasoning) -%}
{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else -%}{{ content }}{%- endif -%}"""
    + _CALLS
    + """{{ '<|im_end|>\n' }}"""
    + _TOOL_TURN
    + """{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}"""
)

GEMMA = """{{- '<bos>' -}}
{%- if messages[0].role == 'system' -%}
{%- set head = messages[0].content + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set head = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' -}}
{{- (head if loop.first else '') + (m.content | trim) + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"""

# Its generation prompt opens the reasoning, which is left out of the history; no text ends a user's turn.
REASONER = """{{- '<bos>' -}}{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|User|>' + m.content -}}
{%- elif m.role == 'system' -%}{{- m.content -}}
{%- elif m.role == 'assistant' -%}
{{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end_of_text|>' -}}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}"""

# It has no generation prompt, and its system text stands in the first turn.
LLAMA2 = """{%- if messages[0].role == 'system' -%}
{%- set head = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set head = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
{%- if m.role == 'user' -%}{{- '<bos>[INST] ' + (head if loop.first else '') + m.content + ' [/INST]' -}}
{%- else -%}{{- ' ' + m.content + ' <|end_of_text|>' -}}{%- endif -%}
{%- endfor -%}"""

# Only the last reply has an end, which begins with the same characters as the next turn.
LAST_END = """{{- '<bos>' -}}{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|Assistant|>' + m.content + ('<|end_of_text|>' if loop.last else '') -}}
{%- else -%}{{- '<|User|>' + m.content -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|>' -}}{%- endif -%}"""

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|User|>", "<|Assistant|>", "<|end_of_text|>"),
]
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def _call(call, form):
    function = call["function"]
    return form % (function["name"], json.dumps(function["arguments"]))


def _qwen_calls(message):
    form = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
    calls = [_call(call, form) for call in message.get("tool_calls", [])]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])


def _qwen3(messages, index):
    message, text = messages[index], _qwen_calls(messages[index])
    last_query = max(i for i, each in enumerate(messages) if each["role"] == "user")
    reasoning = message.get("reasoning_content", "")
    if index > last_query and reasoning:
        text = f"<think>\n{reasoning}\n</think>\n\n{text}"
    return text + "<|im_end|>"


def _llama3(messages, index):
    calls = messages[index].get("tool_calls")
    form = '{"name": "%s", "parameters": %s}'
    text = _call(calls[0], form) if calls else messages[index]["content"].strip()
    return text + "<|eot_id|>"


# What the assistant writes as message `index`, after the generation prompt.
REPLY = {
    "chatml": lambda messages, index: messages[index]["content"] + "<|im_end|>",
    "llama3": _llama3,
    "qwen2.5": lambda messages, index: _qwen_calls(messages[index]) + "<|im_end|>",
    "qwen3": _qwen3,
    "gemma": lambda messages, index: messages[index]["content"].strip() + "<end_of_turn>",
    "reasoner": lambda messages, index: messages[index]["content"] + "<|end_of_text|>",
    "llama2": lambda messages, index: " " + messages[index]["content"] + " <|end_of_text|>",
    "last end": lambda messages, index: (
        messages[index]["content"] + "<|end_of_text|>" * (index + 1 == len(messages))
    ),
}
REPLY |= {"tagged": REPLY["chatml"], "smollm": REPLY["chatml"]}
TEMPLATES = {
    "chatml": CHATML,
    "tagged": TAGGED,
    "smollm": SMOLLM,
    "llama3": LLAMA3,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "reasoner": REASONER,
    "llama2": LLAMA2,
    "last end": LAST_END,
}
TAKE_TOOLS = ("llama3", "qwen2.5", "qwen3")
