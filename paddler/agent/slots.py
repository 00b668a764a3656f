"""Requests on this agent: prepare, generate, classify, answer; one task per request.

Tokens never wait here: the engine's reader calls `on_turn`, which classifies what a decode step gave
all slots and sends it as one step frame.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Protocol

import attrs
import trio

from paddler.agent.preparation import TemplateRenderer
from paddler.agent.refusals import conversation_characters, refuse_early, refuse_images, refuse_long
from paddler.agent.status import Latest
from paddler.engine.pipe import Advance, Finish
from paddler.errors import RemoteProtocolError
from paddler.language.chat_template import Prompt, template_variables
from paddler.language.token_classifier import Markers, TokenClassifier, section_after
from paddler.messages.agent_socket import Piece, escape_text
from paddler.messages.inference import ContinueFromRawPrompt, TokenRequest
from paddler.messages.tokens import (
    TOKEN_GENERATION_DISABLED_TEXT,
    Done,
    SamplerError,
    StreamError,
    Terminal,
    TokenGenerationDisabled,
    Usage,
)
from paddler.messages.wire import encode

# Theory of operation
#
# A request is *accepted* (registered, synchronously, so that a Stop right behind it finds it), then
# its task *prepares* it, hands it to the engine and waits for its *end*. Whoever ends it sends its
# terminal piece and sets `ended`, in one breath: its task (refusals, bounces), `on_turn` (what the
# engine says) or `fail` (the engine is gone). A request whose task is cancelled ended with its link:
# the engine is told, nobody else.
#
# While a state is drained the door is closed: arrivals are bounced, accepted requests go on. A
# request belongs to the `Serving` that it was accepted for; if that is gone when its prompt is ready
# (the engine failed meanwhile), it is bounced: nobody has seen anything of it yet.

SendStep = Callable[[list[Piece]], None]

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What slots need of a loaded engine; both calls never block."""

    def generate(self, generation: int, *, prompt: str, max_tokens: int) -> None: ...

    def cancel(self, generation: int) -> None: ...


@attrs.frozen(eq=False)
class Serving:
    """What requests run on: a loaded engine, and what its model needs from us."""

    engine: Engine
    chat_template: str | None
    special_tokens: Mapping[str, str]
    """`bos_token`, `eos_token`, `nl_token`, as templates know them."""
    markers: Markers | None
    control_tokens: Mapping[int, str]
    enable_embeddings: bool


@attrs.define(eq=False)
class OpenRequest:
    """A request on this agent; `number` is the link's, `generation` the engine's."""

    number: int
    body: TokenRequest
    serving: Serving | None
    preparing: trio.CancelScope = attrs.Factory(trio.CancelScope)
    is_stopped: bool = False
    generation: int | None = None
    classifier: TokenClassifier | None = None
    ended: trio.Event = attrs.Factory(trio.Event)


class Slots:
    """All requests of this agent, whatever the link and the engine they came to."""

    def __init__(self, *, renderer: TemplateRenderer) -> None:
        self._renderer = renderer
        self._serving: Serving | None = None
        self._is_open = False
        self._send_step: SendStep | None = None
        self._requests: dict[int, OpenRequest] = {}
        self._generating: dict[int, OpenRequest] = {}
        self._generations = count(1)
        self._open_requests = Latest(0)

    # For reconciliation and the engine.

    def open_door(self, serving: Serving) -> None:
        """Take requests for this engine from now on."""
        self._serving = serving
        self._is_open = True

    def close_door(self) -> None:
        """Bounce what arrives from now on; what was accepted goes on."""
        self._is_open = False

    async def emptied(self) -> None:
        """Wait until no request is open."""
        while self._open_requests.value:
            await self._open_requests.other_than(self._open_requests.value)

    def fail(self, error: StreamError) -> None:
        """End every request that the engine had, because the engine is gone; close the door."""
        self.close_door()
        self._serving = None
        text = encode(error)
        self._send([self._end(request, "X", text) for request in [*self._generating.values()]])

    def on_turn(self, advances: list[Advance]) -> None:
        """Pass on what one decode step gave, for all slots."""
        pieces: list[Piece] = []
        for advance in advances:
            request = self._generating.get(advance.generation)
            if request is None:
                continue  # cancelled with its link, or failed: nobody waits for it
            try:
                self._pass_on(request, advance, pieces)
            except Exception:  # border: one request
                logger.exception("request %d failed", request.number)
                pieces.append(self._end(request, "X", _INTERNAL_ERROR))
                if advance.finish is None:
                    self._cancel(request)
        self._send(pieces)

    # For the link.

    @contextmanager
    def connected(self, send_step: SendStep) -> Iterator[None]:
        """Send step frames by `send_step` for the duration of the block, one link's life."""
        self._send_step = send_step
        try:
            yield
        finally:
            self._send_step = None

    def accept(self, number: int, body: TokenRequest) -> OpenRequest:
        """Register a request; `run` must follow. Raises RemoteProtocolError when the number is in use."""
        if number in self._requests:
            raise RemoteProtocolError(f"request number {number} is in use")
        request = OpenRequest(number, body, self._serving if self._is_open else None)
        self._requests[number] = request
        self._open_requests.set(len(self._requests))
        return request

    async def run(self, request: OpenRequest) -> None:
        """Serve an accepted request to its end. Cancelled, it stops in the engine without a word."""
        try:
            prompt = await self._prepare(request)
            if prompt is not None:
                self._generate(request, prompt)
                await request.ended.wait()
        except Exception:  # border: one request
            logger.exception("request %d failed", request.number)
            if not request.ended.is_set():
                self._send([self._end(request, "X", _INTERNAL_ERROR)])
                self._cancel(request)
        finally:
            if not request.ended.is_set():
                self._cancel(request)
            self._forget(request)

    def stop(self, number: int) -> None:
        """Stop a request; its terminal piece follows. Unknown numbers ended already."""
        request = self._requests.get(number)
        if request is None or request.is_stopped:
            return
        request.is_stopped = True
        request.preparing.cancel()
        self._cancel(request)

    # One request.

    async def _prepare(self, request: OpenRequest) -> Prompt | None:
        """Return the prompt, or None when the request has ended instead."""
        serving = request.serving
        if serving is None:
            self._send([self._end(request, "B", "null")])
            return None
        outcome: Prompt | Terminal = Done(Usage())  # if it is stopped meanwhile
        with request.preparing:
            outcome = await self._prompt_or_refusal(request.body, serving)
        if request.is_stopped:
            outcome = Done(Usage())
        if not isinstance(outcome, Prompt):
            self._send([self._end(request, "D", encode(outcome, Terminal))])
            return None
        if self._serving is not serving:
            self._send([self._end(request, "B", "null")])
            return None
        return outcome

    async def _prompt_or_refusal(self, body: TokenRequest, serving: Serving) -> Prompt | Terminal:
        """Check and render; the order of the checks decides which of several refusals a client sees."""
        refusal = refuse_early(body)
        if refusal is not None:
            return refusal
        if serving.enable_embeddings:
            return TokenGenerationDisabled(TOKEN_GENERATION_DISABLED_TEXT)
        if isinstance(body, ContinueFromRawPrompt):
            prompt = Prompt(body.raw_prompt, body.raw_prompt)  # markers anywhere in it decide the section
        elif serving.chat_template is None:
            return TokenGenerationDisabled(TOKEN_GENERATION_DISABLED_TEXT)
        else:
            # Packing a text that no template makes shorter would only hold everybody up.
            refusal = refuse_long(conversation_characters(body))
            if refusal is not None:
                return refusal
            variables = template_variables(body) | dict(serving.special_tokens)
            rendered = await self._renderer.render(serving.chat_template, variables)
            if not isinstance(rendered, Prompt):
                return rendered
            prompt = rendered
        return refuse_long(len(prompt.text)) or refuse_images(body) or prompt

    def _generate(self, request: OpenRequest, prompt: Prompt) -> None:
        serving = request.serving
        assert serving is not None
        request.classifier = TokenClassifier(
            markers=serving.markers,
            start=section_after(prompt.suffix, serving.markers),
            control_tokens=serving.control_tokens,
        )
        request.generation = next(self._generations)
        self._generating[request.generation] = request
        serving.engine.generate(request.generation, prompt=prompt.text, max_tokens=request.body.max_tokens)

    def _pass_on(self, request: OpenRequest, advance: Advance, pieces: list[Piece]) -> None:
        """Append what one turn gave a request; the hot path."""
        classifier = request.classifier
        assert classifier is not None
        number = request.number
        shown = classifier.feed(advance.tokens, advance.text)
        if advance.finish is not None:
            shown += classifier.finish()
        for section, text in shown:
            pieces.append((number, section.value, escape_text(text)))
        if advance.finish is None:
            return
        terminal: Terminal = Done(
            classifier.usage(
                prompt_tokens=advance.prompt_tokens, cached_prompt_tokens=advance.cached_prompt_tokens
            )
        )
        if advance.finish is Finish.FAILED:
            terminal = SamplerError(advance.failure)
        pieces.append(self._end(request, "D", encode(terminal, Terminal)))

    def _cancel(self, request: OpenRequest) -> None:
        if request.generation is not None and request.serving is not None:
            request.serving.engine.cancel(request.generation)

    def _end(self, request: OpenRequest, letter: str, text: str) -> Piece:
        """Mark a request as ended and return its terminal piece, which the caller sends at once."""
        request.ended.set()
        if request.generation is not None:
            self._generating.pop(request.generation, None)
        return (request.number, letter, text)

    def _forget(self, request: OpenRequest) -> None:
        if request.generation is not None:
            self._generating.pop(request.generation, None)
        del self._requests[request.number]
        self._open_requests.set(len(self._requests))

    def _send(self, pieces: list[Piece]) -> None:
        if pieces and self._send_step is not None:
            self._send_step(pieces)


_INTERNAL_ERROR = encode(StreamError(500, "Internal server error"))
