"""The loop of a long run goes on bit for bit, keeps an interrupted step, and refuses what is not its own."""

import json
import signal
import threading
import time

import pytest
import torch

from comcat.errors import NumericsError, StoreError
from comcat.runs.checkpoints import Checkpoints
from comcat.runs.interruption import TWICE, Interruption
from comcat.runs.loop import Run, carry_out, find_checkpoint
from comcat.runs.processes import Processes
from comcat.runs.seeding import derive_seed
from tests.parallel import in_processes


class Walk(Run):
    """A random walk whose steps depend on what was walked before; ``at`` is called at the start of each step."""

    name = "walk"

    def __init__(self, steps=7, pace=1.0, at=lambda number: None, kept=True):
        self.steps, self.identity, self.at, self.kept = steps, {"pace": pace}, at, kept
        self.place, self.path, self.done = torch.zeros(3), [], []

    def step(self, number, watch):
        self.at(number)
        noise = torch.Generator().manual_seed(derive_seed(0, "step", number))
        place = 0.9 * self.place + self.identity["pace"] * torch.randn(3, generator=noise)
        watch.check(float(place.norm()), number, [])
        self.place = place
        self.path.append(float(place.norm()))
        return {"distance": f"{self.path[-1]:.2f}"}

    def tensors(self):
        return {"weights": {"place": self.place}}

    def state(self):
        return {"path": self.path}

    def restore(self, step, tensors, state):
        self.path = list(state["path"])
        assert len(self.path) == step
        if tensors:  # the main process alone
            self.place = tensors["weights"]["place"]
        self.place = Processes(cpu=True).share(self.place)

    def after(self, done):
        self.done.append(done)


def go(walk, folder=None, *, every=(2,), restart=False, **more):
    processes = Processes(cpu=True)
    checkpoints = None if folder is None else Checkpoints(folder, keep=9)
    since = find_checkpoint(checkpoints, walk.identity, processes, restart=restart)
    carry_out(walk, processes, checkpoints=checkpoints, every=every, since=since, **more)
    return walk


def kept(folder) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.glob("step-*"))]


class Killed(BaseException):
    pass


def at(step: int, do):
    """What calls ``do`` at a step."""
    return lambda number: do() if number == step else None


def die():
    raise Killed


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("step", range(7))
def test_a_run_killed_at_any_step_ends_as_one_that_was_not(tmp_path, step):
    undisturbed = go(Walk())
    with pytest.raises(Killed):
        go(Walk(at=at(step, die)), tmp_path)
    again = go(Walk(), tmp_path)
    assert torch.equal(again.place, undisturbed.place) and again.path == undisturbed.path
    assert again.done == list(range(2 * (step // 2) + 1, 8))  # it went on from the last checkpoint
    assert go(Walk(), tmp_path).done == []  # finished
    assert go(Walk(), tmp_path, restart=True).done == list(range(1, 8))


def test_checkpoints_come_when_they_are_due_and_at_the_end(tmp_path):
    go(Walk(steps=11), tmp_path, every=(3, 4))
    assert kept(tmp_path) == [3, 4, 6, 8, 9, 11]
    go(Walk(), tmp_path / "other", every=())
    assert kept(tmp_path / "other") == [7]
    assert go(Walk()).done == list(range(1, 8))  # without a folder it runs all the same


def test_a_checkpoint_is_there_before_what_comes_after_it(tmp_path):
    class Looking(Walk):
        def after(self, done):
            assert (done in kept(tmp_path)) == (done % 2 == 0 or done == 7)

    go(Looking(), tmp_path)


def test_interrupted_it_keeps_the_step_and_says_how_to_go_on(tmp_path, capfd):
    walk = Walk(at=at(4, ctrl_c))
    with pytest.raises(KeyboardInterrupt, match=r"after step 5 of 7; the last good checkpoint is .*step-00000005"):
        go(walk, tmp_path, every=(), progress=True)
    assert kept(tmp_path) == [5] and walk.done[-1] == 5
    assert "press Ctrl-C again to stop at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = go(Walk(), tmp_path)
    assert again.path == go(Walk()).path and again.done == [6, 7]


def test_interrupted_without_a_place_to_keep_anything_it_stops_at_once():
    walk = Walk(at=at(4, ctrl_c))
    with pytest.raises(KeyboardInterrupt):
        go(walk)
    assert len(walk.path) == 4


def test_a_second_interruption_stops_at_once(tmp_path):
    """One that follows at once is the same key press, passed on by a launcher."""
    clock = [100.0]

    def thrice():
        ctrl_c()
        clock[0] += TWICE / 2
        ctrl_c()
        clock[0] += TWICE
        ctrl_c()
        pytest.fail("the third was not heard")

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(time, "monotonic", lambda: clock[0])
        go(Walk(at=at(3, thrice)), tmp_path)
    assert kept(tmp_path) == [2]


def test_handlers_of_others_are_left_alone(tmp_path):
    def mine(number, frame):
        raise Killed

    before = signal.signal(signal.SIGINT, mine)
    try:
        with pytest.raises(Killed):
            go(Walk(at=at(3, ctrl_c)), tmp_path)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)

    def in_a_thread():
        with Interruption(active=True) as found:
            assert not found.asked

    thread = threading.Thread(target=in_a_thread)  # where signal.signal would raise
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("begun", [0, 90])
def test_the_estimate_is_of_this_calls_steps(tmp_path, monkeypatch, capfd, begun):
    """A step takes two seconds of a clock that goes by the steps; those of an earlier call took none of it."""
    clock = [1000.0]
    if begun:
        with pytest.raises(Killed):
            go(Walk(steps=100, at=at(begun, die)), tmp_path, every=(begun,))
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])

    def tick(number):
        clock[0] += 2.0
        if number == begun + 5:
            raise Killed

    with pytest.raises(Killed):
        go(Walk(steps=100, at=tick), tmp_path, progress=True)
    last = capfd.readouterr().err.split("\r")[-1]
    assert f"{begun + 5}/100" in last and "distance=" in last
    left = 2 * (100 - begun - 5) + 2 * (100 - begun - 5) // 5  # the sixth step is under way
    assert f"<{left // 60:02d}:{left % 60:02d}," in last


def test_a_loss_that_is_no_number_says_where_to_go_on(tmp_path):
    walk = Walk()
    walk.at = at(5, lambda: walk.place.fill_(float("nan")))
    with pytest.raises(NumericsError, match=r"the loss is nan at step 5; the last good checkpoint is .*step-00000004"):
        go(walk, tmp_path)
    walk = Walk(at=at(0, lambda: walk.place.fill_(float("inf"))))
    with pytest.raises(NumericsError, match="at step 0; there is no checkpoint yet"):
        go(walk, tmp_path / "other")


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    class Poisoned(Walk):
        def tensors(self):
            return {"weights": {"place": self.place / (0 if len(self.path) == 4 else 1)}}

    with pytest.raises(NumericsError, match=r"place holds NaN or infinity after step 4; .*step-00000002"):
        go(Poisoned(), tmp_path)
    assert kept(tmp_path) == [2]


def test_another_run_is_not_gone_on_with(tmp_path):
    go(Walk(), tmp_path)
    with pytest.raises(StoreError, match=r"made with other settings: pace was 1\.0, now 2\.0.*--restart"):
        go(Walk(pace=2.0), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.update(format=2),
            r"is of format 2, this version of comcat goes on from format 1.*--restart",
        ),
        (lambda state: state.pop("path"), r"does not hold what .* goes on from \(KeyError: 'path'\).*--restart"),
        (lambda state: state.update(path=7), r"does not hold what .* goes on from \(TypeError: .*--restart"),
        (lambda state: state.pop("settings"), "does not say its settings"),
    ],
)
def test_checkpoints_of_other_versions_are_refused_without_a_traceback(tmp_path, change, message):
    go(Walk(), tmp_path)
    file = tmp_path / "step-00000007" / "state.json"
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))
    with pytest.raises(StoreError, match=message):
        go(Walk(), tmp_path)


def test_missing_and_damaged_tensors_are_refused(tmp_path):
    go(Walk(), tmp_path)
    file = tmp_path / "step-00000007" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(StoreError, match=r"weights\.safetensors cannot be read"):
        go(Walk(), tmp_path)


# ---------------------------------------------------------------- several processes


def _interrupted(folder):
    """One process alone hears Ctrl-C; all stop after the same step, and go on together."""
    index = Processes(cpu=True).index
    walk = Walk(at=at(4, ctrl_c) if index == 1 else lambda number: None)
    try:
        go(walk, folder, every=())
    except KeyboardInterrupt:
        first = len(walk.path)
    Processes(cpu=True).agree()
    return first, kept(folder), go(Walk(), folder).path


def test_processes_stop_together(tmp_path):
    path = go(Walk()).path
    assert in_processes(2, _interrupted, tmp_path) == [(5, [5], path)] * 2


def _told(folder):
    poisoned = Walk(steps=9)
    poisoned.at = at(8, lambda: poisoned.place.fill_(float("nan")))
    found = []
    for walk in (Walk(pace=2.0), poisoned):
        try:
            go(walk, folder)
        except (StoreError, NumericsError) as error:
            found.append((type(error).__name__, error.everywhere, "step-00000008" in str(error)))
    return found


def test_what_goes_wrong_is_raised_in_all(tmp_path):
    go(Walk(), tmp_path)
    assert in_processes(2, _told, tmp_path) == [[("StoreError", True, False), ("NumericsError", True, True)]] * 2
