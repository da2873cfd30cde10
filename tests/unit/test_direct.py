"""Files written past the page cache hold what was written, whatever the sizes, and their sum is that of the file."""

import errno
import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.checkpoint import direct
from dtrain.checkpoint.direct import DirectFile

SIZES = st.lists(st.one_of(st.integers(0, 200), st.sampled_from([4095, 4096, 4097, 8192, 30_000])), max_size=12)


@pytest.fixture(params=["disk", "shared memory"])
def folder(request, tmp_path, tmp_path_factory):
    """A file system that knows direct access, where there is one, and one that does not."""
    if request.param == "disk":
        return tmp_path
    path = tmp_path_factory.mktemp("link") / "shm"
    shm = f"/dev/shm/dtrain-test-{os.getpid()}"
    os.makedirs(shm, exist_ok=True)
    path.symlink_to(shm)
    request.addfinalizer(lambda: os.rmdir(shm))
    return path


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, seed=st.integers(0, 2**32))
def test_what_is_written_is_there(sizes, seed, tmp_path_factory, monkeypatch_class):
    path = tmp_path_factory.mktemp("d") / "file"
    data = [os.urandom(size) for size in sizes]
    with DirectFile(path) as file:
        for number, part in enumerate(data):
            assert file.tell() == sum(sizes[:number])
            assert file.write(part) == len(part)
        os.fsync(file.fileno())
        assert file.tell() == sum(sizes)
    whole = b"".join(data)
    assert path.read_bytes() == whole
    assert file.sha256 == hashlib.sha256(whole).hexdigest()


@pytest.fixture(scope="module")
def monkeypatch_class():
    """A small buffer, so that it is filled often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "BUFFER", 2 * 4096)
        yield


def test_either_kind_of_file_system(folder):
    path = folder / "file"
    data = os.urandom(20 * 2**20 + 777)
    with DirectFile(path) as file:
        file.write(memoryview(data))
    assert path.read_bytes() == data
    path.unlink()


def test_direct_access_that_is_promised_and_not_kept(tmp_path, monkeypatch):
    """Some file systems open the file and refuse the first write."""
    write, refused = os.write, []

    def refuse_once(descriptor, data):
        if not refused:
            refused.append(True)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refuse_once)
    with DirectFile(tmp_path / "file") as file:
        file._is_direct = True
        file.write(b"x" * 10_000_000)
    assert (tmp_path / "file").read_bytes() == b"x" * 10_000_000


def test_a_write_that_is_cut_short(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: max(1, len(data) // 3)]))
    data = os.urandom(100_000)
    with DirectFile(tmp_path / "file") as file:
        file.write(data)
    assert (tmp_path / "file").read_bytes() == data


def test_a_full_disk_is_said_once(tmp_path, monkeypatch):
    def refuse(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match="No space left"), DirectFile(tmp_path / "file") as file:
        file.write(b"x" * 20_000_000)
    assert file._descriptor == -1
