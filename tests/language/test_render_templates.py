"""scripts/render_templates.py tells templates that refuse from those that fail."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "render_templates.py"
BUNDLED = Path(__file__).with_name("paddler-tiny-chat.jinja")

pytestmark = pytest.mark.slow


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=False)


def test_templates_that_render_or_refuse_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(BUNDLED.read_text())
    (tmp_path / "b.jinja").write_text("{{ raise_exception('no | thanks') }}")
    ended = run(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    [_, _, rendered, refused, _, summary] = ended.stdout.splitlines()
    assert rendered == "| a |" + " ok |" * 8
    assert refused == "| b |" + " refused: no \\| thanks |" * 8
    assert summary == "2 templates, 0 errors"


@pytest.mark.parametrize("source", ["{{ oops", "{{ messages[99].content }}"])
def test_templates_that_fail_are_errors(tmp_path: Path, source: str) -> None:
    (tmp_path / "a.jinja").write_text(source)
    ended = run(tmp_path)
    assert ended.returncode == 1
    assert "| ERROR: " in ended.stdout
    assert "1 templates, 8 errors" in ended.stdout
