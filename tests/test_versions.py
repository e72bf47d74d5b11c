"""The versions the project promises: what the ranges, the lists and the workflows say of them agrees.

Each rule is a function that returns the list of what breaks it. The repository must give an empty list, and a
planted case beside it shows that the rule can be broken.
"""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
OLDEST = "tests/oldest.txt"
SUPPORTED = ["3.11", "3.12", "3.13"]
# How the oldest versions are installed and what they must run, behind the name of the environment's Python.
INSTALL = f"-m pip install --only-binary=:all: --constraint {OLDEST} --editable '.[dev]'"
CHECKS = ['-m pytest tests -m "not long"', "book/make.py book"]


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


def ranges(pyproject):
    """Every requirement of the project, of its extras and of its build, without those on its own extras."""
    project = pyproject["project"]
    texts = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    texts += pyproject["build-system"]["requires"]
    found = [Requirement(text) for text in texts]
    return [item for item in found if canonicalize_name(item.name) != project["name"]]


# ---------------------------------------------------------------- the oldest versions


def wrong_oldest(required, lines):
    """What keeps a list of pins from being the oldest versions that the required ranges admit."""
    problems, pins = [], {}
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        if not match:
            problems.append(f"{line} is not an exact version")
        elif pins.setdefault(canonicalize_name(match[1]), match[2]) != match[2]:
            problems.append(f"{match[1]} has two versions")
    for item in required:
        name = canonicalize_name(item.name)
        lowest = [clause.version for clause in item.specifier if clause.operator == ">="]
        if len(lowest) != 1:
            problems.append(f"{item} names no lowest version")
        elif name not in pins:
            problems.append(f"{item}: {name} is not in the list")
        elif Version(pins[name]) != Version(lowest[0]):
            problems.append(f"{item}: the list has {pins[name]}, not the lowest")
        elif not item.specifier.contains(pins[name]):
            problems.append(f"{item} does not admit its own lowest version")
    return problems


def test_the_oldest_versions_are_those_of_the_ranges():
    assert not wrong_oldest(ranges(PYPROJECT), (ROOT / OLDEST).read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    ("required", "lines", "problem"),
    [
        (["a>=1.2"], ["a==1.3"], "not the lowest"),
        (["a>=1.2", "B_c>=2"], ["a==1.2"], "b-c is not in the list"),
        (["a>=1.2"], ["# a==1.2"], "a is not in the list"),
        (["a"], ["a==1.2"], "names no lowest version"),
        (["a<3"], ["a==1.2"], "names no lowest version"),
        (["a>=1.2,!=1.2.0"], ["a==1.2"], "does not admit"),
        (["a>=1.2"], ["a>=1.2"], "not an exact version"),
        (["a>=1.2"], ["a==1.2", "d==1; python_version < '3.12'"], "not an exact version"),
        (["a>=1.2"], ["a==1.2", "d-e==1", "D_e==2"], "two versions"),
    ],
)
def test_other_versions_than_the_oldest_are_found(required, lines, problem):
    assert not wrong_oldest(
        [Requirement("a>=1.2,<2"), Requirement("B_c>=2")], ["A==1.2.0", "", "b.c==2", "d==9"]
    )
    found = wrong_oldest([Requirement(text) for text in required], lines)
    assert any(problem in text for text in found), found


def test_every_requirement_is_looked_at():
    project = {"name": "p-q", "dependencies": ["a>=1"]}
    project["optional-dependencies"] = {"x": ["b>=1"], "y": ["p-q[x]", "c>=1"]}
    pyproject = {"project": project, "build-system": {"requires": ["d>=1"]}}
    assert [item.name for item in ranges(pyproject)] == ["a", "b", "c", "d"]
    known = {"torch", "pooch", "papermill", "jupyter-book", "pytest", "editables"}
    assert known <= {item.name for item in ranges(PYPROJECT)}


# ---------------------------------------------------------------- the Pythons


def wrong_pythons(project, matrix):
    """Where the Pythons of the workflow, the classifiers and requires-python differ, or one is missing."""
    problems = [
        f"{one} is a number, so 3.10 would be 3.1: quote it" for one in matrix if type(one) is not str
    ]
    problems += [f"the workflow does not run Python {one}" for one in SUPPORTED if one not in matrix]
    named = [re.fullmatch(r"Programming Language :: Python :: (\d+\.\d+)", c) for c in project["classifiers"]]
    named = [match[1] for match in named if match]
    problems += [f"Python {one} is run, but no classifier names it" for one in matrix if one not in named]
    problems += [f"a classifier names Python {one}, which is not run" for one in named if one not in matrix]
    lowest = min(map(str, matrix), key=Version)
    if project["requires-python"] != f">={lowest}":
        problems.append(
            f"requires-python is {project['requires-python']}, and {lowest} the oldest that is run"
        )
    return problems


def matrix_of(tests):
    return tests["jobs"]["test"]["strategy"]["matrix"]["python"]


def test_the_pythons_that_are_named_are_run():
    assert not wrong_pythons(PROJECT, matrix_of(workflow("tests")))


@pytest.mark.parametrize(
    ("matrix", "classifiers", "requires", "problem"),
    [
        (["3.11", "3.13"], SUPPORTED, ">=3.11", "does not run Python 3.12"),
        (["3.11", "3.12", 3.13], SUPPORTED, ">=3.11", "3.13 is a number"),
        (SUPPORTED, ["3.11", "3.12"], ">=3.11", "no classifier names it"),
        (SUPPORTED, [*SUPPORTED, "3.14"], ">=3.11", "names Python 3.14, which is not run"),
        ([*SUPPORTED, "3.14"], SUPPORTED, ">=3.11", "Python 3.14 is run, but no classifier"),
        (SUPPORTED, SUPPORTED, ">=3.10", "requires-python is >=3.10"),
        (SUPPORTED, SUPPORTED, ">=3.11,<4", "requires-python is >=3.11,<4"),
        (["3.9", *SUPPORTED], ["3.9", *SUPPORTED], ">=3.11", "3.9 the oldest"),
    ],
)
def test_pythons_that_disagree_are_found(matrix, classifiers, requires, problem):
    names = [
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {c}" for c in classifiers),
    ]
    found = wrong_pythons({"classifiers": names, "requires-python": requires}, matrix)
    assert any(problem in text for text in found), found


# ---------------------------------------------------------------- the job of the oldest versions


def wrong_jobs(weekly, python):
    """What keeps a weekly workflow from running the oldest versions on the oldest Python as people would."""
    job = weekly["jobs"].get("oldest")
    if job is None or "schedule" not in weekly.get("on", weekly.get(True, {})):
        return ["no job runs the oldest versions on a schedule"]
    used = [
        step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})
    ]
    problems = (
        [] if used == [python] else [f"the job of the oldest versions runs Python {used}, not {python}"]
    )
    runs = [step["run"] for step in job["steps"] if "run" in step]
    wanted = [f"python {command}" for command in (INSTALL, *CHECKS)]
    problems += [
        f"the job of the oldest versions does not run: {line}" for line in wanted if line not in runs
    ]
    if job.get("continue-on-error") or any(step.get("continue-on-error") for step in job["steps"]):
        problems.append("the job of the oldest versions hides what fails")
    return problems


def test_the_oldest_versions_are_run_every_week():
    assert not wrong_jobs(workflow("weekly"), PROJECT["requires-python"].removeprefix(">="))


def test_a_job_that_runs_something_else_is_found():
    def weekly(python="3.11", left_out=None, **more):
        steps = [{"uses": "actions/setup-python@v5", "with": {"python-version": python}}]
        steps += [{"run": f"python {command}"} for command in (INSTALL, *CHECKS) if command != left_out]
        return {"on": {"schedule": []}, "jobs": {"oldest": {"steps": steps, **more}}}

    assert not wrong_jobs(weekly(), "3.11")
    assert wrong_jobs({"on": {"schedule": []}, "jobs": {"newest": {"steps": []}}}, "3.11")
    assert wrong_jobs({**weekly(), "on": {"workflow_dispatch": None}}, "3.11")
    assert wrong_jobs(weekly("3.12"), "3.11")
    assert wrong_jobs(weekly(**{"continue-on-error": True}), "3.11")
    for command in (INSTALL, *CHECKS):
        assert wrong_jobs(weekly(left_out=command), "3.11")


def missing_commands(text):
    """Which of the commands that the job runs a page does not show."""
    return [
        command for command in (INSTALL, *CHECKS) if not re.search(rf"^\S+ {re.escape(command)}$", text, re.M)
    ]


def test_people_are_told_the_same_commands():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert not missing_commands(text)
    assert missing_commands(text.replace(OLDEST, "constraints.txt")) == [INSTALL]
    assert missing_commands(text.replace("-m pytest", "-m nose")) == [CHECKS[0]]
