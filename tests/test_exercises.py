"""The exercises of every chapter: each has a folded solution, and the solutions run and check themselves."""

import json
import re

import pytest

from deepclust_nb.digest import root

CHAPTERS = sorted((root() / "book" / "chapters").glob("*.ipynb"))


def text_of(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


TEXTS = {path.stem: text_of(path) for path in CHAPTERS}
SOLUTIONS = {name: re.findall(r"```python\n(.*?)```", text, re.S) for name, text in TEXTS.items()}
NUMBERED = [(name, number) for name, found in SOLUTIONS.items() for number in range(len(found))]


@pytest.mark.parametrize("chapter", TEXTS)
def test_every_exercise_has_a_solution(chapter):
    text, solutions = TEXTS[chapter], SOLUTIONS[chapter]
    exercises = text[text.index("## Exercises") : text.index("## Summary")]
    assert len(re.findall(r"^\d\. \*\*", exercises, re.M)) == exercises.count("<details>") == len(solutions)


@pytest.mark.parametrize("chapter, number", NUMBERED)
def test_solutions_run_and_assert(chapter, number):
    solution = SOLUTIONS[chapter][number]
    assert "assert " in solution
    exec(compile(solution, f"<{chapter}, solution {number + 1}>", "exec"), {})
