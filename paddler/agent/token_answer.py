"""One request's answer: what the engine gives becomes the pieces that clients get, in their order.

Pure but for its caller, who has the arguments of tool calls checked: until that is done, everything
behind a call waits here.
"""

from collections import deque
from collections.abc import Iterable

from paddler.agent.serving import Serving
from paddler.engine.pipe import Advance, Finish, Logprobs
from paddler.language.chat_template import Prompt
from paddler.language.reasoning_formats import section_after
from paddler.language.token_classifier import Item, SectionEnd, TokenClassifier
from paddler.language.tool_calls import ToolCallParser
from paddler.messages.agent_socket import escape_text
from paddler.messages.inference import ContinueFromConversationHistory, TokenRequest
from paddler.messages.tokens import (
    ChosenLogprob,
    Done,
    Event,
    GrammarInitializationFailed,
    GrammarRejectedModelOutput,
    ImageDecodingFailed,
    ImageExceedsBatchSize,
    SamplerError,
    Terminal,
    TokenLogprob,
    TokenLogprobs,
    ToolCallParsed,
    ToolCallValidationFailed,
)
from paddler.messages.wire import encode

AnswerPiece = tuple[str, str]
"""(letter of messages/agent_socket.py, JSON text)."""


class TokenAnswer:
    """The answer to one request, from its first token to its terminal piece."""

    def __init__(self, body: TokenRequest, serving: Serving, prompt: Prompt) -> None:
        self.unchecked: ToolCallParsed | None = None
        """Calls whose arguments are to be checked: `checked` goes on from there."""
        self._serving = serving
        self._tool_format = serving.tool_format_for(body)
        self._tools = body.tools if isinstance(body, ContinueFromConversationHistory) else ()
        self._parses_calls = isinstance(body, ContinueFromConversationHistory) and body.parse_tool_calls
        self._classifier = TokenClassifier(
            markers=serving.markers,
            start=section_after(prompt.suffix, serving.markers),
            control_tokens=serving.control_tokens,
            tool_format=self._tool_format,
        )
        self._is_cut = False
        self._waiting: deque[Item | Event | Terminal] = deque()

    def take(self, advance: Advance) -> list[AnswerPiece]:
        """Return what one turn gave; the last piece of the last turn is the terminal. The hot path."""
        classifier = self._classifier
        items = classifier.feed(advance.tokens, advance.text)
        if advance.finish is None and advance.logprobs is None and self._tool_format is None:
            # No section ends without tools, and nothing waits.
            return [(item[0].value, escape_text(item[1])) for item in items if isinstance(item, tuple)]
        self._waiting += items
        if advance.finish is not None:
            self._is_cut = advance.finish in (Finish.LENGTH, Finish.STOPPED)
            self._waiting += classifier.finish()
        if advance.logprobs:
            self._waiting.append(_logprobs_event(advance.logprobs))
        if advance.finish is not None:
            self._waiting.append(self._terminal(advance, advance.finish))
        return self._go_on()

    def checked(self, violations: Iterable[str]) -> list[AnswerPiece]:
        """Go on behind the unchecked calls, which break their schemas in these ways, or in none."""
        calls, self.unchecked = self.unchecked, None
        assert calls is not None, "nothing was to be checked"
        broken = tuple(violations)
        event = ToolCallValidationFailed(broken) if broken else calls
        return [("E", encode(event, Event)), *self._go_on()]

    def _go_on(self) -> list[AnswerPiece]:
        """Return what need not wait any more."""
        pieces: list[AnswerPiece] = []
        while self._waiting and self.unchecked is None:
            item = self._waiting.popleft()
            if isinstance(item, tuple):
                pieces.append((item[0].value, escape_text(item[1])))
            elif isinstance(item, SectionEnd):
                pieces += self._calls_of(item)
            elif isinstance(item, Event):
                pieces.append(("E", encode(item, Event)))
            else:
                pieces.append(("D", encode(item, Terminal)))
        return pieces

    def _calls_of(self, section: SectionEnd) -> list[AnswerPiece]:
        """Read a section of calls, if the client wants that; what was read waits to be checked."""
        if not self._parses_calls:
            return []
        parser = ToolCallParser(self._tool_format, self._tools)
        parser.feed(section.text)
        outcome = parser.finish(is_cut=self._is_cut and section.is_open)
        if isinstance(outcome, ToolCallParsed) and outcome.payload:
            self.unchecked = outcome
            return []
        return [("E", encode(outcome, Event))]

    def _terminal(self, advance: Advance, finish: Finish) -> Terminal:
        match finish:
            case Finish.END | Finish.LENGTH | Finish.STOPPED:
                return Done(
                    self._classifier.usage(
                        prompt_tokens=advance.prompt_tokens,
                        cached_prompt_tokens=advance.cached_prompt_tokens,
                        input_image_tokens=advance.image_tokens,
                    )
                )
            case Finish.GRAMMAR_INVALID:
                return GrammarInitializationFailed(advance.failure)
            case Finish.GRAMMAR_REJECTED:
                return GrammarRejectedModelOutput(advance.failure)
            case Finish.IMAGE_INVALID:
                return ImageDecodingFailed(advance.failure)
            case Finish.IMAGE_TOO_LARGE:
                return ImageExceedsBatchSize(advance.image_tokens, self._serving.most_image_tokens)
            case Finish.FAILED:
                return SamplerError(advance.failure)


def _logprobs_event(logprobs: Logprobs) -> TokenLogprobs:
    return TokenLogprobs(
        tuple(
            ChosenLogprob(text, logprob, tuple(TokenLogprob(*other) for other in top))
            for text, logprob, top in logprobs
        )
    )
