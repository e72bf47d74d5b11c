"""The lists of planted bugs fit today's code, and planting tells noticed bugs from those that nobody sees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "mutants"
sys.path.insert(0, str(FOLDER))
import plant  # noqa: E402

CODE = "def double(x):\n    return x * 2\n\n\ndef half(x):\n    return x / 2\n"
TEST = "from deepclust_nb import data\n\n\ndef test_double():\n    assert data.double(3) == 6\n"
NOTICED = {"id": "X1", "file": "deepclust_nb/data.py", "why": "adds", "before": "x * 2", "after": "x + 2"}
OVERSEEN = NOTICED | {"id": "X2", "why": "floor", "before": "x / 2", "after": "x // 2"}
BROKEN = NOTICED | {"id": "X3", "before": "return x * 2", "after": "return x *"}


@pytest.mark.parametrize("bug", plant.read(), ids=lambda bug: bug["id"])
def test_each_bug_can_be_planted(bug):
    assert set(bug) == {"id", "file", "why", "before", "after", "list"} and bug["why"]
    plant.changed((plant.ROOT / bug["file"]).read_text(encoding="utf-8"), bug)


@pytest.fixture
def project(tmp_path):
    for name, text in (("deepclust_nb/__init__.py", ""), ("deepclust_nb/data.py", CODE), ("unseen.py", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_data.py").write_text(TEST, encoding="utf-8")
    (tmp_path / ".gitignore").write_text("unseen.py\n", encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_a_noticed_bug_dies_an_overseen_one_lives_and_no_trace_stays(project, tmp_path_factory):
    folder = plant.copy(tmp_path_factory.mktemp("copy"), project)
    assert not (folder / "unseen.py").exists()
    assert plant.failing(folder, plant.concerned("deepclust_nb/data.py", project)) is None
    for bug, test in ((NOTICED, "tests/test_data.py::test_double - assert 5 == 6"), (OVERSEEN, None)):
        assert plant.fate(folder, bug, project) == test
        for place in (folder, project):
            assert (place / "deepclust_nb" / "data.py").read_text(encoding="utf-8") == CODE


def test_tests_that_are_not_there_are_no_death(project):
    with pytest.raises(RuntimeError, match="pytest ended with [45]"):
        plant.failing(project, ("tests/test_data.py", "-k", "triple"))


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (NOTICED | {"before": "x - 2"}, "X1: what to replace stands 0 times"),
        (NOTICED | {"before": "return"}, "X1: what to replace stands 2 times"),
        (BROKEN, "X3: with the bug deepclust_nb/data.py is no Python"),
    ],
)
def test_a_wrong_entry_is_refused(bug, message):
    with pytest.raises(ValueError, match=message):
        plant.changed(CODE, bug)


def test_in_a_notebook_one_code_cell_changes():
    cells = [("markdown", ["x * 2"]), ("code", ["%magic\n", "a = x * 2\n", "b = 1"]), ("code", ["c = 3"])]
    cells = [{"cell_type": kind, "source": source} for kind, source in cells]
    bug = NOTICED | {"file": "book/chapters/a.ipynb"}
    found = json.loads(plant.changed(json.dumps({"cells": cells}), bug))["cells"]
    assert found[1]["source"] == ["%magic\n", "a = x + 2\n", "b = 1"]
    assert [found[i] for i in (0, 2)] == [cells[i] for i in (0, 2)]
    with pytest.raises(ValueError, match="stands 2 times"):
        plant.changed(json.dumps({"cells": [*cells, cells[1]]}), bug)


def test_lists_and_ids_are_found_by_name(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps([NOTICED, OVERSEEN]), encoding="utf-8")
    (tmp_path / "two.json").write_text(json.dumps([BROKEN]), encoding="utf-8")
    for wanted, ids in (((), "X1 X2 X3"), (("one",), "X1 X2"), (("X2", "two"), "X2 X3")):
        assert [bug["id"] for bug in plant.read(tmp_path, wanted)] == ids.split()
    with pytest.raises(ValueError, match="no list and no bug has the name"):
        plant.read(tmp_path, ["three"])
    (tmp_path / "two.json").write_text(json.dumps([NOTICED]), encoding="utf-8")
    with pytest.raises(ValueError, match="two bugs are {'X1'}"):
        plant.read(tmp_path)


def test_own_tests_come_first():
    chapter = plant.concerned("book/chapters/foundations.ipynb")
    assert chapter[0] == "tests/test_foundations.py" and chapter[-1].startswith("foundations and not")
    helper = plant.concerned("deepclust_nb/metrics.py")
    assert helper[0] == "tests/test_metrics.py" and "tests/test_semicatvae.py" in helper
    assert not {"tests/test_house.py", "tests/test_sweep.py"} & set(helper)
    for file in ("book/make.py", "deepclust_nb/sweep/grid.py", "deepclust_nb/sweep.py"):
        assert {"tests/test_house.py", "tests/test_sweep.py"} <= set(plant.concerned(file))
