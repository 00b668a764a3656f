from paddler.agent.held_requests import MAX_REMEMBERED, HeldRequests
from paddler.engine import pipe
from paddler.messages.agent_socket import Held, HeldPrefix


def held(*pairs: tuple[int, int]) -> Held:
    return Held(tuple(HeldPrefix(number, tokens) for number, tokens in pairs))


def test_generations_are_told_by_the_numbers_of_the_link() -> None:
    told: list[Held] = []
    requests = HeldRequests(running={1, 2})
    with requests.connected(told.append):
        requests.remember(1, 41)
        requests.remember(2, 42)
        requests.report(pipe.Held(((1, 64), (2, 128), (9, 64))))
    assert told == [held((41, 64), (42, 128))]


def test_nothing_is_told_twice() -> None:
    told: list[Held] = []
    requests = HeldRequests(running={1})
    with requests.connected(told.append):
        requests.remember(1, 41)
        for _ in range(3):
            requests.report(pipe.Held(((1, 64),)))
        requests.report(pipe.Held(()))
        requests.report(pipe.Held(()))
    assert told == [held((41, 64)), held()]


def test_a_generation_that_ended_is_told_as_long_as_it_is_held() -> None:
    told: list[Held] = []
    running = {1}
    requests = HeldRequests(running)
    with requests.connected(told.append):
        requests.remember(1, 41)
        requests.report(pipe.Held(()))
        requests.report(pipe.Held(((1, 64),)))
        running.clear()
        requests.report(pipe.Held(((1, 128),)))
        requests.report(pipe.Held(()))
        requests.report(pipe.Held(((1, 128),)))
    assert told == [held((41, 64)), held((41, 128)), held()]


def test_a_new_link_hears_nothing_of_the_requests_of_an_older_one() -> None:
    first: list[Held] = []
    second: list[Held] = []
    requests = HeldRequests(running={1, 2})
    with requests.connected(first.append):
        requests.remember(1, 1)
    with requests.connected(second.append):
        requests.report(pipe.Held(((1, 64),)))
        requests.remember(2, 1)
        requests.report(pipe.Held(((1, 64), (2, 128))))
    requests.report(pipe.Held(()))
    assert first == []
    assert second == [held((1, 128))]


def test_the_generations_remembered_are_limited() -> None:
    told: list[Held] = []
    requests = HeldRequests(running=())
    with requests.connected(told.append):
        for number in range(MAX_REMEMBERED + 1):
            requests.remember(number, number)
        requests.report(pipe.Held(((0, 64), (1, 64))))
    assert told == [held((1, 64))]
