"""Files that are written whole or not at all, beside whatever else lies there."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import TameError
from tasks.runtime.files import check_writable, existing_parent, write_text


@pytest.mark.parametrize(
    "name", [".result.json.swp", ".result.json.swo", ".result.json.Xa81b2", ".result.json.", ".result.json.99999999999"]
)
def test_what_an_editor_or_rsync_has_left_beside_a_file_stays_and_harms_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("theirs")
    assert write_text(tmp_path / "result.json", "ours") == tmp_path / "result.json"
    assert (tmp_path / "result.json").read_text() == "ours"
    assert (tmp_path / name).read_text() == "theirs"


def test_what_a_killed_writer_has_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".result.json.{ended.pid}").write_text("half")
    write_text(tmp_path / "result.json", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / "result.json", "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "result.json", "half \udc80")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("result.json", "before")]


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_left_in_one_that_can(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TameError, match="file is a file, so no folder can be made there; give another"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(
        TameError, match=r"/proc/out: /proc cannot be written \(.*\); make it writable, or give another"
    ):
        check_writable(Path("/proc/out"))  # root may write there by its bits, and cannot
    check_writable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(tmp_path) == tmp_path
    assert existing_parent(Path("/nothing/here")) == Path("/")
