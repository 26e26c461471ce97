"""Promises of latency targets and tables: what a table says of any widths is what such a machine would take."""

import json

import pytest
import torch

import upop
from upop import timing
from upop.errors import TargetError, UpopError
from upop.families import find_structures
from upop.latency import LatencyTable, latency_cost
from upop.models import load_model
from upop.profiling import Times
from upop.ranking import select
from upop.targets import Target, find_cost

KINDS = ("attn", "mlp")


def synthetic_ms(model, joint=1.0):
    """A machine whose time has a fixed part, one per block, and one that bends with each width."""
    ms = 2.0
    for s in find_structures(model):
        ms += {"attn": 0.4, "qk": 0.3, "v": 0.1}.get(s.kind, 0) + joint * {
            "attn": 0.1 * s.width**0.8,
            "qk": 0.06 * s.width**0.8,
            "v": 0.05 * s.width**0.9,
            "mlp": 0.03 * s.width**0.9,
        }.get(s.kind, 0)
    return ms


@pytest.fixture
def machine(monkeypatch):
    """A stand-in for the clock: passes take what `synthetic_ms` says, times how slow the machine is in that turn."""
    monkeypatch.setattr(timing, "make_runner", lambda model, images, **options: model)

    def timed(passes, **options):
        slowness = (1.0, 3.0, 1.1, 1.0, 7.0)
        return {name: Times(tuple(x * synthetic_ms(model) for x in slowness)) for name, model in passes.items()}

    monkeypatch.setattr(timing, "time_in_turns", timed)


def table_of(model, **options):
    return timing.measure_latency_table(model, image_size=32, **options)


@pytest.mark.parametrize(("width", "align"), [(60, {}), (84, {"mlp": 64}), (60, {"attn": 8})], ids=str)
def test_while_one_kind_is_narrowed_the_other_is_whole_though_its_width_may_be_no_multiple(
    make_model, machine, monkeypatch, width, align
):
    model = make_model(width=width, heads=3)  # 20 head dims, or 336 hidden neurons
    whole = {s.name: s.units for s in find_structures(model)}
    narrow, seen = timing.slim, []

    def watched(model, keep):
        seen.append({name.partition(".")[0] for name, kept in keep.items() if int(kept.sum()) < whole[name]})
        return narrow(model, keep)

    monkeypatch.setattr(timing, "slim", watched)
    table_of(model, align=align)
    assert seen.count({"attn"}) > 1
    assert seen.count({"mlp"}) > 1


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_is_timed_on_images_of_the_channels_that_it_takes(make_model, channels):
    assert table_of(make_model(num_channels=channels, width=16), seconds=0.01).dense_ms > 0


@pytest.mark.parametrize("kinds", [("attn", "mlp"), ("dims", "mlp"), ("qk", "v", "mlp")])
def test_the_table_tells_the_time_of_any_widths(make_model, random_lanes, machine, kinds):
    model = make_model(layers=4, heads=2, width=128)
    structures = find_structures(model, kinds)
    cost = latency_cost(structures, table_of(model, structures=kinds))
    for seed in range(5):
        keep = random_lanes(structures, seed=seed)
        told = (cost.dense - cost.removed(keep)) / cost.dense
        assert told == pytest.approx(synthetic_ms(upop.slim(model, keep)) / synthetic_ms(model), rel=0.02)


def test_blocks_are_told_as_well(make_model, random_lanes, machine):
    kinds = ("attn", "mlp", "block")
    model = make_model(layers=6, heads=2, width=128)
    structures = find_structures(model, kinds)
    cost = latency_cost(structures, table_of(model, structures=kinds))
    keep = random_lanes(structures)
    told = (cost.dense - cost.removed(keep)) / cost.dense
    assert told == pytest.approx(synthetic_ms(upop.slim(model, keep)) / synthetic_ms(model), rel=0.03)


@pytest.mark.parametrize("target", [{"latency": 0.5}, {"latency": 0.3}, {"latency": "16ms"}])
@pytest.mark.parametrize("align", [{}, {"attn": 8, "mlp": 32}])
def test_a_search_ends_within_five_percent_of_the_time_asked_for(make_model, images, machine, target, align):
    model = make_model(layers=4, heads=2, width=128)
    table = table_of(model, align=align)
    search = upop.Search(model, target=Target(**target), steps=3, latency=table, align=align)
    for _ in range(3):
        (model(pixel_values=images(2)).logits.square().mean() + search.penalty()).backward()
        search.step()
    asked = search.target.left or (1 - search.target.fraction) * table.dense_ms
    took = synthetic_ms(search.slim()) * table.dense_ms / synthetic_ms(model)
    assert took == pytest.approx(asked, rel=0.05)


def test_kinds_that_save_less_together_are_told_so(make_model, machine, monkeypatch):
    model = make_model(layers=4, heads=2, width=128)
    structures = find_structures(model, KINDS)

    def timed(passes, **options):
        dense = synthetic_ms(passes["dense"])
        saved = {name: dense - synthetic_ms(m) for name, m in passes.items()}
        both = {name: len({s.width for s in find_structures(m)} & {64, 512}) == 0 for name, m in passes.items()}
        return {n: Times((dense - saved[n] * (0.8 if both[n] else 1.0),) * 2) for n in passes}

    monkeypatch.setattr(timing, "time_in_turns", timed)
    assert table_of(model).scale == pytest.approx(0.8, abs=0.03)
    assert len(structures) == 8


def test_a_table_survives_json(make_model, machine):
    table = table_of(make_model(), batch=8)
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert str(table).startswith("batch 8, eager, float32, cpu")


def test_noise_makes_no_layer_cost_less_than_nothing(make_model):
    model = make_model()
    structures = find_structures(model, KINDS)
    points = {"attn": ((0.25, 12.0), (0.5, 7.0)), "mlp": ((0.25, 9.0), (0.5, 11.0))}
    table = LatencyTable(10.0, points, {s.name: s.width for s in structures}, scale=9.0)
    cost = latency_cost(structures, table)
    assert all(price >= 0 for price in cost.prices.values())
    nothing = cost.of(torch.zeros(len(structures)))
    assert 0 < float(nothing) <= 10.0


def test_a_latency_target_without_a_table_is_refused_with_what_to_do(make_model):
    with pytest.raises(TargetError, match=r"expected a latency table .* upop\.measure_latency_table\(model"):
        upop.Search(make_model(), target=Target(latency=0.5), steps=3)


def test_a_table_of_another_model_is_refused(make_model, machine):
    table = table_of(make_model(layers=1))
    model = make_model(layers=2)
    with pytest.raises(
        TargetError, match=r"latency table: expected one of this model, with attn\.1 of width 32, got none"
    ):
        find_cost(model, find_structures(model), "latency", table)
    with pytest.raises(TargetError, match=r"with dims\.0"):
        find_cost(make_model(layers=1), find_structures(make_model(layers=1), ("dims",)), "latency", table)


def test_an_unreachable_latency_is_refused_with_the_range(make_model, machine):
    model = make_model()
    table = table_of(model)
    with pytest.raises(
        TargetError, match=r"latency=0\.99: cannot be met; reachable here is latency=0 to latency=0\.[0-9]+ \("
    ):
        upop.Search(model, target=Target(latency=0.99), steps=3, latency=table)


def test_steps_too_coarse_for_a_latency_are_refused_with_how_close_it_had_to_be(make_model, machine):
    model = make_model()
    options = {"latency": table_of(model), "align": {"attn": 16, "mlp": 64}}
    with pytest.raises(TargetError, match=r"latency=0\.5: cannot be met within 1\.5%: a step of 16 units of attn"):
        upop.Search(model, target=Target(latency=0.5), steps=3, **options)


def test_methods_with_one_ratio_for_all_kinds_refuse_a_latency(make_model, machine):
    model = make_model()
    with pytest.raises(TargetError, match=r"method progressive: .* use a unified method"):
        upop.Search(model, target=Target(latency=0.3), steps=3, method="progressive", latency=table_of(model))


def test_no_batch_is_refused(make_model):
    with pytest.raises(UpopError, match=r"expected a batch of 1 image or more, got 0"):
        table_of(make_model(), batch=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_table_is_measured_at_rising_fractions(make_model, dtype):
    model = make_model(layers=2, heads=2, width=64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = table_of(model, dtype=dtype, seconds=0.1)
    assert table.dense_ms > 0
    for points in table.points.values():
        assert [f for f, _ in points] == sorted({f for f, _ in points})
        assert all(ms > 0 for _, ms in points)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("align", [{}, {"mlp": 40}, {"mlp": 128}])
def test_fractions_that_come_to_the_same_width_are_one_point(make_model, align, machine):
    model = make_model(layers=2, heads=3, width=48)
    structures = find_structures(model, ("head", "mlp"))
    table = table_of(model, structures=("head", "mlp"), align=align)
    for kind, points in table.points.items():
        kept = [fraction for fraction, _ in points]
        assert kept == sorted(set(kept)), kind
        assert all(0 < fraction < 1 for fraction in kept)
    assert LatencyTable.from_dict(table.to_dict()) == table
    cost = latency_cost(structures, table)
    nothing = {s.name: torch.zeros(s.units, dtype=torch.bool) for s in structures}
    assert 0 < cost.removed(nothing) < cost.dense
    assert cost.dense == pytest.approx(table.dense_ms)


@pytest.mark.parametrize(("jitter", "warned"), [(0.01, False), (0.3, True)])
def test_a_table_made_on_a_busy_machine_says_so(make_model, monkeypatch, caplog, jitter, warned):
    monkeypatch.setattr(timing, "make_runner", lambda model, images, **options: model)
    noise = torch.Generator().manual_seed(0)

    def timed(passes, **options):
        draws = {name: 1 + jitter * torch.randn(20, generator=noise).abs() for name in passes}
        return {
            name: Times(tuple(synthetic_ms(model) * x for x in draws[name].tolist())) for name, model in passes.items()
        }

    monkeypatch.setattr(timing, "time_in_turns", timed)
    table = table_of(make_model())
    assert (table.noise > timing.MOST_NOISE) == warned
    assert ("the machine is busy" in caplog.text) == warned


def test_the_standard_error_is_that_of_medians_of_many_draws():
    draws = 5 + 0.5 * torch.randn(2000, 21, generator=torch.Generator().manual_seed(0))
    medians = draws.median(dim=1).values
    told = sum(timing.standard_error(row.tolist()) for row in draws) / len(draws)
    assert told == pytest.approx(float(medians.std()), rel=0.1)


def test_a_state_of_a_search_with_another_table_is_refused(make_model, machine):
    model = make_model()
    table = table_of(model)
    other = LatencyTable.from_dict({**table.to_dict(), "scale": 0.5 * table.scale})
    state = upop.Search(model, target=Target(latency=0.2), steps=3, latency=table).state_dict()
    again = LatencyTable.from_dict(json.loads(json.dumps(table.to_dict())))
    upop.Search(make_model(), target=Target(latency=0.2), steps=3, latency=again).load_state_dict(state)
    search = upop.Search(make_model(), target=Target(latency=0.2), steps=3, latency=other)
    with pytest.raises(UpopError, match="saved with latency="):
        search.load_state_dict(state)


def test_where_nothing_saves_time_no_target_but_zero_is_reachable(make_model):
    model = make_model()
    widths = {s.name: s.width for s in find_structures(model)}
    table = LatencyTable(10.0, {"attn": (), "mlp": ()}, widths)
    assert upop.Search(model, target=Target(latency=0.0), steps=2, latency=table).target_ratio == 0.0
    with pytest.raises(TargetError, match=r"latency=0.5: cannot be met; reachable here is latency=0 to latency=0.0"):
        upop.Search(make_model(), target=Target(latency=0.5), steps=2, latency=table)


@pytest.mark.parametrize("fraction", [0.2, 0.3, 0.4, 0.5])
def test_a_target_is_met_where_the_first_steps_save_nothing_and_a_later_one_much(fraction):
    # As on a GPU with wide tiles: half of the head dims go for nothing, the next ones take a third of the time.
    structures = find_structures(load_model("deit-digits").model, KINDS)
    points = {"attn": ((0.25, 7.0), (0.5, 9.9), (0.75, 9.95)), "mlp": ((0.25, 6.7), (0.5, 7.8), (0.75, 8.9))}
    cost = latency_cost(structures, LatencyTable(10.0, points, {s.name: s.width for s in structures}))
    target, align = Target(latency=fraction), {"attn": 8}
    budget = target.budget(cost, align)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = {s.name: torch.rand(s.units, generator=generator) for s in structures}
        keep = select(structures, scores, budget, cost=cost, align=align, slack=target.slack(cost, budget))
        assert -1e-3 <= cost.removed(keep) - budget <= 0.03 * (cost.dense - budget)
