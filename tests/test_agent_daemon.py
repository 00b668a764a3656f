"""Whether the balancer works on the agent's host decides about a core."""

import pytest

from paddler.agent_daemon import is_local


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("0.0.0.0", True),  # `paddler up` on every interface
        ("::", True),
        ("192.0.2.1", False),
        ("fe80::1%eth0", False),
    ],
)
def test_addresses_of_this_host(host: str, expected: bool) -> None:
    assert is_local(host) == expected
