"""Promises of upop.kinds and upop.costs: every kind is exact when slimmed, costs what it says, and survives saving."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import upop
from upop.costs import macs_cost, params_cost
from upop.errors import ModelError, UpopError
from upop.families import find_structures
from upop.masks import Masks
from upop.methods import KINDS, parse_kinds
from upop.profiling import count_macs, count_params
from upop.ranking import group_price, removable, select

ATTENTIONS = (("attn",), ("dims",), ("qk", "v"), ())
CHOICES = [
    (*head, *attention, *mlp, *block)
    for head, attention, mlp, block in itertools.product((("head",), ()), ATTENTIONS, (("mlp",), ()), (("block",), ()))
    if head or attention or mlp or block
]


def masked_logits(model, structures, keep, x, logits_of):
    masks = Masks(model, structures)
    try:
        masks.set_({name: value.float() for name, value in keep.items()})
        return logits_of(model, x)
    finally:
        masks.detach()


@st.composite
def problems(draw):
    """A random model, kinds, alignment, share of the reachable budget, currency and seed."""
    heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([3, 4, 8, 12]))
    shape = {
        "width": heads * head_dim,
        "heads": heads,
        "layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(2, 40)),
        "qkv_bias": draw(st.booleans()),
    }
    kinds = draw(st.sampled_from(CHOICES))
    align = {kind: draw(st.sampled_from([1, 2, 4, 8])) for kind in kinds if kind not in ("head", "block")}
    name = draw(st.sampled_from(["vit", "deit", "teacher"]))
    return (
        name,
        shape,
        kinds,
        align,
        draw(st.floats(0, 1)),
        draw(st.sampled_from(["params", "macs"])),
        draw(st.integers(0, 99)),
    )


@given(problem=problems())
@settings(max_examples=45, deadline=None, database=None, derandomize=True)
def test_any_model_any_kinds_any_ratio_any_alignment(make_model, images, logits_of, problem):
    name, shape, kinds, align, share, currency, seed = problem
    model = make_model(name, seed=seed, image=16, patch=8, labels=3, **shape)
    structures = find_structures(model, kinds)
    size, work = params_cost(model, structures), macs_cost(model, structures)
    cost = size if currency == "params" else work
    generator = torch.Generator().manual_seed(seed)
    scores = {s.name: torch.randn(s.units, generator=generator) for s in structures}
    budget = share * removable(cost, align)
    keep = select(structures, scores, budget, cost=cost, align=align)
    small = upop.slim(model, keep)
    # The budget is met, by no more than what falls together.
    over = cost.removed(keep) - budget
    assert -1e-6 * cost.dense <= over <= max(group_price(s, cost, align) for s in structures) + 1e-6
    # Costs are what really disappears.
    assert count_params(model) - count_params(small) == round(size.removed(keep))
    assert count_macs(model) - count_macs(small) == pytest.approx(work.removed(keep), abs=1e-3)
    # Widths are aligned, the same in every lane, and floors stay.
    for s in structures:
        kept = keep[s.name].view(s.lanes, -1).sum(1)
        assert int(kept.min()) == int(kept.max()) >= s.floor
        assert int(kept[0]) % align.get(s.kind, 1) == 0 or int(kept[0]) == s.width
    assert "block" not in kinds or any(bool(keep[s.name].any()) for s in structures if s.drops)
    # Masked equals slimmed, and can be pruned again.
    x = images(2, size=16)
    expected = masked_logits(model, structures, keep, x, logits_of)
    torch.testing.assert_close(logits_of(small, x), expected, atol=1e-5, rtol=1e-4)
    again = find_structures(small)
    assert count_params(upop.slim(small, {s.name: torch.arange(s.units) < s.units for s in again})) == count_params(
        small
    )


# Classes take turns: of what is cut, they share all the code.
@pytest.mark.parametrize(
    ("kinds", "name"),
    [(kinds, ("vit", "deit", "teacher")[number % 3]) for number, kinds in enumerate(CHOICES)],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_every_kind_survives_saving(make_model, images, logits_of, random_lanes, tmp_path, kinds, name):
    model = make_model(name, layers=3, heads=4)
    structures = find_structures(model, kinds)
    small = upop.slim(model, random_lanes(structures))
    small.save_pretrained(tmp_path)
    loaded = upop.from_pretrained(tmp_path)
    x = images(2)
    assert torch.equal(logits_of(loaded, x), logits_of(small, x))
    assert count_params(loaded) == count_params(small)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_values_of_another_width_than_queries_are_exact_in_both_kernels(
    make_model, images, logits_of, random_lanes, attention
):
    model = make_model(attention=attention, heads=4)
    structures = find_structures(model, ("qk", "v", "head"))
    keep, x = random_lanes(structures), images(2)
    small = upop.slim(model, keep)
    qk, v = (next(s.width for s in find_structures(small) if s.kind == kind) for kind in ("qk", "v"))
    assert qk != v, "the test must not pass by equal widths"
    torch.testing.assert_close(
        logits_of(small, x), masked_logits(model, structures, keep, x, logits_of), atol=1e-5, rtol=0
    )


def test_a_split_attention_of_a_users_own_class_has_transformers_eager_kernel(make_model, images, logits_of):
    from transformers.models.vit.modeling_vit import ViTAttention

    model = make_model(attention="eager")
    for layer in model.vit.layers:
        layer.attention.__class__ = type("Mine", (ViTAttention,), {"__module__": __name__})
    structures = find_structures(model, ("qk", "v"))
    keep = {s.name: torch.arange(s.units) % s.width < (9 if s.kind == "v" else 5) for s in structures}
    expected = masked_logits(model, structures, keep, images(2), logits_of)
    torch.testing.assert_close(logits_of(upop.slim(model, keep), images(2)), expected, atol=1e-5, rtol=0)


def test_a_split_model_can_be_pickled_and_copied(make_model, images, logits_of, random_lanes):
    small = upop.slim(model := make_model(), random_lanes(find_structures(model, ("qk", "v"))))
    for again in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert type(again.vit.layers[0].attention) is type(small.vit.layers[0].attention)
        assert again.vit.layers[0].attention.q_proj is not small.vit.layers[0].attention.q_proj
        assert torch.equal(logits_of(again, images(2)), logits_of(small, images(2)))


def test_a_split_model_is_pruned_again_by_the_default_kinds(make_model, images, logits_of, random_lanes):
    small = upop.slim(model := make_model(heads=4), random_lanes(find_structures(model, ("qk", "v", "mlp"))))
    structures = find_structures(small, ("attn", "mlp"))
    assert {s.kind for s in structures} == {"qk", "v", "mlp"}
    keep, x = random_lanes(structures), images(2)
    again = upop.slim(small, keep)
    torch.testing.assert_close(
        logits_of(again, x), masked_logits(small, structures, keep, x, logits_of), atol=1e-5, rtol=0
    )


def test_a_search_over_all_kinds_ends_at_its_target_without_a_gap(make_model, images, logits_of):
    model = make_model(heads=4, layers=4)
    search = upop.Search(
        model,
        target=upop.Target(params=0.6),
        steps=6,
        structures=("head", "qk", "v", "mlp", "block"),
        align={"mlp": 8},
    )
    x = images(4)
    for _ in range(6):
        (model(pixel_values=x).logits.square().mean() + search.penalty()).backward()
        search.step()
    small = search.slim()
    removed = 1 - count_params(small) / count_params(model)
    assert 0.6 <= removed <= 0.61
    torch.testing.assert_close(logits_of(small, x), logits_of(model, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn,mpl", r"got 'mpl'; did you mean 'mlp'\?"),
        ("attn,dims", r"attn and dims own the same head dims"),
        ("attn,qk,v", r"own the same head dims"),
        ("qk,mlp", r"expected qk and v together"),
        ("", r"expected some of attn, dims"),
    ],
)
def test_kinds_that_do_not_go_together_are_refused(text, message):
    with pytest.raises(UpopError, match=message):
        parse_kinds(text)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("attn", "dims", "mlp"), r"^structures: attn and dims own the same head dims"),
        (("attn", "qk", "v", "mlp"), r"^structures: attn and qk and v own the same head dims"),
        (("v", "dims"), r"^structures: dims and v own the same head dims"),
        (("attn", "mpl"), r"got 'mpl'; did you mean 'mlp'\?"),
        ((), r"^structures: expected some of attn, dims"),
    ],
)
def test_kinds_that_own_the_same_rows_are_refused_before_anything_is_touched(make_model, kinds, message):
    model = make_model()
    with pytest.raises(UpopError, match=message):
        upop.Search(model, target=upop.Target(params=0.3), steps=3, structures=kinds)
    assert not any("forward" in vars(module) for module in model.modules())


def test_owners_of_other_layers_may_stand_side_by_side(make_model, random_lanes):
    model = make_model(heads=4)
    structures = find_structures(model, ("qk", "v", "mlp"))
    # One layer split, one whole: the kinds of the slimmed model are attn, qk and v.
    keep = {
        s.name: k if s.layer == 0 else torch.ones_like(k)
        for s, k in zip(structures, random_lanes(structures).values(), strict=True)
    }
    small = upop.slim(model, keep)
    assert {s.kind for s in find_structures(small)} == {"qk", "v", "attn", "mlp"}
    assert find_structures(small, ("attn", "qk", "v", "mlp")) == find_structures(small)


def test_kinds_are_read_as_typed():
    assert parse_kinds("mlp, attn,mlp") == ("mlp", "attn")
    assert all(parse_kinds(kind) for kind in KINDS if kind not in ("qk", "v"))


def test_a_kind_that_the_model_does_not_allow_is_refused_by_path(make_model):
    model = make_model()
    limited = [s if s.kind != "attn" else type(s)(**{**vars(s), "allows": ("dims",)}) for s in find_structures(model)]
    from upop.kinds import refine

    with pytest.raises(ModelError, match=r"kind 'head': vit\.layers\.0\.attention\.q_proj: .* only attn, dims"):
        refine(model, limited, ("head", "mlp"))


def test_heads_that_keep_different_numbers_of_dims_are_refused(make_model):
    model = make_model(heads=2)
    keep = {s.name: torch.ones(s.units, dtype=torch.bool) for s in find_structures(model, ("dims", "mlp"))}
    keep["dims.0"][0] = False
    with pytest.raises(
        UpopError, match=r"keep\['dims\.0'\]: expected as many units to stay in each of 2 heads, got \[31, 32\]"
    ):
        upop.slim(model, keep)
