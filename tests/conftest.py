"""What holds for every test: no error is logged unasked, and properties give the same cases each run."""

import logging
from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile("paddler", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("paddler")


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def error_records(request: pytest.FixtureRequest) -> Iterator[list[logging.LogRecord]]:
    """Collect what is logged as an ERROR; fail the test at its end unless it uses `logged_errors`."""
    collector = _Collector()
    logging.getLogger().addHandler(collector)
    try:
        yield collector.records
    finally:
        logging.getLogger().removeHandler(collector)
    if collector.records and "logged_errors" not in request.fixturenames:
        lines = "\n".join(f"{record.name}: {record.getMessage()}" for record in collector.records)
        pytest.fail(f"logged an error that the test did not ask for:\n{lines}")


@pytest.fixture
def logged_errors(error_records: list[logging.LogRecord]) -> list[logging.LogRecord]:
    """The ERROR records of this test so far, for a test that expects some and looks at them itself."""
    return error_records
