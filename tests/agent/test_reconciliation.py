"""Desired state becomes a model that serves, and what is in the way is shown."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from paddler.agent.model_service import ModelService
from paddler.agent.preparation_pool import PreparationFailed
from paddler.agent.reconciliation import Reconciliation
from paddler.agent.slots import Slots
from paddler.agent.status import StatusBoard
from paddler.config import EngineTimeouts, KvLayout
from paddler.engine.pipe import Adapter
from paddler.errors import EngineDied, EngineHung, ModelUnavailable
from paddler.messages.agent_socket import AgentStatus, Piece
from paddler.messages.inference import ContinueFromRawPrompt
from paddler.messages.state import (
    DEFAULT_DESIRED_STATE,
    DEFAULT_PARAMETERS,
    ApplicableState,
    ChatTemplate,
    ChatTemplateDoesNotCompile,
    LocalModel,
    LoraAdapter,
    LoraSource,
    ModelCannotBeLoaded,
    ModelFileDoesNotExist,
    ModelPath,
    ModelSource,
    MultimodalProjectionCannotBeLoaded,
    SlotCannotStart,
    StateApplicationStatus,
    UnableToFindChatTemplate,
)
from tests.agent.local_renderer import LocalRenderer
from tests.fakes.scripted_engine import ScriptedEngines, model

NO_MODEL = DEFAULT_DESIRED_STATE.applicable()
A = attrs.evolve(NO_MODEL, model=LocalModel("/models/a.gguf"))
B = attrs.evolve(NO_MODEL, model=LocalModel("/models/b.gguf"))
MISSING = attrs.evolve(NO_MODEL, model=LocalModel("/models/missing.gguf"))
EMBEDDINGS = attrs.evolve(DEFAULT_PARAMETERS, enable_embeddings=True)
A_EMBEDS = attrs.evolve(A, inference_parameters=EMBEDDINGS)

APPLIED = StateApplicationStatus.APPLIED
FRESH = StateApplicationStatus.FRESH
RETRYING = StateApplicationStatus.ATTEMPTED_AND_RETRYING
STUCK = StateApplicationStatus.STUCK


def with_override(state: ApplicableState, content: str) -> ApplicableState:
    return attrs.evolve(state, chat_template_override=ChatTemplate(content))


class Agent:
    """An agent without a link: the test is its balancer."""

    def __init__(self, engines: ScriptedEngines, requests: trio.Nursery) -> None:
        self.engines = engines
        self.missing = {"/models/missing.gguf"}
        self.resolving: list[str] = []
        self.resolve_delay = 0.0
        self.unhurried_searches = 0.0
        self.renderer = LocalRenderer()
        self.board = StatusBoard(slots=2)
        self.slots = Slots(preparer=self.renderer)
        self.reconciliation = Reconciliation(
            board=self.board,
            slots=self.slots,
            service=ModelService(
                board=self.board,
                slots=self.slots,
                preparer=self.renderer,
                open_engine=engines.open_engine,
                engine_timeouts=EngineTimeouts(),
                kv_layout=KvLayout.AUTO,
                threads=1,
                exact=False,
                prefix_cache=True,
                prefix_cache_bytes=0,
            ),
            find_model=self._find,
            find_projection=self._find,
            find_adapter=self._find_adapter,
        )
        self.pieces: list[Piece] = []
        self._requests = requests

    async def _find_adapter(self, source: LoraSource) -> str:
        path = await self._find(source)
        assert path is not None
        return path

    async def _find(self, source: ModelSource) -> str | None:
        if source == "None":
            return None
        assert isinstance(source, LocalModel)
        self.resolving.append(source.path)
        with trio.CancelScope(shield=True):
            await trio.sleep(self.unhurried_searches)
        await trio.sleep(self.resolve_delay)
        if source.path in self.missing:
            raise ModelUnavailable((ModelFileDoesNotExist(source.path),))
        return source.path

    @property
    def status(self) -> AgentStatus:
        return self.board.status

    @property
    def loaded(self) -> list[str]:
        return [settings.model_path for settings in self.engines.loads]

    def receive(self, state: ApplicableState) -> None:
        self.reconciliation.receive(state)

    async def until(self, condition: Callable[[AgentStatus], bool], *, within: float = 30) -> AgentStatus:
        with trio.fail_after(within):
            status = self.status
            while not condition(status):
                status = await self.board.newer_than(status)
        return status

    async def serves(self, state: ApplicableState) -> None:
        self.receive(state)
        await wait_all_tasks_blocked()
        await self.until(lambda status: status.slots_total == 2)

    async def start(self, number: int, *, max_tokens: int = 4) -> None:
        body = ContinueFromRawPrompt(max_tokens=max_tokens, raw_prompt="one two three four five six")
        self._requests.start_soon(self.slots.run, self.slots.accept(number, body))
        await wait_all_tasks_blocked()

    def letters(self, number: int) -> str:
        return "".join(letter for request, letter, _ in self.pieces if request == number)


async def note_statuses(agent: Agent, seen: list[StateApplicationStatus]) -> None:
    """Append every status that is published from now on and differs from the one before."""
    status = agent.status
    seen.append(status.state_application_status)
    while True:
        status = await agent.board.newer_than(status)
        if status.state_application_status is not seen[-1]:
            seen.append(status.state_application_status)


@asynccontextmanager
async def open_agent(**engine: Any) -> AsyncIterator[Agent]:
    async with trio.open_nursery() as services:
        agent = Agent(ScriptedEngines(**engine), services)
        services.start_soon(agent.reconciliation.apply_desired_state)
        with agent.slots.connected(agent.pieces.extend):
            yield agent
            services.cancel_scope.cancel()
            await trio.lowlevel.checkpoint_if_cancelled()


async def test_a_model_is_loaded_and_served(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        assert agent.status.state_application_status is FRESH
        agent.receive(A)
        loading = await agent.until(lambda status: status.download_total > 0)
        assert (loading.download_current, loading.download_filename) == (500, "a.gguf")
        assert (loading.slots_total, loading.state_application_status) == (0, FRESH)
        status = await agent.until(lambda status: status.slots_total > 0)
        assert status.state_application_status is APPLIED
        assert (status.slots_total, status.model_path) == (2, "/models/a.gguf")
        assert (status.download_current, status.download_total, status.download_filename) == (0, 0, None)
        assert status.download_indeterminate
        await agent.start(1)
        await trio.sleep(1)
        assert agent.letters(1) == "CCCCD"
    assert agent.engines.running == []


async def test_no_model_is_applied_with_no_slots(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        agent.receive(NO_MODEL)
        status = await agent.until(lambda status: status.state_application_status is APPLIED)
        assert (status.slots_total, status.model_path, status.issues) == (0, None, ())
        await agent.start(1)
        assert agent.letters(1) == "B"


async def test_an_equal_state_changes_nothing(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        await agent.serves(A)
        version = agent.status.version
        agent.receive(attrs.evolve(A))
        await trio.sleep(5)
        assert (agent.loaded, agent.status.version) == (["/models/a.gguf"], version)


@pytest.mark.scenario("SW-1", "IS-7")
async def test_the_old_model_serves_while_the_new_one_cannot_be_resolved(autojump_clock: MockClock) -> None:
    async with open_agent(turn=1.0) as agent:
        await agent.serves(A)
        await agent.start(1)
        agent.receive(MISSING)
        await agent.until(lambda status: status.issues != ())
        assert agent.status.issues == (ModelFileDoesNotExist("/models/missing.gguf"),)
        assert agent.status.slots_total == 2
        await agent.start(2)
        await trio.sleep(20)
        assert agent.letters(1) == agent.letters(2) == "CCCCD"
        agent.receive(A)
        status = await agent.until(lambda status: status.issues == ())
        await trio.sleep(5)
        assert (status.state_application_status, agent.loaded) == (APPLIED, ["/models/a.gguf"])


async def test_a_missing_file_is_looked_for_every_second_and_found(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        agent.receive(MISSING)
        await agent.until(lambda status: status.issues != ())
        assert agent.status.state_application_status is FRESH
        for expected in (RETRYING, STUCK, RETRYING):
            await trio.sleep(1.01)
            assert agent.status.state_application_status is expected
        agent.missing.clear()
        status = await agent.until(lambda status: status.slots_total == 2, within=1.2)
        assert (status.issues, status.state_application_status) == ((), APPLIED)


async def test_a_newer_state_ends_the_search_for_the_older(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        agent.resolve_delay = 1000
        agent.receive(A)
        await wait_all_tasks_blocked()
        agent.resolve_delay = 0
        agent.receive(B)
        await agent.until(lambda status: status.slots_total == 2, within=5)
        assert (agent.resolving, agent.loaded) == (["/models/a.gguf", "/models/b.gguf"], ["/models/b.gguf"])


@pytest.mark.scenario("SW-2", "SW-3")
async def test_running_requests_finish_before_the_switch_and_arrivals_are_bounced(
    autojump_clock: MockClock,
) -> None:
    async with open_agent(turn=1.0) as agent:
        await agent.serves(A)
        await agent.start(1)
        agent.receive(with_override(A, "B: {{ messages[0].content }}"))
        await agent.until(lambda status: status.slots_total == 0)
        assert agent.letters(1) == ""
        assert agent.status.uses_chat_template_override
        await agent.start(2)
        assert agent.letters(2) == "B"
        status = await agent.until(lambda status: status.slots_total == 2)
        assert agent.letters(1) == "CCCCD"
        assert (len(agent.engines.loads), status.state_application_status) == (2, APPLIED)


@pytest.mark.scenario("SH-5")
async def test_a_load_is_left_for_a_newer_state_and_at_shutdown(autojump_clock: MockClock) -> None:
    async with open_agent(load_time=1000) as agent:
        agent.receive(A)
        await agent.until(lambda status: status.download_total > 0)
        agent.receive(NO_MODEL)
        status = await agent.until(lambda status: status.state_application_status is APPLIED, within=1)
        assert (status.download_total, status.slots_total) == (0, 0)
        agent.receive(B)
        await agent.until(lambda status: status.download_total > 0)
    assert agent.engines.running == []
    assert agent.status.download_total == 0


async def test_a_state_resolved_during_the_drain_replaces_the_one_before(autojump_clock: MockClock) -> None:
    async with open_agent(turn=1.0) as agent:
        await agent.serves(A)
        await agent.start(1)
        agent.receive(B)
        await agent.until(lambda status: status.slots_total == 0)
        agent.receive(NO_MODEL)
        await agent.until(lambda status: status.model_path is None)
        await trio.sleep(1)
        assert (agent.loaded, agent.letters(1)) == (["/models/a.gguf"], "CCCCD")


async def test_the_state_that_serves_asked_for_again_during_its_drain_serves_again(
    autojump_clock: MockClock,
) -> None:
    async with open_agent() as agent:
        await agent.serves(A)
        await agent.start(1)
        agent.receive(B)
        await agent.until(lambda status: status.slots_total == 0)
        await agent.serves(A)
        assert agent.loaded == ["/models/a.gguf", "/models/a.gguf"]


async def test_a_state_asked_for_again_while_its_search_is_given_up_is_searched_again(
    autojump_clock: MockClock,
) -> None:
    """A look at a file runs in a thread, which cannot be cancelled: giving up takes a while."""
    async with open_agent() as agent:
        agent.unhurried_searches = 1.0
        agent.receive(A)
        await wait_all_tasks_blocked()
        agent.receive(B)
        await wait_all_tasks_blocked()
        await agent.serves(A)
        assert agent.loaded == ["/models/a.gguf"]


@pytest.mark.scenario("IS-8")
async def test_a_model_that_cannot_be_loaded_is_tried_every_second(autojump_clock: MockClock) -> None:
    broken = ModelUnavailable((ModelCannotBeLoaded("/models/a.gguf"),))
    async with open_agent() as agent:
        agent.engines.refusals.extend([broken] * 3)
        agent.receive(A)
        seen = [(await agent.until(lambda status: status.issues != ())).state_application_status]
        assert agent.status.issues == broken.issues
        for _ in range(3):
            await trio.sleep(1.1)
            seen.append(agent.status.state_application_status)
        assert seen == [FRESH, RETRYING, STUCK, RETRYING]
        status = await agent.until(lambda status: status.slots_total == 2)
        assert (status.issues, status.state_application_status) == ((), APPLIED)


@pytest.mark.scenario("IS-14")
async def test_slots_that_cannot_start_are_shown(autojump_clock: MockClock) -> None:
    issues = tuple(SlotCannotStart("at most 256 sequences", index) for index in range(2))
    async with open_agent() as agent:
        agent.engines.refusals.append(ModelUnavailable(issues))
        agent.receive(A)
        assert (await agent.until(lambda status: status.issues != ())).issues == issues


@pytest.mark.scenario("IS-12", "IS-13")
async def test_an_override_that_does_not_compile_is_shown_until_it_is_replaced(
    autojump_clock: MockClock,
) -> None:
    broken = "{{invalid jinja template"
    async with open_agent() as agent:
        agent.receive(with_override(A, broken))
        [issue] = (await agent.until(lambda status: status.issues != ())).issues
        assert isinstance(issue, ChatTemplateDoesNotCompile)
        assert (issue.model_path, issue.template_content) == (ModelPath("/models/a.gguf"), broken)
        assert "syntax error" in issue.error
        assert agent.status.model_path is None
        agent.receive(with_override(A, "{{ messages[0].content }}"))
        await agent.until(lambda status: status.issues == (), within=3)
        await agent.until(lambda status: status.slots_total == 2)


async def test_a_host_that_cannot_check_a_template_does_not_make_it_a_broken_one(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_agent() as agent:
        agent.renderer.failures.extend([PreparationFailed("died: SIGKILL")] * 3)
        agent.receive(A)
        status = await agent.until(lambda status: status.state_application_status is STUCK)
        assert status.issues == ()
        status = await agent.until(lambda status: status.slots_total == 2, within=2)
        assert (status.issues, status.state_application_status) == ((), APPLIED)
        assert len(agent.loaded) == 4
        assert [record.getMessage() for record in caplog.records] == [
            "/models/a.gguf is not served: the preparation process died: SIGKILL"
        ]


@pytest.mark.scenario("IS-11")
async def test_a_model_without_template_needs_an_override(autojump_clock: MockClock) -> None:
    async with open_agent(models={"/models/a.gguf": model(chat_template=None)}) as agent:
        agent.receive(A)
        status = await agent.until(lambda status: status.issues != ())
        assert status.issues == (UnableToFindChatTemplate("/models/a.gguf"),)
        await agent.serves(with_override(A, "{{ messages[0].content }}"))
        assert agent.status.issues == ()


async def test_embeddings_need_no_template(autojump_clock: MockClock) -> None:
    async with open_agent(models={"/models/a.gguf": model(chat_template=None)}) as agent:
        await agent.serves(A_EMBEDS)
        await agent.start(1)
        assert agent.letters(1) == "D"
        assert "TokenGenerationDisabled" in agent.pieces[0][2]


@pytest.mark.scenario("SW-7")
async def test_a_token_request_after_a_switch_from_embeddings_is_bounced_while_the_files_are_looked_for(
    autojump_clock: MockClock,
) -> None:
    async with open_agent() as agent:
        await agent.serves(A_EMBEDS)
        agent.resolve_delay = 5.0
        agent.receive(B)
        assert agent.status.slots_total == 0  # at once: a bounced request must not come back every status
        await agent.start(1)
        assert agent.letters(1) == "B"
        await agent.until(lambda status: status.slots_total == 2)
        await agent.start(2)
        await trio.sleep(1)
        assert agent.letters(2) == "CCCCD"


async def test_embeddings_are_served_again_when_the_switch_to_tokens_is_taken_back(
    autojump_clock: MockClock,
) -> None:
    async with open_agent() as agent:
        await agent.serves(A_EMBEDS)
        agent.receive(MISSING)
        await agent.until(lambda status: status.issues != ())
        assert agent.status.slots_total == 0
        agent.receive(A_EMBEDS)
        assert agent.status.slots_total == 2
        status = await agent.until(lambda status: status.state_application_status is APPLIED)
        assert (status.issues, agent.loaded) == ((), ["/models/a.gguf"])
        await agent.start(1)
        assert "TokenGenerationDisabled" in agent.pieces[0][2]


async def test_a_load_for_embeddings_that_ends_after_tokens_were_asked_for_announces_nothing(
    autojump_clock: MockClock,
) -> None:
    async with open_agent(load_time=1.0) as agent:
        agent.receive(A_EMBEDS)
        await agent.until(lambda status: status.download_total > 0)
        agent.receive(MISSING)
        await trio.sleep(2)
        assert len(agent.engines.running) == 1
        assert agent.status.slots_total == 0
        assert agent.status.state_application_status in (RETRYING, STUCK)
        await agent.start(1)
        assert agent.letters(1) == "B"


async def test_requests_after_a_switch_to_embeddings_wait_for_their_engine(
    autojump_clock: MockClock,
) -> None:
    async with open_agent() as agent:
        await agent.serves(A)
        agent.resolve_delay = 5.0
        agent.receive(A_EMBEDS)
        assert agent.status.slots_total == 0
        await agent.start(1)
        assert agent.letters(1) == "B"


@pytest.mark.parametrize("state", [B, NO_MODEL])
async def test_a_switch_is_fresh_from_the_state_that_was_received_until_it_is_applied(
    autojump_clock: MockClock, state: ApplicableState
) -> None:
    seen: list[StateApplicationStatus] = []
    async with open_agent(turn=1.0) as agent, trio.open_nursery() as watchers:
        await agent.serves(A)
        await agent.start(1)
        watchers.start_soon(note_statuses, agent, seen)
        await wait_all_tasks_blocked()
        agent.receive(state)
        assert agent.status.state_application_status is FRESH
        await trio.sleep(2)
        assert agent.letters(1).strip("C") == ""  # it drains
        await trio.sleep(20)
        assert seen == [APPLIED, FRESH, APPLIED]
        watchers.cancel_scope.cancel()


async def test_a_state_that_was_stuck_is_fresh_once_its_files_are_there(autojump_clock: MockClock) -> None:
    seen: list[StateApplicationStatus] = []
    async with open_agent(turn=1.0) as agent, trio.open_nursery() as watchers:
        await agent.serves(A)
        watchers.start_soon(note_statuses, agent, seen)
        await wait_all_tasks_blocked()
        agent.receive(MISSING)
        await agent.until(lambda status: status.state_application_status is STUCK)
        await agent.start(1)
        agent.missing.clear()
        await agent.until(lambda status: status.state_application_status is APPLIED)
        await wait_all_tasks_blocked()
        assert seen[:4] == [APPLIED, FRESH, RETRYING, STUCK]
        assert APPLIED not in seen[1:-1]
        assert seen[-2:] == [FRESH, APPLIED]
        watchers.cancel_scope.cancel()


async def test_an_engine_that_dies_during_the_drain_leaves_the_new_state_fresh(
    autojump_clock: MockClock,
) -> None:
    seen: list[StateApplicationStatus] = []
    async with open_agent(turn=1.0) as agent, trio.open_nursery() as watchers:
        await agent.serves(A)
        await agent.start(1)
        watchers.start_soon(note_statuses, agent, seen)
        await wait_all_tasks_blocked()
        agent.receive(B)
        await trio.sleep(1)
        agent.engines.current.die(EngineDied("SIGABRT"))
        await agent.until(lambda status: status.slots_total == 2)
        await wait_all_tasks_blocked()
        assert seen == [APPLIED, FRESH, APPLIED]
        watchers.cancel_scope.cancel()


async def test_a_state_that_came_and_went_in_one_tick_leaves_no_trace(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        await agent.serves(A)
        agent.receive(B)
        agent.receive(A)
        assert agent.status.state_application_status is APPLIED
        await trio.sleep(5)
        assert (agent.status.state_application_status, agent.loaded) == (APPLIED, ["/models/a.gguf"])


async def test_adapters_are_found_and_loaded_with_the_model(autojump_clock: MockClock) -> None:
    adapters = LoraAdapter(LocalModel("/a"), 0.5), LoraAdapter(LocalModel("/b"), -1.0)
    async with open_agent() as agent:
        await agent.serves(A)
        agent.receive(attrs.evolve(A, lora_adapters=adapters))
        await agent.until(lambda status: status.slots_total == 0)
        await agent.until(lambda status: status.slots_total == 2)
        assert [settings.adapters for settings in agent.engines.loads] == [
            (),
            (Adapter("/a", 0.5), Adapter("/b", -1.0)),
        ]


async def test_a_state_whose_adapter_is_missing_waits_for_it(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        await agent.serves(A)
        agent.receive(attrs.evolve(A, lora_adapters=(LoraAdapter(LocalModel("/models/missing.gguf")),)))
        status = await agent.until(lambda status: status.issues != ())
        assert status.issues == (ModelFileDoesNotExist("/models/missing.gguf"),)
        assert (status.slots_total, agent.loaded) == (2, ["/models/a.gguf"])
        agent.missing.clear()
        status = await agent.until(lambda status: status.issues == ())
        await agent.until(lambda _: len(agent.loaded) == 2)
        status = await agent.until(lambda status: status.slots_total == 2)
        assert (status.issues, status.state_application_status) == ((), APPLIED)


async def test_no_adapter_is_looked_for_without_a_model(autojump_clock: MockClock) -> None:
    async with open_agent() as agent:
        adapters = (LoraAdapter(LocalModel("/models/missing.gguf")),)
        agent.receive(attrs.evolve(A, model="None", lora_adapters=adapters))
        status = await agent.until(lambda status: status.state_application_status is APPLIED)
        assert status.issues == ()


@pytest.mark.scenario("IS-10")
async def test_a_broken_projection_is_shown_when_the_model_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(b"nothing")
    async with open_agent(load_time=0) as agent:
        agent.receive(attrs.evolve(A, multimodal_projection=LocalModel(str(path))))
        status = await agent.until(lambda status: status.issues != ())
        assert status.issues == (MultimodalProjectionCannotBeLoaded(str(path)),)
        assert status.model_path == "/models/a.gguf"


@pytest.mark.parametrize(
    ("failure", "cause"),
    [(EngineDied("SIGKILL", "out of memory"), "SIGKILL"), (EngineHung(31.0, "spinning"), "hang")],
)
async def test_a_failed_engine_fails_its_requests_and_is_restarted(
    autojump_clock: MockClock, failure: EngineDied | EngineHung, cause: str
) -> None:
    async with open_agent(turn=1.0) as agent:
        await agent.serves(A)
        await agent.start(1)
        await agent.start(2)
        agent.engines.current.die(failure)
        status = await agent.until(lambda status: status.issues != ())
        assert status.slots_total == 0
        assert status.state_application_status is RETRYING
        assert [issue.slot_index for issue in status.issues if isinstance(issue, SlotCannotStart)] == [0, 1]
        assert all(cause in str(issue) and failure.last_words in str(issue) for issue in status.issues)
        assert agent.letters(1) == agent.letters(2) == "X"
        assert f'"Engine stopped: {cause}"' in agent.pieces[0][2]
        status = await agent.until(lambda status: status.slots_total == 2, within=0.5)
        assert (status.issues, status.state_application_status) == ((), APPLIED)
        await agent.start(3)
        await trio.sleep(10)
        assert agent.letters(3) == "CCCCD"


async def test_an_engine_that_keeps_failing_is_restarted_less_and_less_often(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_agent(load_time=0) as agent:
        agent.engines.refusals.extend([EngineDied("SIGSEGV")] * 12)
        began = trio.current_time()
        agent.receive(A)
        await agent.until(lambda status: status.slots_total == 2, within=100)
        elapsed = trio.current_time() - began
        assert elapsed == pytest.approx(0.1 * (2**7 - 1) + 5 * 10)
        assert len(caplog.records) == 1  # of WARNING: each reason is logged once
        await trio.sleep(31)
        agent.engines.current.die(EngineDied("SIGSEGV"))
        await agent.until(lambda status: status.slots_total == 0)
        await agent.until(lambda status: status.slots_total == 2, within=0.2)


async def test_a_slow_load_is_no_good_time_of_an_engine(autojump_clock: MockClock) -> None:
    async with open_agent(load_time=60.0) as agent:
        agent.receive(A)
        await agent.until(lambda status: status.slots_total == 2, within=100)
        for pause in (0.1, 0.2, 0.4):
            agent.engines.current.die(EngineDied("SIGSEGV"))
            await agent.until(lambda status: status.slots_total == 0)
            began = trio.current_time()
            await agent.until(lambda status: status.slots_total == 2, within=100)
            assert trio.current_time() - began == pytest.approx(pause + 60)


async def test_an_engine_that_dies_during_the_drain_does_not_hold_the_new_state_up(
    autojump_clock: MockClock,
) -> None:
    async with open_agent(turn=100.0) as agent:
        await agent.serves(A)
        await agent.start(1)
        agent.receive(B)
        await agent.until(lambda status: status.slots_total == 0)
        agent.engines.current.die(EngineDied("SIGABRT"))
        await agent.until(lambda status: status.model_path == "/models/b.gguf", within=105)
        assert agent.letters(1) == "X"
        assert (await agent.until(lambda status: status.slots_total == 2)).issues == ()


@pytest.mark.scenario("MA-8")
async def test_metadata_of_the_model_loaded_last_is_kept(autojump_clock: MockClock) -> None:
    def known(agent: Agent) -> dict[str, str]:
        metadata = agent.reconciliation.model_metadata
        return metadata.metadata if metadata is not None else {}

    async with open_agent(models={"/models/b.gguf": model(architecture="other")}) as agent:
        assert known(agent) == {}
        await agent.serves(A)
        assert list(known(agent)) == [
            "general.architecture",
            "paddler.cells_per_slot",
            "paddler.kv_layout",
            "paddler.kv_layout_reason",
            "tokenizer.chat_template",
        ]
        agent.receive(NO_MODEL)
        await agent.until(lambda status: status.model_path is None)
        assert known(agent)["general.architecture"] == "scripted"
        await agent.serves(B)
        assert known(agent)["general.architecture"] == "other"
