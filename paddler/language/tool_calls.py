"""What became of a section of tool calls: the event that clients see.

The format of the model is tried first, then all others in their order, whatever the model is: models write
what they have seen elsewhere. Whether the arguments keep to the tool's schema is said by tool_schemas.py.
"""

from collections.abc import Sequence

from paddler.language.json_calls import BrokenCall, Call
from paddler.language.tool_formats import Syntax, ToolFormat
from paddler.language.tool_syntaxes import READERS
from paddler.messages.inference import Tool
from paddler.messages.tokens import (
    ParsedToolCall,
    ToolCallParsed,
    ToolCallParseFailed,
    UnrecognizedToolCallFormat,
)

MAX_SECTION_CHARACTERS = 1024 * 1024

ToolCallOutcome = ToolCallParsed | ToolCallParseFailed | UnrecognizedToolCallFormat


class ToolCallParser:
    """Read one section, fed in pieces as they come; how it is cut does not matter."""

    def __init__(self, tool_format: ToolFormat | None, tools: Sequence[Tool]) -> None:
        """Read calls of these tools; without a format all syntaxes are tried."""
        own = tool_format.syntax if tool_format is not None else None
        self._syntaxes = sorted(Syntax, key=lambda syntax: syntax is not own)
        self._tools = {tool.function.name: tool for tool in tools}
        self._pieces: list[str] = []
        self._length = 0

    def feed(self, text: str) -> None:
        """Take the next piece; beyond MAX_SECTION_CHARACTERS nothing is kept, and the section is refused."""
        self._length += len(text)
        if self._length <= MAX_SECTION_CHARACTERS:
            self._pieces.append(text)

    def finish(self, *, is_cut: bool = False) -> ToolCallOutcome:
        """Return what the section was; of one that was cut off nothing need be left that shows its syntax."""
        if self._length > MAX_SECTION_CHARACTERS:
            return ToolCallParseFailed(f"the section has more than {MAX_SECTION_CHARACTERS} characters")
        whole = "".join(self._pieces)
        text = whole.strip().removeprefix("<tool_call>").removesuffix("</tool_call>")  # from raw prompts
        failure: str | None = None
        for syntax in self._syntaxes:
            try:
                calls = READERS[syntax](text, self._tools)
            except BrokenCall as error:
                failure = failure or str(error)
                continue
            if calls is not None:
                return ToolCallParsed(_with_ids(calls))
        if failure is not None:
            return ToolCallParseFailed(failure)
        if is_cut:
            return ToolCallParseFailed("the answer was cut off within the call")
        return UnrecognizedToolCallFormat(whole, "the text is of no known format")


def _with_ids(calls: list[Call]) -> tuple[ParsedToolCall, ...]:
    return tuple(
        ParsedToolCall(call.id or f"call_{at}", call.name, call.arguments) for at, call in enumerate(calls)
    )
