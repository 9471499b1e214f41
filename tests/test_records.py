"""The run directory's records after bad days: half-written lines, texts that are no UTF-8, broken files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.cluster.errors import UsageError
from dtrain.cluster.rundir import RunDir, append_event, read_jsonl
from dtrain.launcher import cli
from dtrain.launcher.runs import read_job, resolve

NO_UTF8 = b"data/\xff.bin".decode(errors="surrogateescape")


def test_an_event_after_a_line_that_was_cut_short(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    append_event(run, "one")
    with open(run.events, "a") as file:
        file.write('{"time": 1, "type": "tw')
    append_event(run, "three")
    assert [event["type"] for event in read_jsonl(run.events)] == ["one", "three"]


@pytest.mark.parametrize("line", ["", "nonsense", "[1]", "null", '{"a": '])
def test_what_is_no_record_is_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n{{"step"')
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]


def test_an_event_with_text_that_is_no_utf8(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    append_event(run, "failure", message=f"no such file: {NO_UTF8}", note="größer")
    (event,) = read_jsonl(run.events)
    assert event["message"].endswith(NO_UTF8)
    assert "größer" in run.events.read_text()


def test_a_command_can_print_it(tmp_path: Path) -> None:
    program = f"from dtrain.launcher import cli; cli._dispatch = lambda words: print({NO_UTF8!r}) or 0; cli.main([])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"data/\\udcff.bin\n"), done.stderr


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_a_broken_job_is_named(tmp_path: Path, text: str) -> None:
    RunDir(tmp_path).job.write_text(text)
    with pytest.raises(UsageError, match="is not a job of this dtrain"):
        read_job(tmp_path)


@pytest.mark.parametrize("text", ["", "~nobody-of-this-name/x", "a\0b", "x" * 5000, "..", "a/b/c"])
def test_what_is_no_run_is_no_traceback(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="no run has this label"):
        resolve(text, tmp_path)


def test_an_error_of_the_system_is_words_and_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDir(tmp_path).job.write_text(json.dumps({}))

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("dtrain.launcher.runs.read_json", refuse)
    assert cli.main(["status", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"dtrain: [Errno 13] Permission denied: '{tmp_path}/job.json'\n"
