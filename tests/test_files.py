"""Files appear whole or not at all, whoever else writes them and whatever goes wrong."""
import os
import stat
import sys

import pytest

from minipali import files
from minipali.errors import InputError
from minipali.files import check_writable, make_folder, read_json, replacing, write_json

unix = pytest.mark.skipif(sys.platform == "win32", reason="permissions and links are Unix's")


def test_a_file_is_written_whole(tmp_path):
    with replacing(tmp_path / "a.bin") as file:
        file.write(b"half")
        assert not (tmp_path / "a.bin").exists()
        file.write(b" and half")
    assert (tmp_path / "a.bin").read_bytes() == b"half and half" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_what_fails_leaves_nothing(tmp_path, error):
    """The old file is there, and nothing else, whatever ended the block."""
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"new")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, step):
    """One line that names the file as the user does, and the old file stays."""
    path = tmp_path / "a.bin"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(InputError) as caught, replacing(path) as file:
            file.write(b"new")
    assert str(caught.value) == f"{path}: cannot be written (No space left on device)"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.bin"]


def test_two_runs_that_write_the_same_file(tmp_path):
    """Neither publishes the other's bytes, and the last to finish wins."""
    path = tmp_path / "a.bin"
    with replacing(path) as first:
        first.write(b"first, ")
        with replacing(path) as second:
            second.write(b"second")
            assert len(os.listdir(tmp_path)) == 2, "each has a file of its own"
        assert path.read_bytes() == b"second"
        first.write(b"all of it")
    assert path.read_bytes() == b"first, all of it" and os.listdir(tmp_path) == ["a.bin"]


def test_the_bytes_are_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    """Or a power failure would leave the new name on an empty file."""
    done, sync, replace = [], os.fsync, os.replace

    def synced(number):
        done.append(os.fstat(number).st_size)
        sync(number)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    with replacing(tmp_path / "a.bin") as file:
        file.write(b"12345")
    assert done == [5, "renamed"]


def test_the_new_file_lies_in_the_same_folder(tmp_path):
    """Renaming works within one file system only. Its name is no checkpoint's: no reader takes it for a shard."""
    with replacing(tmp_path / "model.safetensors") as file:
        [name] = os.listdir(tmp_path)
        assert os.path.samefile(file.name, tmp_path / name)
        assert name.startswith(".") and not name.endswith(".safetensors")


@unix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_of_a_new_file(tmp_path, mask):
    """Those of any new file: 0o666 less the umask."""
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "a.json").st_mode) == 0o666 & ~mask


@unix
def test_permissions_of_an_old_file(tmp_path):
    """They stay, as if the file had been overwritten: what only its owner could read is not shown to all."""
    path = tmp_path / "a.json"
    path.write_text("1")
    path.chmod(0o600)
    write_json(path, 2)
    assert read_json(path) == 2 and stat.S_IMODE(path.stat().st_mode) == 0o600


@unix
@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_is_followed(tmp_path, exists):
    """The link stays a link and its target gets the content, also in another folder, also if it is not there yet."""
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "a.json", tmp_path / "link.json"
    if exists:
        target.write_text("1")
    link.symlink_to(target)
    write_json(link, 2)
    assert link.is_symlink() and read_json(target) == 2
    assert os.listdir(tmp_path / "elsewhere") == ["a.json"] and sorted(os.listdir(tmp_path)) == ["elsewhere",
                                                                                                 "link.json"]


def test_long_names(tmp_path):
    """A name of 255 bytes, the longest that folders take, in letters of one byte and of four."""
    for name in ["a" * 250 + ".json", "🦉" * 60 + ".json"]:
        write_json(tmp_path / name, name)
        assert read_json(tmp_path / name) == name


def test_a_folder_is_no_file(tmp_path):
    for check in [check_writable, lambda path: write_json(path, 1)]:
        with pytest.raises(InputError, match="exists and is not a regular file$"):
            check(tmp_path)


@unix
def test_pipes_and_devices_stay_what_they_are(tmp_path):
    """A pipe stands for them here: a test that fails must not put a file in the place of the machine's /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    for check in [check_writable, lambda path: write_json(path, 1)]:
        with pytest.raises(InputError, match="pipe: cannot be written: it exists and is not a regular file$"):
            check(tmp_path / "pipe")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_a_folder_that_is_not_there(tmp_path):
    for check in [check_writable, lambda path: write_json(path, 1)]:
        with pytest.raises(InputError, match="none.a.json: cannot be written, expected a folder that exists"):
            check(tmp_path / "none" / "a.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder that exists"):
        check_writable(tmp_path / "file" / "a.json")
    with pytest.raises(InputError, match="file.a: cannot be written into, expected a folder"):
        make_folder(tmp_path / "file" / "a")


def test_a_folder_that_takes_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InputError, match="expected a folder that exists and takes files"):
        check_writable(tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot be written into"):
        make_folder(tmp_path)


def test_a_file_in_the_present_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("a.json")
    write_json("a.json", {"ä": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ä": [\n    1\n  ]\n}\n'


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[" * 10**5, b"9" * 5000, b""])
def test_what_is_no_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match="a.json: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="a.json: no such file$"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)
