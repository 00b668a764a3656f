#!/usr/bin/env python3
"""Render a set of conversations with every chat template of a folder, and print a table in Markdown.

scripts/render_templates.py FOLDER [--show TEMPLATE]

A template may refuse a conversation with its own message. Anything else that fails is an error of
the renderer or of the template; then the exit code is 1.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from paddler.language.chat_template import PromptTemplate, template_variables
from paddler.language.template_environment import TemplateFailed, TemplateRefused
from paddler.messages.inference import (
    CalledFunction,
    CalledTool,
    ContinueFromConversationHistory,
    ConversationMessage,
    TextPart,
    Tool,
    ToolFunction,
    ToolParameters,
)

NOW = datetime(2024, 5, 17, 12, 30)
SPECIAL_TOKENS = {"bos_token": "<BOS>", "eos_token": "<EOS>", "nl_token": "\n"}
MOST_CHARACTERS = 110

WEATHER = Tool(
    ToolFunction(
        "get_weather",
        "Weather of a city",
        ToolParameters(
            "object",
            properties={
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": "integer", "description": "How many"},
            },
            required=("city",),
        ),
    ),
    type="function",
)
CLOCK = Tool(ToolFunction("clock", "The time", ToolParameters("object", properties={})), type="function")

SYSTEM = ConversationMessage("system", "Be brief.")
HELLO = ConversationMessage("user", "Hello, Zoë!")
ANSWER = ConversationMessage("assistant", "Hello.")
QUESTION = ConversationMessage("user", "How is the weather in Köln?")
CALL = ConversationMessage(
    "assistant",
    "",
    tool_calls=(CalledTool(CalledFunction("get_weather", {"city": "Köln's", "days": 2}), id="abcdefgh1"),),
)
CALL_AS_TEXT = ConversationMessage(
    "assistant",
    "",
    tool_calls=(CalledTool(CalledFunction("get_weather", '{"city": "Köln\'s", "days": 2}'), id="abcdefgh1"),),
)
RESULT = ConversationMessage("tool", '{"sky": "clear"}', name="get_weather", tool_call_id="abcdefgh1")


def conversation(*messages: ConversationMessage, **options: Any) -> ContinueFromConversationHistory:
    defaults = {"add_generation_prompt": True, "enable_thinking": False, "max_tokens": 10}
    return ContinueFromConversationHistory(conversation_history=messages, **(defaults | options))


def shows(*texts: str) -> Callable[[str], str]:
    """Return a check of a prompt: what it lacks, or nothing."""

    def problem(prompt: str) -> str:
        missing = [text for text in texts if text not in prompt]
        return f"without {missing[0]}" if missing else ""

    return problem


def shows_a_call(prompt: str) -> str:
    """Tell what became of a tool call of an earlier message, and of its result."""
    if "'city': \"Köln" in prompt:
        return "arguments as Python prints them"
    if '\\"city\\": \\"K' in prompt:
        return "arguments as JSON in JSON"
    if "Köln's" not in prompt and "K\\u00f6ln's" not in prompt:
        return "without the call"
    return "" if "clear" in prompt else "without the result"


CONVERSATIONS: dict[str, tuple[ContinueFromConversationHistory, Callable[[str], str]]] = {
    "plain": (conversation(HELLO), shows("Hello, Zoë!")),
    "system": (conversation(SYSTEM, HELLO), shows("Be brief.", "Hello, Zoë!")),
    "turns": (conversation(HELLO, ANSWER, QUESTION), shows("Hello, Zoë!", "Hello.", "Köln")),
    "parts": (
        conversation(ConversationMessage("user", (TextPart("first part"), TextPart("second part")))),
        shows("first part", "second part"),
    ),
    "thinking": (conversation(HELLO, enable_thinking=True), shows("Hello, Zoë!")),
    "tools": (conversation(QUESTION, tools=(WEATHER, CLOCK)), shows("get_weather", "clock")),
    "calls": (conversation(QUESTION, CALL, RESULT, tools=(WEATHER, CLOCK)), shows_a_call),
    "calls as text": (conversation(QUESTION, CALL_AS_TEXT, RESULT, tools=(WEATHER, CLOCK)), shows_a_call),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Render conversations with every chat template of a folder.")
    parser.add_argument("folder", type=Path, help="a folder with *.jinja files")
    parser.add_argument("--show", metavar="TEMPLATE", help="print the prompts of this one instead")
    options = parser.parse_args()
    paths = sorted(options.folder.glob("*.jinja"), key=lambda path: path.name.lower())
    if not paths:
        parser.error(f"no *.jinja in {options.folder}")
    if options.show is not None:
        show(options.folder / f"{options.show.removesuffix('.jinja')}.jinja")
        return 0
    print("| template |", " | ".join(CONVERSATIONS), "|")
    print("|---" * (1 + len(CONVERSATIONS)) + "|")
    errors = 0
    for path in paths:
        outcomes = outcomes_of(path)
        errors += sum(outcome.startswith("ERROR") for outcome in outcomes)
        print(f"| {path.stem} |", " | ".join(outcome.replace("|", "\\|") for outcome in outcomes), "|")
    print(f"\n{len(paths)} templates, {errors} errors")
    return 1 if errors else 0


def outcomes_of(path: Path) -> list[str]:
    """Return how each conversation fared with a template, in words for the table."""
    try:
        template = PromptTemplate(path.read_text())
    except TemplateFailed as error:
        return [shortened(f"ERROR: {error}")] * len(CONVERSATIONS)
    return [shortened(outcome(template, request, check)) for request, check in CONVERSATIONS.values()]


def outcome(
    template: PromptTemplate, request: ContinueFromConversationHistory, check: Callable[[str], str]
) -> str:
    try:
        prompt = template.render(template_variables(request) | SPECIAL_TOKENS, now=NOW)
    except TemplateRefused as refusal:
        return f"refused: {refusal.message}"
    except TemplateFailed as error:
        return f"ERROR: {error}"
    problem = check(prompt.text)
    return f"ok, {problem}" if problem else "ok"


def shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}…"


def show(path: Path) -> None:
    template = PromptTemplate(path.read_text())
    for name, (request, check) in CONVERSATIONS.items():
        print(f"=== {name}: {outcome(template, request, check)}")
        try:
            prompt = template.render(template_variables(request) | SPECIAL_TOKENS, now=NOW)
        except TemplateFailed as error:
            print(error)
        else:
            print(f"{prompt.text}\n--- suffix: {prompt.suffix!r}")


if __name__ == "__main__":
    sys.exit(main())
