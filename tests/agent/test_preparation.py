"""Real preparation processes: jobs that loop, grow or kill cost their request and nobody else."""

import os
import resource
import signal
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
import trio

from paddler.agent import preparation
from paddler.agent.preparation import Preparation, open_preparation
from paddler.agent.preparation_pool import PreparationFailed
from paddler.engine.pipe import Picture
from paddler.language.chat_template import Prompt
from paddler.messages.tokens import (
    ChatTemplateError,
    GrammarSyntaxError,
    ImageDecodingFailed,
    ToolSchemaInvalid,
)

pytestmark = pytest.mark.slow

VARIABLES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "tools": [],
    "add_generation_prompt": True,
    "enable_thinking": False,
}
TEMPLATE = "{{ messages[0].content }}{% if add_generation_prompt %}|{% endif %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def children() -> set[int]:
    """Return the processes that this one has started and not reaped."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


async def assert_still_works(service: Preparation) -> None:
    assert await service.render(TEMPLATE, VARIABLES) == Prompt("Hello|", "|")


async def test_templates_are_rendered_and_checked() -> None:
    before = children()
    async with open_preparation(timeout=10) as service:
        assert await service.compile_error(TEMPLATE) is None
        assert "syntax error" in (await service.compile_error("{{ oops") or "")
        await assert_still_works(service)
        failed = await service.render("{{ raise_exception('no') }}", VARIABLES)
        assert failed == ChatTemplateError("the model's chat template raised an exception: no")
        assert len(children() - before) == 1
    assert children() == before


async def test_jobs_at_once_share_one_process() -> None:
    before = children()
    async with open_preparation(timeout=10) as service:
        await assert_still_works(service)
        async with trio.open_nursery() as jobs:
            for _ in range(20):
                jobs.start_soon(assert_still_works, service)
        assert len(children() - before) == 1


async def test_an_endless_template_fails_its_request_and_delays_others_little() -> None:
    failed: list[Prompt | ChatTemplateError] = []

    async def run_into_the_deadline(service: Preparation) -> None:
        failed.append(await service.render(ENDLESS, VARIABLES))

    async with open_preparation(timeout=1.5) as service, trio.open_nursery() as jobs:
        await assert_still_works(service)
        jobs.start_soon(run_into_the_deadline, service)
        await trio.sleep(0.02)
        with trio.fail_after(1.4):
            await assert_still_works(service)
        assert not failed
    assert failed == [ChatTemplateError("the chat template was not rendered within 1.5 s")]


async def test_all_workers_stuck_serve_again_after_the_deadline() -> None:
    async with open_preparation(timeout=2) as service, trio.open_nursery() as jobs:
        for _ in range(preparation.MAX_WORKERS):
            jobs.start_soon(service.render, ENDLESS, VARIABLES)
        await trio.sleep(1)
        assert len(children()) >= preparation.MAX_WORKERS
        await assert_still_works(service)


async def test_a_deadline_covers_the_wait_for_a_worker() -> None:
    answers: list[Prompt | ChatTemplateError] = []

    async def render(service: Preparation) -> None:
        answers.append(await service.render(ENDLESS, VARIABLES))

    async with open_preparation(timeout=1) as service:
        began = trio.current_time()
        async with trio.open_nursery() as jobs:
            for _ in range(3 * preparation.MAX_WORKERS):
                jobs.start_soon(render, service)
        assert trio.current_time() - began < 1.8
        assert len(answers) == 3 * preparation.MAX_WORKERS
        assert all(isinstance(answer, ChatTemplateError) for answer in answers)


async def test_a_job_waits_for_busy_workers_when_no_further_one_can_be_started() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with open_preparation(timeout=10) as service, trio.open_nursery() as jobs:
        await assert_still_works(service)
        jobs.start_soon(
            service.render,
            "{% for a in range(99999) %}{% for b in range(99) %}{% endfor %}{% endfor %}",
            VARIABLES,
        )
        await trio.sleep(0.02)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            rendered = await service.render(TEMPLATE, VARIABLES)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert rendered == Prompt("Hello|", "|")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of it")
async def test_an_idle_process_that_was_stopped_is_replaced() -> None:
    before = children()
    async with open_preparation(timeout=10) as service:
        await assert_still_works(service)
        [worker] = children() - before
        os.kill(worker, signal.SIGSTOP)
        await trio.sleep(0.1)
        with trio.fail_after(5):
            await assert_still_works(service)
    assert children() == before


LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
DOUBLING = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
BOMBS = {
    "a huge range": ("{{ range(10**9) | list | length }}", "Range too big"),
    "a long text": ("{{ ('x' * 2000000000) | length }}", "more memory"),
    "a doubled text": (f"{DOUBLING}{{{{ ns.s | length }}}}", "more memory"),
    "a doubled list": (
        "{% set ns = namespace(l=[0]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
        "more memory",
    ),
    "a list that grows": (
        "{% set l = [1] %}{% for a in range(99999) %}{{ l.append('x' * (100000 + a)) or '' }}{% endfor %}",
        "more memory",
    ),
    "a huge join": ("{{ (['x' * 1000] * 99999) | join('y' * 90000) | length }}", "more memory"),
    "a wide format": ("{{ '%2000000000d' | format(1) | length }}", "more memory"),
    "endless output": ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "longer than"),
    "a macro that calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
}


@LINUX_ONLY
@pytest.mark.parametrize("name", BOMBS)
async def test_a_template_bomb_meets_a_limit_long_before_its_deadline(name: str) -> None:
    template, reason = BOMBS[name]
    async with open_preparation(timeout=10) as service:
        failed = await service.render(template, VARIABLES)
        assert isinstance(failed, ChatTemplateError)
        assert reason in failed.payload
        await assert_still_works(service)


@pytest.mark.parametrize("template", [ENDLESS, "{{ 9 ** (9 ** 9) }}", "{{ lipsum(n=10**9) }}"])
async def test_a_template_that_only_takes_time_is_ended_by_its_deadline(template: str) -> None:
    async with open_preparation(timeout=1) as service:
        failed = await service.render(template, VARIABLES)
        assert failed == ChatTemplateError("the chat template was not rendered within 1 s")
        await assert_still_works(service)


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "find", "description": "", "parameters": parameters}}


TEXT = tool({"type": "object", "properties": {"text": {"type": "string"}}})
EVIL = tool({"type": "object", "properties": {"text": {"type": "string", "pattern": "^(a+)+$"}}})


def call(**arguments: Any) -> dict[str, Any]:
    return {"id": "call_0", "name": "find", "arguments": {"ValidJson": arguments}}


async def test_tools_and_their_calls_are_checked() -> None:
    async with open_preparation(timeout=10) as service:
        assert await service.tool_schema_error([TEXT]) is None
        refusal = await service.tool_schema_error(
            [tool({"type": "object", "properties": {"a": {"type": 1}}})]
        )
        assert isinstance(refusal, ToolSchemaInvalid)
        assert "find" in refusal.payload
        assert await service.call_violations([call(text="a")], [TEXT]) == []
        [violation] = await service.call_violations([call(text=1), call(text="b")], [TEXT])
        assert "find" in violation


async def test_a_regular_expression_that_never_ends_costs_only_its_call() -> None:
    async with open_preparation(timeout=1) as service:
        violations = await service.call_violations([call(text="a" * 40 + "b")], [EVIL])
        assert violations == ["the arguments of the tool calls were not checked within 1 s"]
        await assert_still_works(service)


async def test_schemas_become_grammars() -> None:
    async with open_preparation(timeout=10) as service:
        grammar = await service.gbnf_of_schema(
            '{"type": "object", "properties": {"answer": {"type": "string"}}}'
        )
        assert isinstance(grammar, str)
        assert "root ::=" in grammar
        for broken in ("{", "[" * 10_000, '{"$ref": "https://example.com/schema.json"}'):
            assert isinstance(await service.gbnf_of_schema(broken), GrammarSyntaxError)
        await assert_still_works(service)


RED_DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElF"
    "TkSuQmCC"
)


async def test_images_become_pictures_in_processes_of_their_own() -> None:
    before = children()
    async with open_preparation(timeout=10) as service:
        await assert_still_works(service)
        red = Picture(width=1, height=1, rgb=b64encode(bytes([255, 0, 0])).decode())
        assert await service.pictures([RED_DOT, RED_DOT], resize_to_fit=64) == [red, red]
        assert len(children() - before) == 2
        refused = await service.pictures([RED_DOT, RED_DOT[:-30]], resize_to_fit=64)
        assert isinstance(refused, ImageDecodingFailed)
    assert children() == before


async def test_images_of_a_request_share_a_deadline() -> None:
    async with open_preparation(timeout=1) as service:
        began = trio.current_time()
        refused = await service.pictures([RED_DOT] * 100_000, resize_to_fit=64)
        assert refused == ImageDecodingFailed("the images were not decoded within 1 s")
        assert trio.current_time() - began < 1.5


async def test_a_killed_process_fails_its_request_and_is_replaced() -> None:
    before = children()
    failed: list[Prompt | ChatTemplateError] = []

    async def be_killed(service: Preparation) -> None:
        failed.append(await service.render(ENDLESS, VARIABLES))

    async with open_preparation(timeout=10) as service:
        async with trio.open_nursery() as jobs:
            jobs.start_soon(be_killed, service)
            await trio.sleep(0.2)
            [worker] = children() - before
            os.kill(worker, signal.SIGKILL)
        assert failed == [ChatTemplateError("the preparation process died: SIGKILL")]
        await assert_still_works(service)
        [worker] = children() - before
        os.kill(worker, signal.SIGKILL)
        await trio.sleep(0.1)
        await assert_still_works(service)  # an idle one that died is noticed
    assert children() == before


async def test_a_process_that_cannot_be_started_fails_its_request_and_nothing_else() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with open_preparation(timeout=10) as service:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            failed = await service.render(TEMPLATE, VARIABLES)
            with pytest.raises(PreparationFailed) as failure:
                await service.compile_error(TEMPLATE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        reason = "the preparation process cannot be started: Too many open files"
        assert (failed, str(failure.value)) == (ChatTemplateError(reason), reason)
        await assert_still_works(service)


async def test_modules_in_the_directory_of_the_agent_are_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported from the current directory')")
    monkeypatch.chdir(tmp_path)
    async with open_preparation(timeout=10) as service:
        await assert_still_works(service)


async def test_a_cancelled_job_leaves_no_answer_for_the_next() -> None:
    before = children()
    async with open_preparation(timeout=10) as service:
        await assert_still_works(service)
        with trio.move_on_after(0.05):
            await service.render(ENDLESS, VARIABLES)
        await assert_still_works(service)
    assert children() == before


async def test_interrupts_from_the_terminal_do_not_reach_the_process() -> None:
    before = children()
    async with open_preparation(timeout=10) as service:
        await assert_still_works(service)
        [worker] = children() - before
        assert os.getpgid(worker) != os.getpgid(0)
        os.kill(worker, signal.SIGINT)
        await assert_still_works(service)


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
async def test_a_process_does_not_outlive_an_agent_that_was_killed() -> None:
    agent = subprocess.Popen(  # noqa: ASYNC220 two processes away from the one under test
        [sys.executable, "-c", AGENT_WITH_A_STUCK_JOB, ENDLESS], stdout=subprocess.PIPE, text=True
    )
    with agent:
        assert agent.stdout is not None
        worker = int(agent.stdout.readline())
        agent.kill()
    with trio.fail_after(2):
        while is_running(worker):  # noqa: ASYNC110 a stranger's child can only be looked at
            await trio.sleep(0.01)


AGENT_WITH_A_STUCK_JOB = """
import os, pathlib, sys, trio
from paddler.agent.preparation import open_preparation

async def main():
    async with open_preparation(timeout=60) as service, trio.open_nursery() as jobs:
        await service.compile_error("fine")
        jobs.start_soon(service.render, sys.argv[1], {"messages": [], "add_generation_prompt": False})
        await trio.sleep(0.1)
        print(pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def is_running(pid: int) -> bool:
    """Tell whether a process of that id is there and no zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
