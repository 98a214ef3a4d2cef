"""The picture of a memory profile: what it leaves out it tells, and many steps are no comb. And its repr."""

from __future__ import annotations

from pathlib import Path

import pytest

from optim8.memory.profiling.profiles import Profile, Record

MIB = 2**20


def profiled(steps: int, source: str = "rss", between: int = 0, growth: int = 1) -> Profile:
    """As a process of 500 MiB has it that trains 10 MiB; activations grow by `growth` MiB a step."""
    found = Profile(source, "resident set of the process", "Linear", "AdamW8bit")
    for step in range(steps):
        for phase, gradients, activations in (("forward", 0, 3 + growth * step), ("backward", 10, 0), ("step", 10, 0)):
            kinds = {"parameters": 10, "gradients": gradients, "state (host)": 5, "activations": activations}
            kinds = {kind: count * MIB for kind, count in {**kinds, "other": 500}.items()}
            end = sum(kinds.values())
            found.records.append(Record(step, phase, end + MIB, end, kinds))
        end = (515 + between) * MIB
        kinds = {"parameters": 10 * MIB, "state (host)": 5 * MIB, "other": (500 + between) * MIB}
        found.records.append(Record(step, "between", end, end, kinds))
    return found


@pytest.mark.parametrize("steps", [3, 100])
def test_a_process_does_not_hide_the_training(steps: int) -> None:
    pytest.importorskip("matplotlib")
    from optim8.memory.profiling.drawing import draw

    prof = profiled(steps)
    figure = draw(prof, prof.records)
    peak = max(10 + 10 + 5, 10 + 5 + 3 + steps - 1) + 1  # of backward or of forward, without the 500 MiB
    top = figure.axes[0].get_ylim()[1]
    assert peak < top < 1.3 * peak
    told = [text.get_text() for text in figure.texts] + [figure.get_supxlabel()]
    assert any("without the 500.00 MiB of other things" in text for text in told)
    allocations = profiled(steps, source="allocations")
    whole = draw(allocations, allocations.records)
    assert whole.axes[0].get_ylim()[1] > 500
    assert "without" not in whole.get_supxlabel()


def test_few_steps_are_bars_and_many_are_areas_by_phase() -> None:
    pytest.importorskip("matplotlib")
    from optim8.memory.profiling.drawing import draw

    few, many = profiled(8), profiled(100)
    (bars,) = draw(few, few.records).axes
    assert len(bars.get_lines()[0].get_xdata()) == 8 * 3  # what lies between phases is not drawn
    panels = draw(many, many.records).axes
    assert [panel.get_title() for panel in panels] == ["forward", "backward", "step"]
    expected = ([19.0 + step for step in range(100)], [26.0] * 100, [26.0] * 100)
    for panel, peaks in zip(panels, expected, strict=True):
        assert not panel.patches
        assert list(panel.get_lines()[0].get_xdata()) == list(range(100))
        assert list(panel.get_lines()[0].get_ydata()) == peaks


@pytest.mark.parametrize("steps", [3, 100])
def test_the_highest_phase_is_within_the_picture(steps: int) -> None:
    pytest.importorskip("matplotlib")
    from optim8.memory.profiling.drawing import draw

    prof = profiled(steps, growth=0)  # backward is higher than forward, which is drawn first
    figure = draw(prof, prof.records)
    assert [text.get_text() for text in figure.legends[0].get_texts()].count(
        "other, and freed\nmemory that is kept"
    ) == 0
    for panel in figure.axes:
        bottom, top = panel.get_ylim()
        assert bottom == 0
        assert 26 < top < 1.3 * 26


def test_what_is_higher_between_phases_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    from optim8.memory.profiling.drawing import draw

    many = profiled(100, between=300)
    assert [panel.get_title() for panel in draw(many, many.records).axes][-1] == "between"
    few = profiled(2, between=300)
    (bars,) = draw(few, few.records).axes
    assert sum("between" in label.get_text() for label in bars.get_xticklabels()) == 2


def test_pictures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    profiled(100).plot(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_repr_tells_what_was_recorded() -> None:
    assert repr(Profile("rss", "", "Linear", "SGD")) == (
        "<optim8.memory.Profile of Linear with SGD: nothing recorded, source='rss'>"
    )
    assert "Linear with AdamW8bit: 2 steps, peak 526.00 MiB" in repr(profiled(2))
    assert "1 step, peak" in repr(profiled(1))
