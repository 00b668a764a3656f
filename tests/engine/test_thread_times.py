"""What the kernel counts of threads is read, and what it does not count is not made up."""

import time
from pathlib import Path

import pytest

from paddler.engine.thread_times import ThreadTimesReader, are_waits_counted


@pytest.mark.skipif(not are_waits_counted(), reason="this kernel does not count how long threads wait")
def test_the_kernel_counts_what_this_thread_does() -> None:
    read = ThreadTimesReader()
    began = time.thread_time()
    while time.thread_time() - began < 0.05:
        pass
    times = read()
    assert times is not None
    assert times.ran >= 0.04
    assert times.waited >= 0


def write(tasks: Path, **times: str) -> None:
    for task, text in times.items():
        (tasks / task).mkdir(exist_ok=True)
        (tasks / task / "schedstat").write_text(text)


def test_threads_that_begin_and_end_between_two_looks_do_no_harm(tmp_path: Path) -> None:
    write(tmp_path, a="1000000000 0 1", b="5000000000 0 1")
    read = ThreadTimesReader(tmp_path)
    (tmp_path / "b" / "schedstat").unlink()  # as if it ended between the listing and the reading
    write(tmp_path, a="1500000000 250000000 1", c="500000000 0 1")
    times = read()
    assert times is not None
    assert (times.ran, times.waited) == (1.0, 0.25)


@pytest.mark.parametrize("text", ["0 0 0", "", "no numbers here"])
def test_a_kernel_that_does_not_count_is_not_believed(tmp_path: Path, text: str) -> None:
    write(tmp_path, a=text)
    assert ThreadTimesReader(tmp_path)() is None
    assert ThreadTimesReader(tmp_path / "nowhere")() is None
