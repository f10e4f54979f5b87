"""In whatever order things happen to a load and its relays, what must hold holds; and the search
finds what breaks it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
from dualpath.agent.hand_off import HandOff
from dualpath.agent.holdings import Holdings
from dualpath.agent.intake import Intake
from dualpath.agent.load_window import LoadWindow
from dualpath.agent.relay import Relay
from dualpath.agent.relay_job import RelayChunk
from dualpath.agent.relay_upstream import RelayUpstream
from dualpath.agent.staging import Slot, Staging
from dualpath.bench.command import PROGRAMS
from dualpath.bench.explore.command import EXIT_FAILED, EXIT_OK, EXIT_USAGE, command
from dualpath.bench.explore.schedules import Bounds, Broken, explore, parse_schedule, play
from dualpath.bench.explore.stage import Stage, StageConfig
from dualpath.cli.main import main
from dualpath.transfer.dispatcher import Dispatcher
from dualpath.transfer.placement import POLICY_NAMES
from dualpath.transfer.transport import Arrival
from dualpath.transfer.window import WindowTable

ONE_RELAY = StageConfig(blocks=2, relays=1)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("relays", [0, 1, 2])
@pytest.mark.parametrize("retain", [False, True])
def test_one_delay_or_one_fault_anywhere_breaks_nothing(
    policy: str, relays: int, retain: bool
) -> None:
    config = StageConfig(blocks=2, relays=relays, policy=policy, retain=retain)
    assert explore(config, Bounds(delays=1, faults=0)).whole
    faults = explore(config, Bounds(delays=0, faults=1))
    assert faults.whole
    assert {
        "aborted",
        "corrupt",
        "lease_expired",
        "overloaded",
        "path_lost",
    } <= faults.events.keys()


def test_chunks_that_wait_for_a_ticket_are_asked_for_once_however_often_they_are_taken_back() -> (
    None
):
    stage = Stage(ONE_RELAY)
    asked = []
    held = {"delegation of loader": 0.8, "write 1 to loader#1 of tag 1 begins": 0.3}
    while stage.ended is None:
        possible = stage.possible()
        if not possible:
            assert stage.pass_time()
        elif (seconds := held.pop(possible[0].what, 0.0)) > 0:
            stage.hold(possible[0], seconds)
        else:
            asked += [possible[0].what] * ("asks relay-0" in possible[0].what)
            stage.agenda.take(possible[0])
            stage.perform(possible[0].happen)
    assert asked == ["loader asks relay-0 for blocks [1]"]
    assert stage.ended.events["overtaken"] > 1
    stage.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_delays_anywhere_break_nothing() -> None:
    tally = explore(ONE_RELAY, Bounds(delays=2, faults=0))
    assert tally.whole
    assert tally.events["overtaken"]
    assert tally.events["stalled"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_delay_and_a_fault_anywhere_break_nothing() -> None:
    assert explore(ONE_RELAY, Bounds(delays=1, faults=1)).whole


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_faults_anywhere_break_nothing() -> None:
    assert explore(ONE_RELAY, Bounds(delays=0, faults=2, runs=6000, seed=1)).runs == 6000


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("retain", [False, True])
def test_many_delays_and_faults_with_two_relays_break_nothing(retain: bool) -> None:
    config = StageConfig(blocks=3, relays=2, retain=retain)
    assert explore(config, Bounds(delays=3, faults=3, runs=2500, seed=1)).runs == 2500


@pytest.mark.parametrize("retain", [False, True])
def test_hand_offs_and_receives_keep_what_holds_of_loads(retain: bool) -> None:
    config = StageConfig(blocks=2, retain=retain, hand_off=True)
    assert explore(config, Bounds(delays=1, faults=0, runs=120, seed=3)).runs == 120
    faults = explore(config, Bounds(delays=0, faults=1))
    assert faults.whole
    assert {"hand_off_peer_lost", "intake_peer_lost", "hand_off_aborted", "peer_lost"} <= (
        faults.events.keys()
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("retain", [False, True])
def test_many_delays_and_faults_of_a_hand_off_break_nothing(retain: bool) -> None:
    config = StageConfig(blocks=2, retain=retain, hand_off=True)
    assert explore(config, Bounds(delays=2, faults=2, runs=1200, seed=1)).runs == 1200


# What the search must find: each of these takes one guarantee away.


def broken(config: StageConfig = ONE_RELAY, **bounds: int) -> str:
    with pytest.raises(Broken) as caught:
        explore(config, Bounds(**bounds))
    schedule = ",".join(map(str, caught.value.schedule))
    if schedule:
        with pytest.raises(Broken) as again:
            play(config, parse_schedule(schedule))
        assert str(again.value) == str(caught.value), "the schedule that is named breaks it again"
    return str(caught.value.violation)


def test_a_window_that_is_not_fenced_at_the_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def close(self: LoadWindow) -> None:
        self.open = False

    monkeypatch.setattr(LoadWindow, "close", close)
    found = broken(delays=0, faults=1)
    assert "used again" in found or "left at the loader" in found


def test_a_fence_that_does_not_wait_for_what_is_landing_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def revoke(self: WindowTable, window: Any) -> None:
        with self._lock:
            self._windows.pop(window.key, None)  # but what is landing goes on

    monkeypatch.setattr(WindowTable, "revoke", revoke)
    assert "used again" in broken(delays=0, faults=1)


def test_chunks_that_are_taken_back_without_a_fence_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fence(self: LoadWindow, tags: Collection[int]) -> dict[int, int]:
        return {tag: self.outstanding.pop(tag) for tag in tags if tag in self.outstanding}

    monkeypatch.setattr(LoadWindow, "fence", fence)
    assert "the same bytes" in broken(delays=2, faults=0)


def test_checksums_that_are_not_compared_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = LoadWindow._hashed

    def trusting(self: LoadWindow, tags: Sequence[int], digests: Sequence[int]) -> Sequence[bool]:
        return hashed(self, tags, [self._checksums.get(tag, 0) for tag in tags])

    monkeypatch.setattr(LoadWindow, "_hashed", trusting)
    assert "counts and is wrong" in broken(delays=0, faults=1)


def test_staging_that_is_given_back_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    on_landed = Relay._on_landed

    def hasty(self: Relay, chunks: list[RelayChunk]) -> None:
        on_landed(self, chunks)
        for chunk in chunks:
            if chunk.slot is not None:
                self.staging.give_back(chunk.slot)
                view = self.staging.region.view
                view[chunk.slot.offset : chunk.slot.offset + 64] = bytes(64)  # of another load
                chunk.slot = None

    monkeypatch.setattr(Relay, "_on_landed", hasty)
    assert "has changed under it" in broken(delays=0, faults=0)


def test_a_slot_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: Staging, slot: Slot) -> None:
        pass

    monkeypatch.setattr(Staging, "give_back", forget)
    assert "of staging" in broken(delays=0, faults=0)


def test_chunks_of_a_lost_path_that_nobody_fetches_again_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = Dispatcher.path_lost

    def forgetful(self: Dispatcher, name: str, reason: str, now: float) -> Any:
        given_back = lost(self, name, reason, now)
        for load_id, chunks in given_back.items():
            self.drop(load_id, chunks)
        return given_back

    monkeypatch.setattr(Dispatcher, "path_lost", forgetful)
    assert "one fault has cost blocks" in broken(delays=0, faults=1)


def test_a_chunk_that_is_held_unverified_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(self: RelayUpstream, upstream: Any, tags: Sequence[int], digests: Any) -> Any:
        named = [self.asked(upstream.daemon, tag) for tag in tags]
        right = [chunk.name[3] for chunk in named if chunk is not None and chunk.name]
        return hashed(self, upstream, tags, right)

    hashed = RelayUpstream._hashed
    monkeypatch.setattr(RelayUpstream, "_hashed", trusting)
    config = StageConfig(blocks=2, relays=1, retain=True)
    assert "what is held is wrong" in broken(config, delays=0, faults=1)


def test_what_a_callback_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(self: Relay, items: Any) -> None:
        raise RuntimeError("a bad day")

    monkeypatch.setattr(Relay, "_on_ended", raising)
    assert "RuntimeError: a bad day" in broken(delays=0, faults=0)


# The program.


def test_the_program_counts_what_it_ran(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    out = tmp_path / "out.json"
    words = ["--delays", "1", "--faults", "0", "--json", str(out)]
    assert main(["bench", "explore", *words]) == EXIT_OK
    assert "everything held" in capsys.readouterr().out
    assert '"whole": true' in out.read_text()


def test_the_program_says_what_happened_when_something_breaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Staging, "give_back", lambda *_: None)
    assert main(["bench", "explore", "--faults", "0"]) == EXIT_FAILED
    said = capsys.readouterr().out
    assert "asks the daemon for blocks" in said
    assert "schedule none" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--delays", "9"], "--delays"),
        (["--faults", "-1"], "--faults"),
        (["--blocks", "0"], "--blocks"),
        (["--relays", "5"], "--relays"),
        (["--policy", "best"], "'best'"),
        (["--seconds", "0"], "--seconds"),
        (["--schedule", "1:x"], "1:x"),
        (["--schedule", "4:f999"], "4:f999"),
    ],
)
def test_wrong_usage_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    assert main(["bench", "explore", *words]) == EXIT_USAGE
    assert named in capsys.readouterr().err


def test_a_schedule_is_played_event_by_event(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "explore", "--schedule", "4:f3"]) == EXIT_OK
    assert "FAULT" in capsys.readouterr().out
    assert command.name in PROGRAMS


def test_a_stage_at_rest_is_a_whole_load() -> None:
    stage = Stage(ONE_RELAY)
    happen: Callable[[], None]
    while possible := stage.possible():
        happen = possible[0].happen
        stage.agenda.take(possible[0])
        stage.perform(happen)
    assert stage.ended is not None
    assert stage.ended.blocks == 2
    assert set(stage.ended.shares) == {"direct", "relay:relay-0"}
    stage.close()


HAND_OFF = StageConfig(blocks=2, hand_off=True)


def test_a_receive_that_does_not_fence_its_copies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def close(self: LoadWindow) -> None:
        self.open = False

    monkeypatch.setattr(LoadWindow, "close", close)
    found = broken(HAND_OFF, delays=0, faults=1)
    assert "used again" in found or "left at the decode node" in found


def test_an_intake_that_is_not_fenced_at_its_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    end = Intake._end

    def finish(self: Intake, reason: str, detail: str) -> None:
        if self.over is None:
            end(self, reason, detail)  # and the window stays

    monkeypatch.setattr(Intake, "finish", finish)
    found = broken(HAND_OFF, delays=0, faults=1)
    assert "left at the decode node" in found or "is wrong" in found


def test_offered_checksums_that_are_not_compared_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def arrived(self: Intake, arrival: Arrival) -> bool:
        self._landed.put((arrival.tag, True))
        return True

    def hashed(self: Intake, tags: Sequence[int], _digests: Sequence[int]) -> Sequence[bool]:
        for tag in tags:
            self._landed.put((tag, True))
        return [True] * len(tags)

    monkeypatch.setattr(Intake, "_arrived", arrived)
    monkeypatch.setattr(Intake, "_hashed", hashed)
    assert "is wrong" in broken(HAND_OFF, delays=0, faults=1)


def test_a_hand_off_that_ends_while_its_memory_is_still_read_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def careless(self: HandOff) -> None:
        """Waits for no acknowledgement."""

    monkeypatch.setattr(HandOff, "_acknowledged", careless)
    assert "has changed under it" in broken(HAND_OFF, delays=1, faults=1, runs=1500, seed=1)


def test_chunks_of_a_request_that_are_never_let_go_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Holdings, "release", lambda self, request: None)
    assert "left at the decode node" in broken(HAND_OFF, delays=0, faults=1)
