"""What `make` does beside another `make`, and the sentences it says instead of tracebacks."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from loader import checkout, notebook, store

BOOK = Path(__file__).resolve().parent.parent / "book"
sys.path.insert(0, str(BOOK))

import generated  # noqa: E402
import make  # noqa: E402
import running  # noqa: E402

from deepclust_nb import records  # noqa: E402


@pytest.fixture
def build(tmp_path, monkeypatch):
    """_build in a throw-away folder."""
    for module in (make, running):
        monkeypatch.setattr(module, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(make, "HTML", tmp_path / "_build" / "html")
    return tmp_path / "_build"


def pages(source, work):
    """Stands in for `render`: a page that names the work folder."""
    folder = work / "_build" / "html"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text(str(source))
    return folder


def test_each_command_works_in_a_folder_of_its_own_and_leaves_none(build):
    with running.work_folder("html") as first, running.work_folder("html") as second:
        assert first != second and first.is_dir() and second.parent == build
        (first / "a").touch()
    assert list(build.iterdir()) == []
    with pytest.raises(RuntimeError), running.work_folder("book"):
        raise RuntimeError
    assert list(build.iterdir()) == []


def test_a_book_reports_its_own_runs_whatever_another_command_does_meanwhile(build, monkeypatch, capsys):
    monkeypatch.setattr(make, "chapters", lambda: ["foundations"])
    monkeypatch.setattr(make, "render", pages)

    def run_chapter(source, target, parameters):
        record = {"method": "IDEC", "acc": 0.123, "dataset": "mnist_5k"}
        output = {"output_type": "display_data", "metadata": {}, "data": {records.MIME: record}}
        notebook([("x", None, [output])], target)
        make.html()  # somebody's `make html` in the same checkout
        return 7.0, None

    monkeypatch.setattr(make, "run_chapter", run_chapter)
    with pytest.raises(SystemExit) as end:
        make.book(None)
    assert not end.value.code and "0.123 (IDEC)" in capsys.readouterr().out
    assert "book-" in (build / "html" / "index.html").read_text()  # the pages are those of the last command
    assert {path.name for path in build.iterdir()} == {"html", "html.lock"}


def test_a_command_that_needs_the_tree_says_what_it_waits_for(build, tmp_path):
    script = f"import sys; sys.path.insert(0, {str(BOOK)!r}); import running, pathlib\n"
    script += f"running.BUILD = pathlib.Path({str(build)!r})\n"
    script += "with running.alone('tree', 'another make is at work'): print('mine', flush=True)"
    with running.alone("tree", ""):
        other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "Waiting: another make is at work in this checkout.\n"
    assert other.stdout.read() == "mine\n" and other.wait(10) == 0


@pytest.mark.parametrize("command", ["refresh", "records", "test"])
def test_commands_on_the_notebooks_hold_the_tree(build, monkeypatch, command):
    held = []

    class Lock(Exception):
        pass

    def alone(name, what):
        held.append(name)
        raise Lock

    monkeypatch.setattr(make, "alone", alone)
    monkeypatch.setattr(sys, "argv", ["make", command])
    with pytest.raises(Lock):
        make.main()
    assert held == ["tree"]


def test_a_port_that_is_taken_or_out_of_range_is_told(build, monkeypatch):
    (build / "html").mkdir(parents=True)
    (build / "html" / "index.html").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["make", "serve", "--port", str(port)])
        with pytest.raises(SystemExit, match=rf"Port {port} is not to be had \(address already in use\)"):
            make.main()
    monkeypatch.setattr(sys, "argv", ["make", "serve", "--port", "70000"])
    with pytest.raises(SystemExit, match="A port is a number from 0 to 65535, got 70000"):
        make.main()


def test_a_damaged_record_stops_the_pages_with_its_name(build, monkeypatch, tmp_path):
    module, folder = checkout(tmp_path / "copy")
    path = store(module("records"), folder, chapter="foundations")
    path.write_text(path.read_text().replace("0.8", "0.9"))
    monkeypatch.setattr(records, "data_root", lambda: folder / "data")
    monkeypatch.setattr(generated, "chapters", lambda: ["foundations"])
    monkeypatch.setattr(sys, "argv", ["make", "html"])
    with pytest.raises(
        SystemExit, match=f"the records foundations/mnist_5k/quick/{path.name} are damaged: record DEC"
    ):
        make.main()


def test_an_interrupt_ends_a_command_without_a_traceback(build, monkeypatch, capsys):
    def stopped(source, work):
        raise KeyboardInterrupt

    monkeypatch.setattr(make, "render", stopped)
    monkeypatch.setattr(sys, "argv", ["make", "html"])
    with pytest.raises(SystemExit) as end:
        make.main()
    assert end.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"
    assert list(build.iterdir()) == []


def test_a_build_folder_that_cannot_be_written_is_named(build, monkeypatch):
    build.write_text("a file")
    monkeypatch.setattr(sys, "argv", ["make", "html"])
    with pytest.raises(SystemExit, match=f"{build} cannot be written: file exists"):
        make.main()


def test_a_tree_without_git_is_told_apart_from_an_unchanged_one(tmp_path, monkeypatch, capsys):
    assert make._same_tree(running.tree_state())
    assert not make._same_tree("?? something\n")
    monkeypatch.setattr(running, "ROOT", tmp_path)
    assert running.tree_state() is None
    monkeypatch.setattr(make, "tree_state", running.tree_state)
    capsys.readouterr()
    assert make._same_tree(None) and "not looked at" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert running.tree_state() is None


def test_an_archive_inside_another_repository_is_no_checkout(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "unpacked").mkdir()
    monkeypatch.setattr(running, "ROOT", tmp_path / "unpacked")
    assert running.tree_state() is None
    monkeypatch.setattr(running, "ROOT", tmp_path)
    assert "unpacked" not in running.tree_state()


def test_the_quick_profile_is_recorded_on_one_thread(build, monkeypatch):
    import refresh

    asked = []

    def run(command, cwd):
        asked.append((json.loads(Path(command[3]).read_text()), command[4:]))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(refresh.subprocess, "run", run)
    with pytest.raises(SystemExit):
        refresh.records(None)
    ((plan, more),) = asked
    assert plan["threads"] == 1 and [run["seeds"] for run in plan["runs"]] == len(running.chapters()) * [
        [0, 1, 2, 3, 4]
    ]
    assert more == ["--force", "--workers", "2"]
