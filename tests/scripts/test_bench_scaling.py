"""The computed throughput of a layout is that of the simulation, and of its slowest station."""

import pytest

from scripts.bench.scaling import ENGINES, Layout, Simulation, Times, flow, table
from scripts.bench.service_times import line

TIMES = Times((0.5, 0.02), 0.005, (0.01, 0.001))


@pytest.mark.parametrize("layout", [(4, 1, 4), (4, 1, 1), (16, 4, 2), (24, 1, 24)])
def test_computed_and_simulated_agree(layout):
    layout = Layout(*layout, rows=16)
    simulated = Simulation(TIMES, layout).run(6 * layout.trajectories)
    assert flow(TIMES, layout).rate == pytest.approx(simulated, rel=0.05)


def test_a_station_that_is_full_bounds_all():
    many = Layout(1000, 1000, 1)
    assert flow(TIMES, many).rate == pytest.approx(1 / (0.005 * 3.5), rel=1e-3)
    assert flow(TIMES, many).busiest == "client"
    few = Layout(1000, 2, 1000)
    assert flow(TIMES, few).rate == pytest.approx(2 * 128 / (0.01 + 128 * 0.001) / 2.5, rel=1e-3)
    assert flow(TIMES, few).busiest == "retriever"


def test_one_trajectory_takes_the_sum_of_its_services():
    alone = Layout(1, 1, 1, rows=1)
    taken = 3.5 * (0.52 + 0.005) + 2.5 * (0.011 + 0.001)
    assert 1 / flow(TIMES, alone).rate == pytest.approx(taken, rel=0.02)


def test_the_table_has_a_line_for_each_number_of_engines():
    lines = table(TIMES, lambda engines: engines, 64, 2.5)
    assert [row.split(" | ")[0] for row in lines[2:]] == [f"| {engines:,}" for engines in ENGINES]
    assert "(100%, engine" in lines[2]


def test_a_line_through_times_never_starts_below_nothing():
    assert line([1, 2, 3], [5, 7, 9]) == (pytest.approx(3), pytest.approx(2))
    assert line([1, 2, 3], [1, 3, 5])[0] == 0.0
