"""One run at a time writes to a place."""

import os
import signal
import subprocess
import sys

import pytest

from comcat.errors import StoreError
from comcat.runs.claims import claimed

HOLD = """
import sys
from comcat.runs.claims import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def held_elsewhere(place) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_place_is_claimed_once_and_free_again(tmp_path):
    place = tmp_path / "new" / "out"
    with claimed(place):
        with pytest.raises(StoreError, match=r"another run is writing to .*out"), claimed(place):
            pass
        with pytest.raises(StoreError), claimed(tmp_path / "new" / ".." / "new" / "out"):
            pass
        with claimed(tmp_path / "new" / "other"):
            pass
    with claimed(place):
        pass
    assert not list(tmp_path.iterdir())


def test_what_was_written_meanwhile_stays(tmp_path):
    place = tmp_path / "new" / "out"
    with claimed(place):
        place.mkdir()
    assert [p.name for p in place.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_claim_of_another_process_ends_with_it(end, tmp_path):
    place = tmp_path / "out"
    other = held_elsewhere(place)
    with pytest.raises(StoreError, match="another run"), claimed(place):
        pass
    if end == "kill":
        os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    with claimed(place):
        pass
    assert not list(tmp_path.iterdir())


def test_an_error_ends_the_claim(tmp_path):
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "out"):
        raise KeyboardInterrupt
    with claimed(tmp_path / "out"):
        pass


def test_a_place_below_a_file_cannot_be_claimed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="nothing can be written"), claimed(tmp_path / "file" / "out"):
        pass


def test_without_locks_nothing_is_claimed(tmp_path, monkeypatch):
    import errno
    import fcntl

    def none(descriptor, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with claimed(tmp_path / "out"), claimed(tmp_path / "out"):
        pass
