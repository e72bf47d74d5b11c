"""Digests: what ages a record and what does not, and what a kernel says of the code it runs."""

import ast
import importlib
import shutil
import subprocess
import sys

import pytest
from loader import checkout, definitions, notebook, store

from deepclust_nb import digest, places


@pytest.fixture
def copy(tmp_path):
    module, folder = checkout(tmp_path)
    return module("digest"), folder


CELLS = [
    ("import torch\nfrom deepclust_nb import baselines", "definition", None),
    (
        "def f(x):\n    '''Doc.'''\n    print(f'{x:.2f}, {x!r}')\n    return baselines.used(x)",
        "definition",
        None,
    ),
    ("f(1)", "run", None),
    ("print(f(2))", None, None),
]
BASELINES = '''"""Module."""
SCALE = 2


def used(x):
    """Doc."""
    return indirect(x)  # comment


def indirect(x):
    return SCALE * x


def unused(x):
    return x
'''


@pytest.fixture
def code(copy):
    """A checkout of a chapter and a tiny `baselines`: a function from changes to (code, shown) digests."""
    module, folder = copy
    records = module.__name__.replace("digest", "records")
    importlib.import_module(records)
    for name in (
        "data",
        "metrics",
        "networks",
        "training",
        "mixtures",
        "plots",
        "checks",
        "records",
        "results",
    ):
        (folder / f"deepclust_nb/{name}.py").write_text("")

    def digests(cells=CELLS, **changed):
        text = BASELINES
        for old, new in changed.get("helper", []):
            assert old in text
            text = text.replace(old, new)
        (folder / "deepclust_nb/baselines.py").write_text(text)
        notebook(cells, folder / "book/chapters/tiny.ipynb")
        return module.code_digest("tiny"), module.shown_digest("tiny")

    return digests, folder, module


@pytest.mark.parametrize(
    "helper",
    [
        [("  # comment", ""), ('"""Doc."""', '"""Other."""'), ('"""Module."""\n', "# nothing\n\n")],
        [("    return x\n", "    return x + 1\n")],
        [("def unused", "def unused_too")],
        [
            ("def unused(x):\n    return x\n", ""),
            ("SCALE = 2", "def unused(x):\n    return x\n\n\nSCALE = 2"),
        ],
    ],
    ids=["comments and docstrings", "unreached body", "unreached name", "order"],
)
def test_the_digest_ignores_what_decides_no_number(code, helper):
    digests, _, _ = code
    assert digests() == digests(helper=helper)


@pytest.mark.parametrize(
    "helper",
    [
        [("indirect(x)  #", "indirect(x + 1)  #")],
        [("SCALE * x", "SCALE + x")],
        [("SCALE = 2", "SCALE = 3")],
        [("SCALE = 2", "SCALE = 2\nSCALE += 1")],
        [("SCALE = 2", "SCALE = 2\nfrom math import e as SCALE")],
    ],
    ids=["reached", "reached through another", "constant", "constant changed later", "import"],
)
def test_the_digest_follows_what_the_cells_reach(code, helper):
    digests, _, _ = code
    before, after = digests(), digests(helper=helper)
    assert before[0] != after[0] and before[1] != after[1]


def test_a_later_module_ages_nothing_until_one_of_its_definitions_is_reached(code):
    digests, folder, _ = code
    before, file = digests()[0], folder / "deepclust_nb/mixtures.py"
    file.write_text("import torch\n\n\ndef elsewhere():\n    return torch.e\n")
    assert digests()[0] == before
    file.write_text("import torch\n\n\ndef indirect():\n    return torch.e\n")
    reached = digests()[0]
    file.write_text("import numpy as torch\n\n\ndef indirect():\n    return torch.e\n")
    assert len({before, reached, digests()[0]}) == 3


def test_the_digest_follows_definition_and_run_cells_but_not_their_layout(code):
    digests, _, _ = code
    before = digests()
    laid_out = [
        ("%matplotlib inline\n" + CELLS[0][0] + "\n# text\n" + CELLS[1][0], "definition", None),
        *CELLS[2:],
    ]
    assert digests(laid_out) == before
    assert digests([*CELLS[:2], ("f(3)", "run", None), CELLS[3]])[0] != before[0]
    other_print = digests([*CELLS[:3], ("print(f(4))", None, None)])
    assert other_print[0] == before[0] and other_print[1] != before[1]


def test_an_evidence_page_follows_its_cells_its_records_and_the_code_they_are_of(code):
    digests, folder, module = code

    def shown(cell="print(1)", cells=CELLS, **changed):
        digests(cells, **changed)
        notebook([(cell, None, None)], folder / "book/evidence/tiny.ipynb")
        return module.shown_digest("tiny", "evidence")

    (folder / "book/evidence").mkdir(exist_ok=True)
    records = sys.modules[module.__name__.replace("digest", "records")]
    store(records, folder)
    before = shown()
    assert shown("print(2)") != before
    assert shown(cells=[*CELLS[:2], ("f(3)", "run", None), CELLS[3]]) != before  # its records become older
    assert shown(helper=[("SCALE = 2", "SCALE = 3")]) != before
    assert shown(cells=[*CELLS[:3], ("print(f(4))", None, None)]) == before == shown()
    store(records, folder, acc=0.7)
    assert shown() != before


def test_the_shown_digest_follows_records_and_papers(code):
    digests, folder, module = code
    before = digests()
    (folder / "data/papers/facts.csv").write_text("key,value,source\na,1,b\n")
    with_paper = digests()
    assert with_paper[0] == before[0] and with_paper[1] != before[1]
    records = sys.modules[module.__name__.replace("digest", "records")]
    path = store(records, folder)
    with_record = digests()
    assert with_record[0] == before[0] and with_record[1] != with_paper[1]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    windows = digests()
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))
    assert digests() == windows != with_record  # line ends do not count, the line does
    path = store(records, folder)
    store(records, folder, chapter="other")
    assert digests() == with_record
    named = [*CELLS[:3], ("print(f('other'))", None, None)]
    shown = digests(named)[1]
    store(records, folder, chapter="other", acc=0.7)
    assert digests(named)[1] != shown


def test_the_digest_of_an_unknown_chapter_is_an_error(code):
    with pytest.raises(FileNotFoundError, match="no chapter 'nowhere'"):
        code[2].code_digest("nowhere")


def test_the_digest_is_the_same_on_every_python(code):
    # Computed once and written down: a new interpreter or platform that changes it would age every record.
    digests, _, _ = code
    assert digests()[0][:16] == "94276ced4a7be0cd"


# The recorder scores every run, whatever the chapter's cells name.
RECORDS, METRICS = "def record(y):\n    return scores(y)\n", "def scores(y):\n    return accuracy(y)\n\n\n"
METRICS += "def accuracy(y):\n    return 1\n\n\ndef match(y):\n    return 2\n"


def test_the_digest_follows_what_the_recorder_reaches(code):
    digests, folder, _ = code
    (folder / "deepclust_nb/records.py").write_text(RECORDS)
    (folder / "deepclust_nb/metrics.py").write_text(METRICS)
    before = digests()[0]
    (folder / "deepclust_nb/metrics.py").write_text(METRICS.replace("return 2", "return 3"))
    assert digests()[0] == before
    (folder / "deepclust_nb/metrics.py").write_text(METRICS.replace("return 1", "return 0"))
    assert digests()[0] != before


def test_todays_digest_follows_every_file_that_it_is_made_of(code):
    """Also within one process, which remembers it."""
    digests, folder, module = code
    digests()
    edits = [("deepclust_nb/metrics.py", METRICS), ("deepclust_nb/records.py", RECORDS)]
    edits += [("deepclust_nb/records.py", RECORDS.replace("scores(y)", "match(y)"))]
    edits += [("deepclust_nb/metrics.py", METRICS.replace("return 2", "return 3"))]
    edits += [("deepclust_nb/baselines.py", BASELINES.replace("SCALE = 2", "SCALE = 3"))]
    seen = [module.digest_of_today("tiny")]
    for name, text in edits:
        (folder / name).write_text(text)
        seen.append(module.digest_of_today("tiny"))
        assert seen[-1] == module.code_digest("tiny"), name
    notebook([*CELLS[:2], ("f(3)", "run", None)], folder / "book/chapters/tiny.ipynb")
    seen.append(module.digest_of_today("tiny"))
    assert seen[0] == seen[1] and len(set(seen)) == len(seen) - 1  # a score that nothing reaches is none


def test_what_an_imported_name_stands_for_counts(code):
    digests, _, _ = code
    first, second = (
        digests(helper=[("SCALE = 2", f"from {source} import SCALE")]) for source in ("a.b", "a.c")
    )
    assert first[0] != second[0]


def test_the_package_holds_no_statement_that_a_digest_cannot_see():
    """At the top of a module that counts: definitions, assignments and imports alone."""
    known = (
        ast.FunctionDef
        | ast.ClassDef
        | ast.Assign
        | ast.AnnAssign
        | ast.AugAssign
        | ast.Import
        | ast.ImportFrom
    )
    for module in digest.DISPLAYING:
        tree = ast.parse((places.root() / "deepclust_nb" / f"{module}.py").read_text(encoding="utf-8"))
        strange = [node for node in tree.body if not isinstance(node, known)]
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in strange), (
            module
        )


@pytest.mark.parametrize("chapter", [p.stem for p in places.chapter_file("x").parent.glob("*.ipynb")])
def test_every_record_s_scores_are_in_the_digest_of_its_chapter(chapter, tmp_path):
    """The real package: a change in a score, or in a computing module that is reached, ages records."""
    module, folder = checkout(tmp_path)
    for path in places.chapter_file("x").parent.glob("*.ipynb"):
        shutil.copy(path, folder / "book/chapters")
    code_digest = module("digest").code_digest
    before = code_digest(chapter)
    planted = [("metrics", "table.sum())", "table.sum() + 1)"), ("metrics", "axis=0", "axis=1")]
    planted += [("metrics", 'average_method="arithmetic"', 'average_method="max"')]
    planted += [("metrics", "adjusted_rand_score(*", "adjusted_rand_score(2, *")]
    planted += [("training", "optimizer.step()", "optimizer.step(), optimizer.step()")]
    planted += [("data", "/ 255", "/ 256")]
    for name, old, new in planted:
        path = folder / f"deepclust_nb/{name}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert code_digest(chapter) != before, (name, old)
        path.write_text(text)
    assert code_digest(chapter) == before


def test_an_executed_notebook_tells_which_cells_it_ran(code, tmp_path):
    digests, folder, module = code
    digests()
    source, executed = folder / "book/chapters/tiny.ipynb", tmp_path / "out.ipynb"
    injected = ("# Parameters\nseed = 3", "injected-parameters", None)
    notebook([injected, *CELLS[:3], ("print(f(9))", None, None)], executed)
    assert module.cells_digest(executed) == module.cells_digest(source)
    notebook([*CELLS[:2], ("f(3)", "run", None)], executed)
    assert module.cells_digest(executed) != module.cells_digest(source)


# what a kernel states


def git(folder, *command):
    own = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(folder)]
    return subprocess.run(["git", *own, *command], check=True, capture_output=True, text=True).stdout.strip()


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not at hand")


@pytest.fixture
def recording(copy, monkeypatch):
    module, folder = copy
    notebook([("def f():\n    return 1", "definition", None)], folder / "book/chapters/tiny.ipynb")
    monkeypatch.setenv("DEEPCLUST_RECORDING", "tiny")
    return module, folder


def test_a_kernel_states_package_digest_and_commit_only_while_recording(recording, monkeypatch):
    module, folder = recording
    stated = {"package": str(folder), "digest": module.code_digest("tiny"), "commit": None}
    assert module.state() == stated
    monkeypatch.delenv("DEEPCLUST_RECORDING")
    assert module.state() is None


@needs_git
def test_what_was_stated_stays_when_files_are_saved_and_commits_made_later(recording):
    module, folder = recording
    git(folder, "init", "-q")
    git(folder, "add", "-A"), git(folder, "commit", "-qm", "one")
    stated = module.state()
    assert stated["commit"] == git(folder, "rev-parse", "HEAD")
    notebook([("def f():\n    return 2", "definition", None)], folder / "book/chapters/tiny.ipynb")
    assert module.commit() == stated["commit"] + "+changes"
    git(folder, "commit", "-qam", "two")
    assert module.state() == stated and module.commit() != stated["commit"]
    assert module.code_digest("tiny") != stated["digest"]


@needs_git
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("deepclust_nb/baselines.py", True),
        ("deepclust_nb/new.py", True),
        ("book/chapters/tiny.ipynb", True),
        ("book/experiments/profiles/tiny.laptop.usps.yaml", True),
        ("book/text.md", False),
        ("data/records/tiny.json", False),
    ],
)
def test_a_commit_says_that_code_or_a_profile_differs_from_it(recording, name, counts):
    """Saved and not committed, a new file included; text and records decide no number."""
    module, folder = recording
    git(folder, "init", "-q")
    git(folder, "add", "-A"), git(folder, "commit", "-qm", "one")
    head = git(folder, "rev-parse", "HEAD")
    assert module.commit() == head
    (folder / name).write_text("seed: 1")
    assert module.commit() == head + "+changes" * counts


@needs_git
def test_an_archive_inside_another_repository_has_no_commit(copy, monkeypatch):
    module, folder = copy
    git(folder.parent, "init", "-q", str(folder.parent))
    (folder.parent / "a").touch()
    git(folder.parent, "add", "a"), git(folder.parent, "commit", "-qm", "of another project")
    assert module.commit() is None
    monkeypatch.setenv("PATH", str(folder))
    assert module.commit() is None  # and without git


def test_a_package_without_the_chapter_states_no_digest(recording):
    module, folder = recording
    (folder / "book/chapters/tiny.ipynb").unlink()
    assert module.state()["digest"] is None


def test_the_loader_runs_definition_cells_alone(monkeypatch, tmp_path):
    import inspect

    import loader

    cells = [("%time\nimport math\nN = 2", "definition", None), ("N = 3", "run", None)]
    cells.append(("def area(r):\n    return N * math.pi * r", "definition", None))
    notebook(cells, tmp_path / "tiny.ipynb")
    monkeypatch.setattr(loader, "chapter_file", lambda chapter: tmp_path / f"{chapter}.ipynb")
    module = definitions("tiny")
    assert module.N == 2 and module.area(1) == pytest.approx(6.283185)
    assert inspect.getsource(module.area) == "def area(r):\n    return N * math.pi * r"
    assert definitions("tiny") is module
