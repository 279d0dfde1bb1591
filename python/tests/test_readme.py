"""What README and docs promise runs as it stands. Against: nothing; it must not fail."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"


@pytest.mark.parametrize(
    "page, printed", [(README, "density"), (REPOSITORY / "docs/masks.md", "q >= kv and t0[q] ==")]
)
def test_the_python_examples_run(page, printed, capsys):
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, str(page), "exec"), {})
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize(
    "program",
    [
        "demo",
        "benchmark",
        "benchmark.cpu",
        "benchmark.distributed",
        "benchmark.masks",
        "benchmark.report",
        "benchmark.video",
    ],
)
def test_programs_say_what_they_do(program):
    help_text = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert help_text.startswith(f"usage: python -m {program} ")
    options = help_text.split("options:\n", 1)[1]
    for option in re.findall(r"^  (--[a-z-]+)", options, flags=re.MULTILINE):
        assert re.search(rf"^  {option}\b.*(?:\s{{2,}})[a-z]", options, re.MULTILINE), option
