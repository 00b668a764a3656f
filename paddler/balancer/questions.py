"""Questions to one agent on their way: each is settled by an answer, the link's end or its deadline."""

import itertools
from collections.abc import Callable

import attrs
import trio

from paddler.errors import AgentGone, AnswerTimeout, LocalProtocolError
from paddler.messages.agent_socket import Answer, Ask, BalancerFrame
from paddler.messages.wire import encode


@attrs.define(eq=False)
class _Question:
    """One question; settled without an answer when the link ended."""

    answer: Answer | None = None
    settled: trio.Event = attrs.field(factory=trio.Event)


class Questions:
    """All open questions of one link; `send` takes a frame for the agent and may end the link."""

    def __init__(self, agent_id: str, *, send: Callable[[str], None], answer_timeout: float) -> None:
        self._agent_id = agent_id
        self._send = send
        self._answer_timeout = answer_timeout
        self._open: dict[int, _Question] = {}
        self._numbers = itertools.count(1)

    async def ask(self, about: str) -> Answer:
        """Ask the agent and return its answer; cancellation forgets the question.

        Raises AgentGone, AnswerTimeout, and LocalProtocolError when the question cannot be sent.
        """
        number = next(self._numbers)
        question = self._open[number] = _Question()
        try:
            self._send(encode(Ask(number, about), BalancerFrame))
            if question.settled.is_set():
                raise LocalProtocolError(f"the outbox of agent {self._agent_id} has no room for a question")
            with trio.fail_after(self._answer_timeout):
                await question.settled.wait()
        except trio.TooSlowError:
            raise AnswerTimeout(self._agent_id, self._answer_timeout) from None
        finally:
            del self._open[number]
        if question.answer is None:
            raise AgentGone(self._agent_id)
        return question.answer

    def settle(self, answer: Answer) -> None:
        """Take an answer; one that comes too late has nobody waiting."""
        question = self._open.get(answer.question)
        if question is not None:
            question.answer = answer
            question.settled.set()

    def end_all(self) -> None:
        """Settle every question without an answer: the link ended."""
        for question in self._open.values():
            question.settled.set()
