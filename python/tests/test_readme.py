"""The README's Python code runs as it stands. Against: nothing; it must not fail."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_python_examples_run(capsys):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, str(README), "exec"), {})
    assert "density" in capsys.readouterr().out
