#!/usr/bin/env python3
"""Compares our chat-template engine with Python's jinja2.

    python3 tools/template-check/render.py FOLDER [--program PATH] [--verbose]

FOLDER holds *.jinja files (models/templates in llama.cpp's source). Each is
rendered for a list of conversations by jinja2, in an environment set up as
Hugging Face's apply_chat_template sets it up, and by the example
`render_template` of pregate-runtime. Where both refuse, the case counts as
equal. A case that only we refuse, with a reason, is counted on its own. Needs
jinja2 from PyPI. Exits with 1 on a difference.
"""
import argparse
import datetime
import json
import pathlib
import subprocess
import sys

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = 1_753_900_000  # 2025-07-30 18:26:40


class Generation(Extension):
    """The tag that marks what an assistant wrote; here only its scope."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_inner"), [], [], body).set_lineno(line)

    def _inner(self, caller):
        return caller()


def environment():
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(pattern):
        moment = datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc)
        return moment.strftime(pattern)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Says what the weather is <like> & \"why\" — où?",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "A city"},
                    "days": {"type": "integer", "enum": [1, 2, 3], "default": 1},
                    "exact": {"type": "boolean", "default": True},
                    "parts": {"type": "array", "items": {"type": "string"}, "nullable": True},
                    "scale": {"type": "number", "minimum": 0.5, "maximum": 1e20},
                    "where": {
                        "type": "object",
                        "properties": {"lat": {"type": "number"}, "name": {"type": ["string", "null"]}},
                        "required": ["lat"],
                    },
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time",
            "parameters": {"type": "object", "properties": {}},
            "return": {"type": "string"},
        },
    },
]


def call(name, arguments, identifier):
    return {"type": "function", "id": identifier, "function": {"name": name, "arguments": arguments}}


def conversations():
    system = {"role": "system", "content": "You are terse.\n"}
    user = {"role": "user", "content": "What's 2 + 2? \"Quoted\" <b>é</b> 日本"}
    answer = {"role": "assistant", "content": "It is 4."}
    more = {"role": "user", "content": "  And 3 + 3?\n\n"}
    thought = {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"}
    reasoned = {"role": "assistant", "content": "4", "reasoning_content": "I add.\n"}
    asks = {"role": "user", "content": "Weather in Paris and Rome?"}
    arguments = {"city": "Paris", "days": 2, "exact": False, "scale": 1.5, "where": {"lat": 48.85, "name": None}}
    one = {"role": "assistant", "content": "", "tool_calls": [call("get_weather", arguments, "abcdefgh1")]}
    text = {"role": "assistant", "content": "Looking.", "tool_calls": [call("get_weather", json.dumps(arguments), "abcdefgh1")]}
    two = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            call("get_weather", {"city": "Paris"}, "abcdefgh1"),
            call("get_weather", {"city": "Rome"}, "abcdefgh2"),
        ],
    }
    result = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefgh1", "content": "{\"sky\": \"clear\"}"}
    result2 = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefgh2", "content": "rain"}
    parts = {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "parts"}]}
    return {
        "one turn": ([user], None, {}),
        "system": ([system, user], None, {}),
        "several turns": ([system, user, answer, more], None, {}),
        "ends with answer": ([user, answer], None, {}),
        "empty content": ([{"role": "system", "content": ""}, {"role": "user", "content": ""}], None, {}),
        "empty answer": ([user, {"role": "assistant", "content": ""}, more], None, {}),
        "no messages": ([], None, {}),
        "tools": ([system, asks], TOOLS, {}),
        "tools without system": ([asks], TOOLS, {}),
        "tool call": ([asks, one, result], TOOLS, {}),
        "tool call as text": ([system, asks, text, result], TOOLS, {}),
        "two tool calls": ([asks, two, result, result2], TOOLS, {}),
        "tool round trip": ([system, asks, one, result, answer, more], TOOLS, {}),
        "earlier thought": ([user, thought, more], None, {}),
        "reasoning field": ([user, reasoned, more], None, {}),
        "thinking on": ([user], None, {"enable_thinking": True, "thinking": True}),
        "thinking off": ([user], None, {"enable_thinking": False, "thinking": False}),
        "content parts": ([parts], None, {}),
        "wrong order": ([answer, system, user], None, {}),
        "unknown role": ([{"role": "narrator", "content": "Once"}, user], None, {}),
        "developer": ([{"role": "developer", "content": "Be kind."}, user], None, {}),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--program", default="target/release/examples/render_template")
    parser.add_argument("--only", default="")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()

    cases = []
    for path in sorted(options.folder.glob("*.jinja")):
        if options.only not in path.name:
            continue
        source = path.read_text(encoding="utf-8")
        for name, (messages, tools, extra) in conversations().items():
            for prompt in (False, True):
                variables = {"bos_token": "<s>", "eos_token": "</s>", **extra}
                cases.append((path.name, f"{name}{' +prompt' if prompt else ''}", {
                    "template": source, "messages": messages, "tools": tools,
                    "add_generation_prompt": prompt, "variables": variables, "now": NOW,
                }))

    env = environment()
    expected = []
    compiled = {}
    for _, _, case in cases:
        try:
            source = case["template"]
            if source not in compiled:
                compiled[source] = env.from_string(source)
            template = compiled[source]
            expected.append({"text": template.render(
                messages=case["messages"], tools=case["tools"], documents=None,
                add_generation_prompt=case["add_generation_prompt"], **case["variables"])})
        except Exception as error:  # noqa: BLE001 - whatever Python raises counts
            expected.append({"error": f"{type(error).__name__}: {error}"})

    lines = "".join(json.dumps(case) + "\n" for _, _, case in cases)
    run = subprocess.run([options.program], input=lines, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == len(cases)

    table = {}
    for (file, name, _), theirs, ours in zip(cases, expected, found):
        row = table.setdefault(file, {"cases": 0, "equal": 0, "both refuse": 0, "we refuse": [], "different": []})
        row["cases"] += 1
        if "error" in theirs and "error" in ours:
            row["both refuse"] += 1
        elif theirs == ours:
            row["equal"] += 1
        elif "error" in ours:
            row["we refuse"].append((name, theirs, ours))
        else:
            row["different"].append((name, theirs, ours))

    print(f"{'template':<58} {'cases':>5} {'equal':>5} {'both refuse':>11} {'we refuse':>9} {'differ':>6}")
    different = refused = 0
    for file, row in table.items():
        different += len(row["different"])
        refused += len(row["we refuse"])
        print(
            f"{file:<58} {row['cases']:>5} {row['equal']:>5} {row['both refuse']:>11}"
            f" {len(row['we refuse']):>9} {len(row['different']):>6}"
        )
        shown = row["different"] + row["we refuse"]
        shown = shown if options.verbose else shown[:1]
        for name, theirs, ours in shown:
            print(f"    {name}")
            print(f"        jinja2: {excerpt(theirs, ours)}")
            print(f"        ours:   {excerpt(ours, theirs)}")
    total = sum(row["cases"] for row in table.values())
    print(f"{len(table)} templates, {total} cases, {different} different, {refused} refused by us alone")
    sys.exit(1 if different else 0)


def excerpt(one, other):
    if "error" in one:
        return "error: " + one["error"][:200]
    text, against = one["text"], other.get("text", "")
    at = next((i for i, (a, b) in enumerate(zip(text, against)) if a != b), min(len(text), len(against)))
    return repr(text[max(0, at - 40):at + 60]) + f" (difference at {at})" if "text" in other else repr(text[:60])


main()
