import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from paddler.balancer.agent_link import AgentLinks
from paddler.balancer.reconciliation import Reconciliation
from paddler.balancer.state_store import MemoryStore, StateStore
from paddler.errors import ConfigurationError, StateStoreError
from paddler.messages.agent_socket import SetState
from paddler.messages.state import (
    DEFAULT_DESIRED_STATE,
    DETERMINISTIC_PARAMETERS,
    ChatTemplate,
    DesiredState,
    HuggingFaceModel,
    LocalModel,
    UrlModel,
)
from tests.balancer.services import make_services
from tests.fakes.scripted_agent import connected_agent

MODEL = attrs.evolve(DEFAULT_DESIRED_STATE, model=LocalModel("/models/a.gguf"))
OTHER = attrs.evolve(DEFAULT_DESIRED_STATE, model=LocalModel("/models/b.gguf"))


@attrs.define
class SlowStore:
    """A store whose writes wait to be let through, or fail."""

    state: DesiredState | None = None
    error: StateStoreError | None = None
    let_through: trio.Semaphore = attrs.field(factory=lambda: trio.Semaphore(0))

    async def load(self) -> DesiredState | None:
        if self.error is not None:
            raise self.error
        return self.state

    async def store(self, state: DesiredState) -> None:
        await self.let_through.acquire()
        if self.error is not None:
            raise self.error
        self.state = state


async def start(nursery: trio.Nursery, store: StateStore, links: AgentLinks) -> Reconciliation:
    reconciliation = Reconciliation(store=store, links=links)
    await nursery.start(lambda **status: reconciliation.keep_agents_reconciled(**status))
    return reconciliation


@pytest.mark.scenario("SD-1", "SD-3")
async def test_a_fresh_balancer_has_the_default_state_in_force(nursery: trio.Nursery) -> None:
    reconciliation = await start(nursery, MemoryStore(), make_services().links)
    assert await reconciliation.desired_state() == DEFAULT_DESIRED_STATE
    assert reconciliation.applicable_state is not None
    assert reconciliation.applicable_state.model == "None"
    assert reconciliation.applicable_state.chat_template_override is None
    nursery.cancel_scope.cancel()


@pytest.mark.scenario("SD-2", "SD-4", "SD-8")
@pytest.mark.parametrize(
    "state",
    [
        attrs.evolve(DEFAULT_DESIRED_STATE, inference_parameters=DETERMINISTIC_PARAMETERS),
        attrs.evolve(DEFAULT_DESIRED_STATE, model=HuggingFaceModel("a.gguf", "owner/repo", "main")),
        attrs.evolve(
            DEFAULT_DESIRED_STATE,
            model=UrlModel("https://host/a.gguf"),
            multimodal_projection=LocalModel("/models/mmproj.gguf"),
        ),
    ],
)
async def test_a_state_that_was_put_is_returned(nursery: trio.Nursery, state: DesiredState) -> None:
    reconciliation = await start(nursery, MemoryStore(), make_services().links)
    await reconciliation.put(state)
    assert await reconciliation.desired_state() == state
    assert reconciliation.applicable_state == state.applicable()
    nursery.cancel_scope.cancel()


async def test_a_new_state_reaches_every_agent_also_beside_one_that_reads_nothing(
    nursery: trio.Nursery,
) -> None:
    services = make_services()
    reconciliation = await start(nursery, MemoryStore(), services.links)
    async with (
        connected_agent(services.links, "stuck", unread_frames=1),
        connected_agent(services.links, "well") as well,
    ):
        assert await well.next_frame_of(SetState) == SetState(DEFAULT_DESIRED_STATE.applicable())
        await reconciliation.put(MODEL)
        assert await well.next_frame_of(SetState) == SetState(MODEL.applicable())
        nursery.cancel_scope.cancel()


async def test_a_state_equal_to_the_one_in_force_is_stored_and_changes_nothing(nursery: trio.Nursery) -> None:
    services = make_services()
    store = MemoryStore()
    reconciliation = await start(nursery, store, services.links)
    with_unused_override = attrs.evolve(DEFAULT_DESIRED_STATE, chat_template_override=ChatTemplate("x"))
    async with connected_agent(services.links) as agent:
        changes = reconciliation.changes.subscribe()
        await reconciliation.put(with_unused_override)
        assert await store.load() == with_unused_override
        await reconciliation.put(MODEL)
        await agent.next_frame_of(SetState)
        assert await agent.next_frame_of(SetState) == SetState(MODEL.applicable()), "the second, not a third"
        with trio.fail_after(1):
            await changes.wait()
        nursery.cancel_scope.cancel()


async def test_the_override_is_applied_only_when_its_flag_is_on(nursery: trio.Nursery) -> None:
    reconciliation = await start(nursery, MemoryStore(), make_services().links)
    override = ChatTemplate("{{ messages }}")
    for flag, applied in ((False, None), (True, override), (False, None)):
        await reconciliation.put(
            attrs.evolve(MODEL, chat_template_override=override, use_chat_template_override=flag)
        )
        assert reconciliation.applicable_state is not None
        assert reconciliation.applicable_state.chat_template_override == applied
    nursery.cancel_scope.cancel()


async def test_a_client_that_leaves_cannot_tear_a_change_that_has_begun(nursery: trio.Nursery) -> None:
    store = SlowStore(state=DEFAULT_DESIRED_STATE)
    reconciliation = await start(nursery, store, make_services().links)
    async with trio.open_nursery() as clients:
        clients.start_soon(reconciliation.put, MODEL)
        await wait_all_tasks_blocked()
        clients.start_soon(reconciliation.put, OTHER)
        await wait_all_tasks_blocked()
        clients.cancel_scope.cancel()
    store.let_through.release()
    store.let_through.release()
    await wait_all_tasks_blocked()
    assert store.state == MODEL, "the second change was still the client's own"
    assert reconciliation.applicable_state == MODEL.applicable()
    nursery.cancel_scope.cancel()


async def test_changes_are_stored_and_applied_one_after_the_other(nursery: trio.Nursery) -> None:
    store = SlowStore(state=DEFAULT_DESIRED_STATE)
    reconciliation = await start(nursery, store, make_services().links)
    for state in (MODEL, OTHER):
        nursery.start_soon(reconciliation.put, state)
        await wait_all_tasks_blocked()
    for state in (MODEL, OTHER):
        store.let_through.release()
        await wait_all_tasks_blocked()
        assert store.state == state
        assert reconciliation.applicable_state == state.applicable()
    nursery.cancel_scope.cancel()


async def test_a_state_that_cannot_be_stored_is_not_applied_and_the_next_one_can(
    nursery: trio.Nursery,
) -> None:
    store = SlowStore(state=DEFAULT_DESIRED_STATE)
    reconciliation = await start(nursery, store, make_services().links)
    store.error = StateStoreError("disk full")
    store.let_through.release()
    with pytest.raises(StateStoreError, match="disk full"):
        await reconciliation.put(MODEL)
    with pytest.raises(StateStoreError, match="disk full"):
        await reconciliation.desired_state()
    assert reconciliation.applicable_state == DEFAULT_DESIRED_STATE.applicable()
    store.error = None
    store.let_through.release()
    await reconciliation.put(OTHER)
    assert reconciliation.applicable_state == OTHER.applicable()
    nursery.cancel_scope.cancel()


async def test_an_unreadable_store_ends_the_start(nursery: trio.Nursery) -> None:
    reconciliation = Reconciliation(
        store=SlowStore(error=StateStoreError("cannot parse")), links=make_services().links
    )
    with pytest.raises(ConfigurationError, match="cannot parse"):
        await reconciliation.keep_agents_reconciled()


async def test_a_store_that_lost_its_state_gets_the_default_which_is_then_in_force(
    nursery: trio.Nursery,
) -> None:
    store = SlowStore(state=MODEL)
    store.let_through.release()
    reconciliation = await start(nursery, store, make_services().links)
    store.state = None
    assert await reconciliation.desired_state() == DEFAULT_DESIRED_STATE
    assert await store.load() == DEFAULT_DESIRED_STATE
    assert reconciliation.applicable_state == DEFAULT_DESIRED_STATE.applicable()
    nursery.cancel_scope.cancel()
