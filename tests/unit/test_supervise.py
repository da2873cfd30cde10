"""What is done about a run that says it is under way: a function of what is seen of it, and then done."""

import os
import subprocess
import sys
import time

import pytest
from making import a_run

from dtrain import api, runs, supervise
from dtrain.backends import Sight
from dtrain.errors import InputError, StorageError
from dtrain.supervise import Seen, decide

AT_IT = Sight(phase="running")
OVER = Sight(phase="ended", why="exit code 137", is_over=True, succeeded=False)
UNTAKEN = Seen(has_driver=False, is_owned=False, can_look=True, sight=None, losses=0, allowed=5, silent_s=10.0)
DRIVEN = Seen(has_driver=True, is_owned=True, can_look=True, sight=AT_IT, losses=0, allowed=5, silent_s=1000.0)


def seen(of: Seen, **changes) -> Seen:
    return Seen(**{**vars(of), **changes})


@pytest.mark.parametrize(
    ("what", "action", "why"),
    [
        (UNTAKEN, "leave", "waits for its cluster"),
        (seen(UNTAKEN, sight=Sight(phase="queued", why="no node fits")), "leave", "waits"),
        (seen(UNTAKEN, sight=OVER), "end", "before a driver began: exit code 137"),
        (seen(UNTAKEN, sight=OVER, losses=1), "leave", "somebody is handing it over"),
        (seen(UNTAKEN, sight=OVER, losses=1, silent_s=1000.0), "again", "from before"),  # who did so has died
        (seen(DRIVEN, sight=OVER, is_asked_to_stop=True), "stop", "asked to stop"),
        (seen(UNTAKEN, silent_s=1000.0), "again", "knows nothing of it"),
        (seen(UNTAKEN, silent_s=1000.0, losses=5), "end", "retry.driver allows 5, all used"),
        (seen(UNTAKEN, silent_s=1000.0, can_look=False), "leave", "waits"),
        (DRIVEN, "leave", "the cluster is at it"),
        (seen(DRIVEN, is_owned=False), "leave", "the cluster is at it"),  # its head comes back and takes over by itself
        (seen(DRIVEN, sight=OVER), "again", "exit code 137"),  # no lease is waited for
        (seen(DRIVEN, sight=OVER, losses=4), "again", "exit code 137"),
        (seen(DRIVEN, sight=OVER, losses=5), "end", "allows 5, all used; last: the cluster ended its driver"),
        (seen(DRIVEN, sight=None), "leave", "keeps the lease"),
        (seen(DRIVEN, sight=None, is_owned=False), "again", "its driver is gone"),
        (seen(DRIVEN, sight=None, is_owned=False, allowed=0), "end", "allows 0"),
    ],
)
def test_decisions(what, action, why):
    verdict = decide(what)
    assert verdict.action == action
    assert why in verdict.why


def test_a_run_whose_driver_died_is_handed_over_again_as_often_as_it_may(tmp_path, monkeypatch):
    """On this machine's cluster, which can say nothing of a run: the lease decides."""
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    run = a_run(tmp_path, state="running", driver_pid=dead)
    untouched = a_run(tmp_path, state="succeeded", exit_code=0)
    sent = []
    monkeypatch.setattr(api.backend_of(run.plan), "send", lambda submission, options, say: sent.append(submission))
    said: list[str] = []
    allowed = run.plan.retry.driver
    for number in range(allowed):
        assert supervise.Watcher(str(tmp_path), None, said.append).look() == 1
        record = run.record
        assert (record.state, record.submissions, len(sent)) == ("queued", number + 2, number + 1)
        supervise.Watcher(str(tmp_path), None, said.append).look()
        assert len(sent) == number + 1, "it waits for its cluster now"
        run.update(state="running", driver_pid=dead)
    assert supervise.Watcher(str(tmp_path), None, said.append).look() == 1
    assert (run.record.state, run.record.error_kind, run.record.exit_code) == ("failed", "retries-exhausted", 4)
    assert len(sent) == allowed
    assert all(run.id in line for line in said)
    assert supervise.Watcher(str(tmp_path), None, said.append).look() == 0
    assert untouched.record.submissions == 1


def test_a_run_that_has_ended_is_not_looked_at_again_soon(tmp_path):
    ended = a_run(tmp_path, state="succeeded", exit_code=0)
    said: list[str] = []
    watcher = supervise.Watcher(str(tmp_path), None, said.append)
    assert watcher.look() == 0
    ended.update(state="running", driver_pid=os.getpid())
    ended.acquire()
    assert watcher.look() == 0, "that it runs again is seen later"
    assert supervise.Watcher(str(tmp_path), None, said.append).look() == 1
    a_run(tmp_path, state="running", driver_pid=os.getpid()).acquire()
    assert watcher.look() == 1, "a new one is seen"
    assert said == []


def test_two_who_saw_the_same_hand_it_over_once(tmp_path):
    run = a_run(tmp_path, state="running", driver_pid=1)
    judged_by = run.stored_record()
    assert runs.Run(run.path).put_back("its driver is gone", judged_by)
    assert not run.put_back("its driver is gone", judged_by)
    assert run.record.submissions == 2


def test_a_lost_run_that_was_asked_to_stop_is_stopped(tmp_path):
    run = a_run(tmp_path, state="running", driver_pid=1)
    run.request_stop("me")
    supervise.Watcher(str(tmp_path), None, print).look()
    assert (run.record.state, run.record.exit_code) == ("stopped", 130)


class Cluster:
    """Says one thing after another of a run, and then the last for ever; does something before it says the last."""

    def __init__(self, sights, meanwhile=lambda: None):
        self._sights, self._meanwhile, self.sent = list(sights), meanwhile, []

    def look(self, run_id, options):
        if len(self._sights) > 1:
            return self._sights.pop(0)
        self._meanwhile()
        return self._sights[0]

    def render(self, plan, path):
        return path

    def send(self, submission, options, say):
        self.sent.append(submission)


def test_whoever_follows_waits_while_the_cluster_starts_another_driver(tmp_path, monkeypatch):
    run = a_run(tmp_path, state="running", driver_pid=1)
    cluster = Cluster([Sight(phase="starting", why="its head starts again")] * 2, runs.Run(run.path).acquire)
    monkeypatch.setattr(api, "backend_of", lambda plan: cluster)
    monkeypatch.setattr(supervise, "RETURN_CHECK_S", 0.01)
    said: list[str] = []
    assert run.record.state == "lost"
    assert supervise.revive(run, said.append)
    assert said == [f"{run.id}: its driver is gone; its cluster starts another (its head starts again)"]
    assert (run.stored_record().submissions, cluster.sent) == (1, [])


def test_a_cluster_that_gave_up_starting_another_driver_is_handed_the_run_again(tmp_path, monkeypatch):
    run = a_run(tmp_path, state="running", driver_pid=1)
    cluster = Cluster([Sight(phase="starting"), OVER])
    monkeypatch.setattr(api, "backend_of", lambda plan: cluster)
    monkeypatch.setattr(supervise, "RETURN_CHECK_S", 0.01)
    assert supervise.revive(run, print)
    assert (run.stored_record().submissions, len(cluster.sent)) == (2, 1)


def test_a_driver_that_lives_is_left_alone(tmp_path):
    run = a_run(tmp_path, state="running", driver_pid=os.getpid())
    driver = runs.Run(run.path)
    driver.acquire()
    supervise.Watcher(str(tmp_path), None, print).look()
    assert run.record.state == "running"
    driver.release()


def test_trouble_with_one_run_keeps_no_other_from_being_looked_at(tmp_path, monkeypatch):
    bad, good = a_run(tmp_path, state="running", driver_pid=1), a_run(tmp_path, state="running", driver_pid=1)
    (bad.path / "plan.json").unlink()
    sent = []
    monkeypatch.setattr(api.backend_of(good.plan), "send", lambda submission, options, say: sent.append(submission))
    said: list[str] = []
    supervise.Watcher(str(tmp_path), None, said.append).look()
    assert [submission.run_path for submission in sent] == [str(good.path)]
    assert any(bad.id in line and "plan.json" in line for line in said)


def test_a_sign_of_life_comes_with_each_run_and_each_look_that_succeeds(tmp_path, monkeypatch):
    for _ in range(2):
        a_run(tmp_path, state="running", driver_pid=os.getpid())
    signs: list[str] = []
    monkeypatch.setattr(supervise, "look_at", lambda *_: signs.append("look"))
    watcher = supervise.Watcher(str(tmp_path), None, print, lambda: signs.append("alive"))
    watcher.look()
    assert signs == ["alive", "look", "alive", "look", "alive"]
    signs.clear()

    def unreachable(*_, **__):
        raise StorageError("the storage does not answer; try later")

    monkeypatch.setattr(runs, "list_runs", unreachable)
    with pytest.raises(StorageError):
        watcher.look()
    assert signs == []


def test_the_file_of_the_sign_of_life_is_touched_by_each_look(tmp_path):
    from click.testing import CliRunner

    from dtrain.cli import cli

    alive = tmp_path / "alive"
    words = ["supervise", "--once", "--storage", str(tmp_path / "runs"), "--alive"]
    assert CliRunner().invoke(cli, [*words, str(alive)]).exit_code == 0
    os.utime(alive, (0, 0))
    assert CliRunner().invoke(cli, [*words, str(alive)]).exit_code == 0
    assert time.time() - alive.stat().st_mtime < 60
    result = CliRunner().invoke(cli, [*words, str(tmp_path / "nowhere" / "alive")])
    assert isinstance(result.exception, InputError)
    assert "cannot be touched (No such file or directory)" in str(result.exception)


def test_a_supervisor_that_is_told_to_end_does_so_between_two_looks(tmp_path):
    alive = tmp_path / "alive"
    words = ["supervise", "--storage", str(tmp_path / "runs"), "--every", "600", "--alive", str(alive)]
    supervisor = subprocess.Popen([sys.executable, "-m", "dtrain", *words], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not alive.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        supervisor.terminate()
        assert supervisor.wait(30) == 0
    finally:
        supervisor.kill()


def test_what_this_machines_cluster_does_not_offer_is_said(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from dtrain.cli import cli

    monkeypatch.chdir(tmp_path)
    for words, expected in (
        (["cluster", "scale", "3"], "cannot be scaled"),
        (["cluster", "doctor"], "`dtrain doctor` checks this machine"),
    ):
        result = CliRunner().invoke(cli, words)
        assert isinstance(result.exception, InputError)
        assert expected in str(result.exception)


def test_a_dry_run_never_takes_the_file_for_its_word(tmp_path):
    from click.testing import CliRunner

    from dtrain.cli import cli

    job = os.path.join(os.path.dirname(__file__), "..", "ray", "job.yaml")
    first = CliRunner().invoke(cli, ["submit", "--dry-run", job])
    last = CliRunner().invoke(cli, ["submit", job, "--dry-run"])
    assert first.exit_code == last.exit_code == 0, first.output
    assert "entrypoint" in first.output
    refused = CliRunner().invoke(cli, ["submit", job, "--dry-run=server"])
    assert isinstance(refused.exception, InputError)
    assert "has no server that checks" in str(refused.exception)
