"""Two results beside each other: the four answers, what is said, what is refused; and the files that they come from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from zest_fast.benchmarking.comparison import MARGIN, answer_of, compare
from zest_fast.benchmarking.report import draw, markdown_of, table_of
from zest_fast.benchmarking.results import Case, Measured, Result
from zest_fast.benchmarking.timing import Median

OLD = Path(__file__).parents[1] / "data" / "bench_v1.json"


def interval(low: float, high: float) -> Median:
    return Median((low + high) / 2, low, high, 0.96875, 6)


def result(low: float = 1.0, high: float = 1.01, *, why: str = "", **changes) -> Result:
    """One case with ours and a peer; ours between low and high seconds, or not timed."""
    seconds = None if why else interval(low, high)
    ours = Measured("zest_fast", "ours", not why, 1e-9, 2e-5, why, seconds, seconds and interval(1, 1))
    peer = Measured("torch_lean", "peer", True, 1e-7, 2e-5, "", interval(2, 2.1), interval(2, 2.1), {"gb_per_s": 3.0})
    case = Case("moments 4096 float32, 1 thread", "zest_fast", (ours, peer), {"bytes": 16384})
    fields = {
        "command": "kernels",
        "date": "2026-12-01",
        "machine": {"cpu": "A", "cores": 2, "threads": 1, "load_average": 0.1},
        "versions": {"torch": "2.13.0", "zest_fast": "0.1.0"},
        "settings": {"rounds": 6, "warm": False},
        "cases": (case,),
    }
    return Result(**{**fields, **changes})


@pytest.mark.parametrize(
    ("a", "b", "answer"),
    [
        ((1.0, 1.1), (0.5, 0.6), "faster"),
        ((1.0, 1.1), (1.2, 1.3), "slower"),
        ((1.0, 1.01), (0.99, 1.02), "same"),
        ((1.0, 1.001), (1.02, 1.021), "same"),  # surely slower, and by less than anybody cares for
        ((1.0, 1.3), (1.1, 1.2), "ambiguous"),
        ((1.0, 1.1), (1.1, 1.2), "ambiguous"),  # they touch
        ((1.0, 1.0), (1.0, 1.0), "same"),
        ((1.0, 1.0), (1 + 2 * MARGIN, 1 + 2 * MARGIN), "slower"),
    ],
)
def test_the_answer_follows_from_the_intervals(a, b, answer):
    assert answer_of(interval(*a), interval(*b)) == answer
    other_way = {"faster": "slower", "slower": "faster"}.get(answer, answer)
    assert answer_of(interval(*b), interval(*a)) == other_way


def test_too_few_rounds_tell_nothing():
    once = Median(1.0, 1.0, 1.0, 0.0, 1)
    assert answer_of(once, interval(2.0, 2.1)) == answer_of(interval(2.0, 2.1), once) == "ambiguous"


def test_only_what_is_judged_makes_it_worse():
    same = compare(result(), result())
    assert [line.answer for line in same.lines] == ["same", "same"] and not same.is_worse and same.notes == ()
    assert compare(result(), result(1.5, 1.6)).is_worse and not compare(result(), result(0.5, 0.6)).is_worse
    slower_peer = result()
    case = slower_peer.cases[0]
    slow = dataclasses.replace(case.measured[1], seconds=interval(9, 9.1))
    slower_peer = dataclasses.replace(
        slower_peer, cases=(dataclasses.replace(case, measured=(case.measured[0], slow)),)
    )
    found = compare(result(), slower_peer)
    assert [line.answer for line in found.lines] == ["same", "slower"] and not found.is_worse


def test_what_is_wrong_now_and_was_not_is_broken():
    found = compare(result(), result(why="wrong: std is off by 1"))
    assert found.is_worse and (found.lines[0].answer, found.lines[0].why) == ("broken", "wrong: std is off by 1")
    for a, b in ((result(why="wrong"), result()), (result(why="wrong"), result(why="wrong"))):
        assert compare(a, b).lines[0].answer == "not timed" and not compare(a, b).is_worse


def test_other_machines_versions_and_settings_are_said():
    other = result(
        machine={"cpu": "B", "cores": 2, "threads": 4, "load_average": 9.0},
        versions={"torch": "2.14.0", "zest_fast": "0.1.0"},
        settings={"rounds": 11, "warm": False},
    )
    machine, versions, settings = compare(result(), other).notes
    assert machine.startswith("ANOTHER MACHINE: cpu: A, now B;") and "load" not in machine
    assert versions == "other versions: torch: 2.13.0, now 2.14.0" and settings == "other settings: rounds: 6, now 11"


def test_candidates_of_one_file_only_and_warnings_are_said():
    a = result()
    case = dataclasses.replace(a.cases[0], measured=a.cases[0].measured[:1], warnings=("above the roofline",))
    found = compare(a, dataclasses.replace(a, cases=(case,)))
    assert [line.name for line in found.lines] == ["zest_fast"]
    assert any("in one of the files only" in note and "torch_lean" in note for note in found.notes)
    assert any("the second file has 1 warnings: above the roofline" in note for note in found.notes)


def test_what_does_not_match_is_refused():
    with pytest.raises(ValueError, match="is of `bench kernels`, the second of `bench step`"):
        compare(result(), result(command="step"))
    other = dataclasses.replace(result().cases[0], name="moments 4096 float32, 2 threads")
    with pytest.raises(ValueError, match="the second file lacks moments 4096 float32, 1 thread; measure"):
        compare(result(), result(cases=(other,)))
    both = result(cases=(result().cases[0], other))
    with pytest.raises(ValueError, match=r"the cases do not match: the first file lacks .*2 threads"):
        compare(result(), both)


def test_a_file_holds_what_was_saved(tmp_path):
    result(why="wrong").save(tmp_path / "a.json")
    assert Result.load(tmp_path / "a.json") == result(why="wrong")
    result().save(tmp_path / "a.json")
    assert Result.load(tmp_path / "a.json") == result()


def test_a_file_of_the_first_format_is_read():
    found = Result.load(OLD)
    assert found.command == "kernels" and found.cases[0].measured[0].name == "zest_fast"
    assert compare(found, found).is_worse is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "it is of format 2, and 1 is the newest known here"),
        ({"format": "profile"}, "format: 'profile' is unknown"),
        ({"command": "sing"}, "command: 'sing' is unknown"),
        ({"cases": []}, "cases: expected 1 to"),
        ({"machine": None}, "machine: expected keys and values"),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_a_damaged_file_is_refused_by_the_key(change, message, tmp_path):
    path = tmp_path / "a.json"
    result().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"is no result of `zest-fast bench`: {message}"):
        Result.load(path)


def test_a_torn_file_and_impossible_seconds_are_refused(tmp_path):
    path = tmp_path / "a.json"
    result().save(path)
    text = path.read_text()
    path.write_text(text[:-20])
    with pytest.raises(ValueError, match="torn JSON"):
        Result.load(path)
    path.write_text(text.replace('"low": 1.0,', '"low": 0.0,'))
    with pytest.raises(ValueError, match=r"seconds.low"):
        Result.load(path)
    path.write_text(text.replace('"low": 1.0,', '"low": 5.0,'))
    with pytest.raises(
        ValueError, match=r"a\.json is no result .*: seconds of 'zest_fast': 1\.005 is not from 5\.0 to"
    ):
        Result.load(path)


def test_markdown_says_where_it_was_measured_and_who_is_not_timed():
    found = result(why="raises KeyError: a | b <b>")
    text = markdown_of(found)
    assert "A; 2 cores" in text and "torch 2.13.0" in text and "2026-12-01" in text
    assert "| zest_fast | NO | not timed |" in text and "raises KeyError: a \\| b &lt;b>" in text
    head, rows = table_of("kernels", found.cases[0])
    assert "GB/s" in head and "GFLOP/s" not in head and all(len(row) == len(head) for row in rows)


def test_a_picture_is_drawn_of_what_was_timed(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw(result(), tmp_path / "a.svg").read_text().count("torch_lean") >= 1
    draw(result(why="wrong"), tmp_path / "b.png")
    with pytest.raises(ValueError, match="no suffix"):
        draw(result(), tmp_path / "none")
