"""Requests on this agent: prepare, generate, classify, answer; one task per request.

Tokens never wait here: the engine's reader calls `on_turn`, which classifies what a turn, or several
short ones, gave all slots and sends it as one step frame.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import attrs
import trio

from paddler.agent.embedding import EmbeddingAnswer, embedding_terminal
from paddler.agent.held_requests import HeldRequests, SendHeld
from paddler.agent.preparation import Preparer
from paddler.agent.serving import Serving
from paddler.agent.status import Latest
from paddler.agent.token_answer import AnswerPiece, TokenAnswer
from paddler.agent.token_preparation import PreparedTokens, prepare_tokens
from paddler.engine.pipe import Advance, Embedded, Held
from paddler.errors import RemoteProtocolError
from paddler.language.chat_template import template_variables
from paddler.messages.agent_socket import Piece
from paddler.messages.embeddings import EmbeddingTerminal
from paddler.messages.inference import (
    ContinueFromConversationHistory,
    GenerateEmbeddingBatch,
    Request,
    TokenRequest,
)
from paddler.messages.tokens import Done, StreamError, Terminal, Usage
from paddler.messages.wire import encode, unstructure

# Theory of operation
#
# A request is *accepted* (registered, synchronously, so that a Stop right behind it finds it), then
# its task *prepares* it, hands it to the engine and waits for its *end*. Whoever ends it sends its
# terminal piece and marks it as ended, in one breath: its task (refusals, bounces, and what waited for
# the check of a tool call), `on_turn` or `on_embedded` (what the engine says) or `fail` (the engine is
# gone). A request whose task is cancelled ended with its link: the engine is told, nobody else.
#
# While a state is drained the door is closed: arrivals are bounced, accepted requests go on. A
# request belongs to the `Serving` that it was accepted for; if that is gone when its prompt is ready
# (the engine failed meanwhile), it is bounced: nobody has seen anything of it yet.

SendStep = Callable[[list[Piece]], None]

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class OpenRequest:
    """A request on this agent; `number` is the link's, `generation` the engine's."""

    number: int
    body: Request
    serving: Serving | None
    preparing: trio.CancelScope = attrs.Factory(trio.CancelScope)
    is_stopped: bool = False
    generation: int | None = None
    answer: TokenAnswer | None = None
    embedding: EmbeddingAnswer | None = None
    has_ended: bool = False
    news: trio.Event = attrs.Factory(trio.Event)
    """It has ended, or there are calls to check."""


class Slots:
    """All requests of this agent, whatever the link and the engine they came to."""

    def __init__(self, *, preparer: Preparer) -> None:
        self._preparer = preparer
        self._serving: Serving | None = None
        self._is_open = False
        self._send_step: SendStep | None = None
        self._requests: dict[int, OpenRequest] = {}
        self._generating: dict[int, OpenRequest] = {}
        self._held = HeldRequests(self._generating)
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
        """Pass on what a turn or several gave, for all slots."""
        pieces: list[Piece] = []
        for advance in advances:
            request = self._generating.get(advance.generation)
            if request is None:
                continue  # cancelled with its link, or failed: nobody waits for it
            try:
                assert request.answer is not None
                pieces += self._pieces(request, request.answer.take(advance))
            except Exception:  # border: one request
                logger.exception("request %d failed", request.number)
                pieces.append(self._end(request, "X", _INTERNAL_ERROR))
                if advance.finish is None:
                    self._cancel(request)
        self._send(pieces)

    def on_embedded(self, embedded: Embedded) -> None:
        """Pass on what one turn did for an embedding request."""
        request = self._generating.get(embedded.generation)
        if request is None or request.embedding is None:
            return
        try:
            items = [*request.embedding.items(embedded)]
        except Exception:  # border: one request
            logger.exception("request %d failed", request.number)
            self._send([self._end(request, "X", _INTERNAL_ERROR)])
            if embedded.finish is None:
                self._cancel(request)
            return
        for letter, text in items:
            # A vector is long: each travels by itself, so that other frames come in between.
            is_end = letter == "F"
            self._send([self._end(request, letter, text) if is_end else (request.number, letter, text)])

    def on_held(self, held: Held) -> None:
        """Pass on whose tokens the engine holds; nobody's, when it has ended."""
        self._held.report(held)

    # For the link.

    @contextmanager
    def connected(self, send_step: SendStep, send_held: SendHeld | None = None) -> Iterator[None]:
        """Send step frames, and what the engine holds, for the duration of the block, one link's life."""
        self._send_step = send_step
        try:
            with self._held.connected(send_held):
                yield
        finally:
            self._send_step = None

    def accept(self, number: int, body: Request) -> OpenRequest:
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
            body = request.body
            if isinstance(body, GenerateEmbeddingBatch):
                self._embed(request, body)
            else:
                prepared = await self._prepare(request, body)
                if prepared is not None:
                    self._generate(request, body, prepared)
            await self._see_to_the_end(request)
        except Exception:  # border: one request
            logger.exception("request %d failed", request.number)
            if not request.has_ended:
                self._send([self._end(request, "X", _INTERNAL_ERROR)])
                self._cancel(request)
        finally:
            if not request.has_ended:
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

    async def _prepare(self, request: OpenRequest, body: TokenRequest) -> PreparedTokens | None:
        """Return what to generate from, or None when the request has ended instead."""
        serving = request.serving
        if serving is None:
            self._send([self._end(request, "B", "null")])
            return None
        outcome: PreparedTokens | Terminal = Done(Usage())  # if it is stopped meanwhile
        with request.preparing:
            outcome = await prepare_tokens(body, serving, self._preparer)
        if request.is_stopped:
            outcome = Done(Usage())
        if not isinstance(outcome, PreparedTokens):
            self._send([self._end(request, "D", encode(outcome, Terminal))])
            return None
        if self._serving is not serving:
            self._send([self._end(request, "B", "null")])
            return None
        return outcome

    def _generate(self, request: OpenRequest, body: TokenRequest, prepared: PreparedTokens) -> None:
        serving = request.serving
        assert serving is not None
        request.answer = TokenAnswer(body, serving, prepared.prompt)
        request.generation = next(self._generations)
        self._generating[request.generation] = request
        self._held.remember(request.generation, request.number)
        serving.engine.generate(
            request.generation,
            prompt=prepared.prompt.text,
            max_tokens=body.max_tokens,
            sampler=prepared.sampler,
            grammar=prepared.grammar,
            pictures=prepared.pictures,
        )

    async def _see_to_the_end(self, request: OpenRequest) -> None:
        """Wait until the request has ended; have its tool calls checked as they come."""
        while not request.has_ended:
            answer = request.answer
            if answer is None or answer.unchecked is None:
                request.news = trio.Event()
                await request.news.wait()
                continue
            assert isinstance(request.body, ContinueFromConversationHistory)
            calls = [unstructure(call) for call in answer.unchecked.payload]
            tools = template_variables(request.body)["tools"]
            violations = ["the request was stopped before its calls were checked"]
            if not request.is_stopped:
                with trio.CancelScope() as request.preparing:
                    violations = await self._preparer.call_violations(calls, tools)
            if not request.has_ended:  # the engine may be gone
                self._send(self._pieces(request, answer.checked(violations)))

    def _pieces(self, request: OpenRequest, given: list[AnswerPiece]) -> list[Piece]:
        """Address what an answer gave; its end is that of the request."""
        if request.answer is not None and request.answer.unchecked is not None:
            request.news.set()
        number = request.number
        return [
            self._end(request, letter, text) if letter == "D" else (number, letter, text)
            for letter, text in given
        ]

    def _embed(self, request: OpenRequest, body: GenerateEmbeddingBatch) -> None:
        """Hand an embedding request to the engine, or end it."""
        serving = request.serving
        if serving is None or serving is not self._serving:
            self._send([self._end(request, "B", "null")])
            return
        refusal = self._embedding_refusal(request, serving)
        if refusal is not None:
            self._send([self._end(request, *embedding_terminal(refusal))])
            return
        request.embedding = EmbeddingAnswer(body, serving.parameters.pooling_type)
        request.generation = next(self._generations)
        self._generating[request.generation] = request
        serving.engine.embed(
            request.generation,
            documents=tuple(document.content for document in body.input_batch),
            normalization_method=body.normalization_method,
        )

    def _embedding_refusal(self, request: OpenRequest, serving: Serving) -> EmbeddingTerminal | None:
        if request.is_stopped:
            return "Done"
        if not serving.enable_embeddings:
            return "EmbeddingsDisabled"
        if any(other.embedding is None for other in self._generating.values()):
            return "EmbeddingRejectedDueToActiveTokenGeneration"
        return None

    def _cancel(self, request: OpenRequest) -> None:
        if request.generation is not None and request.serving is not None:
            request.serving.engine.cancel(request.generation)

    def _end(self, request: OpenRequest, letter: str, text: str) -> Piece:
        """Mark a request as ended and return its terminal piece, which the caller sends at once."""
        request.has_ended = True
        request.news.set()
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
