"""Bars, tables and log lines in terminals of any width, and where there is none."""

import contextlib
import io
import logging
import os
import re
import sys
import time

import pytest

from scripts import console, train
from scripts.console import Bar, StepLines, bar, clock, show_table, track, visible
from tests.terminal import Terminal


def figures(there, total, seconds, **options):
    """Return what a bar says after so many seconds."""
    shown = Bar("x", total, **options)
    shown.done = there
    return shown.figures(shown.began + seconds)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (figures(0, 100, 0.0), ["0/100", "0:00"]),  # no rate yet
        (figures(37, 100, 10.0), ["37/100", "ETA 0:17", "3.7/s"]),
        (figures(2, 100, 600.0), ["2/100", "ETA 8:10:00", "300.0 s each"]),
        (figures(100, 100, 10.0), ["100/100", "0:10", "10.0/s"]),
        (figures(5, None, 1.0), ["5", "0:01", "5.0/s"]),
        (figures(0, 0, 1.0), ["0/0", "0:01"]),
        (figures(60, 100, 10.0, done=50), ["60/100", "ETA 0:40", "1.0/s"]),  # 50 were there already
        (figures(3_000_000, 6_000_000, 3.0, unit="bytes"), ["3.0 MB/6.0 MB", "ETA 0:03", "1.0 MB/s"]),
    ],
)
def test_a_bar_says_count_time_left_and_rate_as_far_as_they_are_known(said, expected):
    assert said == expected


def test_a_bar_whose_beginning_is_told_by_its_first_move_has_its_rate_from_there():
    shown = Bar("training", 10, done=None)
    shown.move(4)
    assert shown.figures(shown.began + 9)[1:] == ["0:09"]
    shown.move(7)
    assert shown.figures(shown.began + 3) == ["7/10", "ETA 0:03", "1.0/s"]


@pytest.mark.parametrize(
    "seconds", [(17.2, "0:17"), (59.6, "1:00"), (3700, "1:01:40"), (100_000, "27:46:40"), (1e6, "11d 13h")]
)
def test_a_clock(seconds):
    assert clock(seconds[0]) == seconds[1]


@pytest.mark.parametrize("columns", [1, 2, 5, 20, 40, 60, 80, 200])
@pytest.mark.parametrize("total", [0, 3, None, 12_345_678])
def test_a_bar_fits_into_a_terminal_of_any_width(columns, total):
    terminal = Terminal(columns)
    with (
        terminal.attached(),
        bar("reading a long row of words, \N{CJK UNIFIED IDEOGRAPH-6F22}", total) as move,
    ):
        move(3)
    if columns > 1:
        assert len(terminal.lines) == 2 and terminal.lines[1] == ""  # one line, not wrapped
    assert "Error" not in terminal.raw


@pytest.mark.parametrize(
    ("columns", "last"),
    [
        (200, "step 1,345/9,000  reward -0.500  EM 0.412  searches 1.3  1234.5 s  ETA 109d "),
        (80, "step 1,345/9,000  reward -0.500  EM 0.412  searches 1.3  1234.5 s  ETA 109d "),
        (60, "step 1,345/9,000  reward -0.500  EM 0.412"),
        (20, "step 1,345/9,000"),
    ],
)
def test_the_line_of_a_step_is_never_wrapped(columns, last):
    metrics = {"reward/mean": -0.5, "rollout/em": 0.412, "rollout/searches": 1.3, "time/step_seconds": 1234.5}
    terminal = Terminal(columns)
    with terminal.attached():
        StepLines(train._SHOWN, 9_000)(1_345, {**metrics, "policy/entropy": 1.0})
    assert len(terminal.lines) == 2 and terminal.lines[0].startswith(last)


def test_a_step_without_the_wanted_metrics_shows_all_that_it_has(capsys):
    StepLines({"a": "{:.1f} a"})(3, {"speed/seconds": 12.0, "other": float("nan")})
    assert capsys.readouterr().err == "step 3  speed/seconds 12  other nan\n"


def test_items_are_passed_on_and_counted_and_ranges_count_what_they_stand_for():
    terminal = Terminal(80)
    steps = track("steps")
    with terminal.attached():
        assert not steps.used
        assert list(steps(range(20, 50, 8))) == [20, 28, 36, 44]
        assert list(track("known")(iter("abc"), 3)) == list("abc")
        assert list(track("unknown")(iter("abc"))) == list("abc")
        assert list(track("none")([])) == []
    assert steps.used
    counts = [line.replace("━", "").split()[:2] for line in terminal.lines[:-1]]
    assert counts == [["steps", "50/50"], ["known", "3/3"], ["unknown", "3"], ["none", "0/0"]]


def test_bars_lie_below_each_other_and_what_is_said_meanwhile_stands_above_them():
    terminal = Terminal(80)
    with terminal.attached():
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
        own = logging.getLogger("a.library.with.a.handler.of.its.own")
        own.propagate = False
        own.addHandler(logging.StreamHandler(sys.stderr))
        with bar("outer", 2) as outer:
            for step in (1, 2):
                for number in track("inner")(range(5)):
                    time.sleep(0.1)  # long enough for the bars to be drawn
                    logging.info("log %d.%d", step, number)
                own.warning("library %d", step)
                print("printed", step)
                print("to stderr", step, file=sys.stderr)
                outer(step)
        logging.info("afterwards")
        own.handlers.clear()
    said = [line for step in (1, 2) for line in [f"log {step}.{i}" for i in range(5)]
            + [f"library {step}", f"printed {step}", f"to stderr {step}"]]  # fmt: skip
    *lines, last, after, end = terminal.lines
    assert (lines, after, end) == (said, "afterwards", "")
    assert last.startswith("outer  ━") and "2/2" in last
    assert "inner" in terminal.raw


def test_what_is_printed_into_a_file_under_a_bar_gets_there(capsys):
    terminal, file = Terminal(80), io.StringIO()
    with terminal.attached():
        out, sys.stdout = sys.stdout, file
        with bar("working", 1):
            print("a result")
        sys.stdout = out
    assert file.getvalue() == "a result\n" and "a result" not in terminal.raw


def test_a_window_made_narrow_under_a_bar_is_heeded():
    terminal = Terminal(100)
    with terminal.attached(), bar("reading", 10) as move:
        terminal.resize(30)
        move(2)
    frames = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", terminal.raw).replace("\r", "\n").split("\n")
    drawn = [frame for frame in frames if "2/10" in frame]
    assert drawn and max(map(len, drawn)) < 30


def test_no_colour_where_none_is_wanted(monkeypatch):
    terminal = Terminal(80)
    with terminal.attached():
        monkeypatch.setenv("NO_COLOR", "1")
        with bar("reading", 10) as move:
            move(5)
        show_table("scores", ("name", "n"), [("a", 1)])
    assert "5/10" in terminal.raw
    assert not any(f"\x1b[{code}" in terminal.raw for code in ("3", "9", "38"))


@pytest.mark.parametrize("term", ["dumb", "unknown", ""])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(term, monkeypatch):
    monkeypatch.setattr(console, "_LOG_SECONDS", 0.0)
    terminal = Terminal(80, term)
    with terminal.attached():
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
        with bar("reading", 10) as move:
            move(5)
    assert "\x1b" not in terminal.raw and terminal.raw.startswith("reading: 5/10  ETA 0:0")


@pytest.mark.parametrize("wanted", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}])
def test_what_is_no_terminal_gets_a_line_a_minute(wanted, monkeypatch, capsys, caplog):
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    now = [0.0]
    monkeypatch.setattr(console, "_last_line", [0.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    with bar("encoding", 1000) as move:
        for done in range(1, 131):
            now[0] = float(done)
            move(done)
    assert capsys.readouterr().err == ""
    assert [record.getMessage() for record in caplog.records] == [
        "encoding: 60/1,000  ETA 15:40  1.0/s",
        "encoding: 120/1,000  ETA 14:40  1.0/s",
    ]


def test_the_message_of_an_error_under_a_bar_is_the_last_line(tmp_path):
    (tmp_path / "a.txt").write_text("A text. " * 9)
    (tmp_path / "b.pdf").write_text("no pdf")
    terminal = Terminal(80)
    assert terminal.run("corpus", tmp_path, "--out", tmp_path / "c.jsonl") == 2
    *_, said, end = "".join(terminal.lines).split("sleuth: ")[-1], terminal.lines[-1]
    assert "b.pdf" in said and end == "" and not console._bars


def test_a_table_keeps_every_figure_at_any_width_and_reads_nothing_as_markup():
    rows = [("[/red] a", "0.617 [0.530, 0.687]", 0.25), ("\x1b[31mb", "1.000 [1.000, 1.000]", 1)]
    for columns in (10, 20, 40, 60, 200):
        terminal = Terminal(columns)
        with terminal.attached():
            show_table("[bold] of {policy}", ("kind", "EM [95 %]", "F1"), rows)
        seen = "".join(terminal.lines).replace(" ", "")
        for cell in ("[bold] of {policy}", "\N{REPLACEMENT CHARACTER}[31mb", *rows[0], *rows[1][1:]):
            assert str(cell).replace(" ", "") in seen


def test_a_table_into_a_file_is_as_wide_as_it_needs(capsys):
    show_table("", [f"column {i}" for i in range(30)], [range(30)])
    (head, _, row) = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert head.count("column") == 30 and row.split() == [str(i) for i in range(30)]


def test_a_pipe_that_is_closed_early_is_one_line_and_no_end_of_the_process(monkeypatch, capfd):
    from scripts.__main__ import guarded

    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    with open(writing, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert guarded(lambda _: show_table("numbers", ["a"], [["1"]]) or 0, []) == 2
        monkeypatch.undo()
        assert capfd.readouterr().err == "sleuth: whoever read our output has stopped reading\n"
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def test_text_stands_to_the_left_and_figures_to_the_right(capsys):
    show_table("", ("run", "question", "EM"), [("a", "Who?", "0.5"), ("b", "Who was it in 1999?", "+0.250")])
    head, _, first, second = (line for line in capsys.readouterr().out.splitlines() if line.strip())
    assert head.index("question") == first.index("Who?") == second.index("Who was")
    assert len(head.rstrip()) == len(first.rstrip()) == len(second.rstrip())


def test_what_steers_a_terminal_is_not_passed_on():
    assert visible("a\x1b]0;title\x07b\nc\td") == "a\ufffd]0;title\ufffdb\nc\td"


def test_work_goes_on_when_its_terminal_goes_away(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Gone())
    console.say("a line")
    assert list(track("reading")(range(3))) == [0, 1, 2]
    with bar("training", 2) as move:
        console.say("step 1/2")
        move(1)
