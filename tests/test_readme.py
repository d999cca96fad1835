"""The README's example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_module_example_runs(capsys):
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    exec(compile(example, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "(2, 512, 256)" in printed
    assert "density" in printed
