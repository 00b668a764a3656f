"""The graph of imports is the one of docs/architecture.md: rooms, purity, one door per dependency."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "paddler"

FOUNDATION = {"errors", "config"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "processes": {"errors"},
    "messages": {"errors"},
    "routing": {"errors", "messages"},
    "language": {"errors", "messages"},
    "engine": FOUNDATION | {"messages", "processes"},
    "models": FOUNDATION | {"messages"},
    "balancer": FOUNDATION | {"messages", "routing"},
    "agent": FOUNDATION | {"messages", "language", "engine", "models", "processes"},
    "http": FOUNDATION | {"messages", "routing", "balancer"},
    "host": FOUNDATION,
    "balancer_daemon": FOUNDATION | {"messages", "routing", "balancer", "http"},
    "agent_daemon": FOUNDATION | {"messages", "language", "engine", "models", "agent"},
    "single_node": FOUNDATION | {"messages", "balancer", "balancer_daemon", "agent_daemon"},
    "flag_values": FOUNDATION | {"balancer"},
    "__main__": {"cli"},
    "cli": FOUNDATION | {"flag_values", "host", "balancer_daemon", "agent_daemon", "single_node"},
}
"""Room → the other rooms of paddler that it may import. A new room is drawn here first."""

IMPURE = {"trio", "quart", "quart_trio", "time", "threading", "llama_cpp", "asyncio", "socket", "subprocess"}
PURE_ENGINE_MODULES = {
    "embeddings", "gbnf", "integer_grammar", "json_schema_grammar", "layout", "pattern_grammar", "pipe",
    "prefixes", "scheduler", "sequences", "stop_strings", "thread_count", "turn_sender",
}  # fmt: skip

DOORS: dict[str, set[str]] = {
    "PIL": {"agent.pictures"},
    "cattrs": {"messages.strict_json", "messages.wire"},
    "h11": {"http.connection"},
    "httpx": set(),
    "hypercorn": {"http.connection"},
    "huggingface_hub": set(),
    "jinja2": {"language.template_environment"},
    "jsonschema": {"language.tool_schemas"},
    "llama_cpp": {"engine.adapters", "engine.context", "engine.images", "engine.llama"},
    "referencing": {"language.tool_schemas"},
    "resvg_py": {"agent.pictures"},
    "statsd": {"balancer.metrics"},
    "trio_websocket": {"agent.balancer_link"},
    "wsproto": {"http.connection"},
}
"""Dependency → the modules that may import it."""


def modules() -> dict[str, set[str]]:
    """Return every module of paddler, named without the package, with the full names it imports."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = set(imported_names(ast.parse(path.read_text(), str(path))))
    return found


def imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                yield "a relative import"


def room(name: str) -> str:
    return name.split(".")[0]


MODULES = modules()


def own_imports(name: str) -> set[str]:
    """Return what a module imports of paddler, without the package's name and the version."""
    prefix = "paddler."
    return {
        imported.removeprefix(prefix)
        for imported in MODULES[name]
        if imported.startswith(prefix) and imported != "paddler.__version__"
    }


def outside_imports(name: str) -> set[str]:
    return {room(imported) for imported in MODULES[name]} - {"paddler"}


def test_every_module_belongs_to_a_room_of_the_map() -> None:
    assert {room(name) for name in MODULES} - set(MAY_IMPORT) == {""}


def test_imports_are_absolute() -> None:
    assert [name for name, imports in MODULES.items() if "a relative import" in imports] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_room_imports_only_the_rooms_it_may(name: str) -> None:
    rooms = {room(imported) for imported in own_imports(name)} - {room(name)}
    assert rooms <= MAY_IMPORT.get(room(name), set())


def test_balancer_and_agent_share_only_messages() -> None:
    assert MAY_IMPORT["balancer"] & MAY_IMPORT["agent"] == FOUNDATION | {"messages"}


def is_pure(name: str) -> bool:
    parts = name.split(".")
    if parts[0] == "engine":
        return parts[-1] in PURE_ENGINE_MODULES
    return parts[0] in {"messages", "routing", "language"} or name == "processes.frames"


@pytest.mark.parametrize("name", sorted(filter(is_pure, MODULES)))
def test_pure_modules_know_no_clock_no_loop_and_no_engine(name: str) -> None:
    assert outside_imports(name) & IMPURE == set()


@pytest.mark.parametrize("name", sorted(name for name in filter(is_pure, MODULES) if room(name) == "engine"))
def test_pure_engine_modules_import_no_other_engine_modules(name: str) -> None:
    engine = {imported.split(".")[1] for imported in own_imports(name) if room(imported) == "engine"}
    assert engine <= PURE_ENGINE_MODULES


@pytest.mark.parametrize("name", ["engine.process", "engine.llama", "processes.parent"])
def test_the_engine_process_is_a_plain_loop(name: str) -> None:
    assert outside_imports(name) & {"trio", "asyncio", "threading"} == set()
    assert "handle" not in {imported.split(".")[1] for imported in own_imports(name) if "." in imported}


@pytest.mark.parametrize("dependency", sorted(DOORS))
def test_a_dependency_has_one_door(dependency: str) -> None:
    assert {name for name in MODULES if dependency in outside_imports(name)} <= DOORS[dependency]


def test_only_http_speaks_quart() -> None:
    speakers = {name for name in MODULES if outside_imports(name) & {"quart", "quart_trio"}}
    assert {room(name) for name in speakers} <= {"http"}


def test_only_the_engine_computes_with_numpy() -> None:
    assert {room(name) for name in MODULES if "numpy" in outside_imports(name)} <= {"engine"}
