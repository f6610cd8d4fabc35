"""Properties of the token arithmetic, and ToMe's matching against a plain reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ibtm import short_lines, tokens
from edge_ibtm.errors import UsageError
from edge_ibtm.mergers import Tokens, make_merger
from edge_ibtm.plan import GridPlan, dense_plan, sequence_plan
from edge_ibtm.site import Site

SIZES = st.tuples(st.integers(4, 24), st.integers(0, 3), st.integers(0, 2**31 - 1))


def published_tome(metric: torch.Tensor, remove: int, prefix: int) -> torch.Tensor:
    """Where each token goes (index of the token it ends up with), by the method's own words and a sort."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, : (prefix + 1) // 2] = -float("inf")
    scores[:, :, : prefix // 2] = -float("inf")
    best, partner = scores.max(-1)
    order = torch.argsort(best, dim=-1, descending=True, stable=True)[:, :remove]
    target = torch.arange(metric.shape[1]).expand(metric.shape[0], -1).clone()
    for image, evens in enumerate(order):
        for even in evens:
            target[image, 2 * even] = 2 * partner[image, even] + 1
    return target


@settings(max_examples=40, deadline=None)
@given(SIZES)
def test_match_merges_the_pairs_that_tome_merges(case: tuple[int, int, int]) -> None:
    length, prefix, seed = case
    metric = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(seed))
    most = (length + 1) // 2 - (prefix + 1) // 2 if length // 2 > prefix // 2 else 0
    keep = length - seed % (most + 1)
    assignment = tokens.match(metric, keep, prefix=prefix)
    assert assignment.shape == (2, keep, length)
    assert set(assignment.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(assignment.sum(1), torch.ones(2, length))
    assert torch.equal(assignment[:, :prefix, :prefix], torch.eye(prefix).expand(2, -1, -1))
    target = published_tome(metric, length - keep, prefix)
    slots = assignment.argmax(1)
    assert torch.equal(slots, slots.gather(1, target))
    assert slots.unique(dim=1).shape[0] == 2


def test_outputs_stand_as_their_places_or_as_tome_leaves_them() -> None:
    metric = torch.randn(3, 13, 8)
    scores = tokens.similarity(metric)
    ordered = tokens.bipartite(scores, 9, ordered=True).matrix()
    loose = tokens.bipartite(scores, 9).matrix()
    for image in range(3):
        groups = [sorted(r.nonzero()[:, 0].tolist()) for r in ordered[image]]
        assert sorted(map(str, groups)) == sorted(str(sorted(r.nonzero()[:, 0].tolist())) for r in loose[image])
        ends = [next((n for n in g if n % 2), g[0]) for g in groups]
        assert ends == sorted(ends)


def test_ties_go_to_the_lower_position_and_repeat() -> None:
    same = torch.ones(1, 8, 4)
    first = tokens.match(same, 6)
    assert torch.equal(first, tokens.match(same, 6))
    assert first[0].argmax(0).tolist() == [2, 2, 2, 3, 0, 4, 1, 5]


def test_near_ties_are_told_apart_exactly() -> None:
    a = torch.tensor([1.0, 1.0 - 2**-24, 0.5, 0.5])
    b = torch.tensor([1.0 - 2**-24, 1.0, 0.5, 0.5 - 2**-25])
    assert tokens.greater(a, b).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert tokens.greater(a, b, torch.ones(4)).tolist() == [1.0, 0.0, 1.0, 1.0]


@settings(max_examples=30, deadline=None)
@given(SIZES)
def test_merging_conserves_sizes_and_weighted_sums(case: tuple[int, int, int]) -> None:
    length, _, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, 5, generator=generator, dtype=torch.float64).float()
    size = torch.randint(1, 5, (2, length), generator=generator).float()
    weight = torch.rand(2, length, generator=generator) + 0.1
    assignment = tokens.match(x, length - length // 2)
    merged, sizes = tokens.merge(x, assignment, size, weight)
    assert torch.allclose(sizes.sum(1), size.sum(1))
    mass = assignment @ (size * weight).unsqueeze(-1)
    total = ((size * weight).unsqueeze(-1) * x).sum(1)
    assert torch.allclose((merged * mass).sum(1), total, atol=1e-4)
    copied = tokens.unmerge(merged, assignment)
    assert torch.equal(copied, merged.gather(1, assignment.argmax(1).unsqueeze(-1).expand(-1, -1, 5)))


@settings(max_examples=25, deadline=None)
@given(SIZES)
def test_index_and_matrix_plans_agree(case: tuple[int, int, int]) -> None:
    length, prefix, seed = case
    x = torch.randn(2, length, 6, generator=torch.Generator().manual_seed(seed))
    mass = x[..., 0].exp()
    for drop in (False, True):
        keep = max(length - length // 2 + prefix, prefix + 1)
        if keep > length:
            return
        route = tokens.bipartite(tokens.similarity(x), keep, prefix=prefix, drop=drop)
        dense, index = dense_plan(route, mass), sequence_plan(route, mass)
        assert type(dense) is not type(index)
        assert torch.allclose(dense.pool(x), index.pool(x), atol=1e-5)
        assert torch.allclose(dense.copy(x[:, :keep]), index.copy(x[:, :keep]), atol=1e-6)
        assert torch.allclose(dense.total(mass), index.total(mass), atol=1e-5)


def test_grid_plan_is_rows_then_columns_and_conserves_mass() -> None:
    x = torch.randn(2, 6 * 4, 3)
    rows = tokens.bipartite(tokens.similarity(x.reshape(12, 4, 3)), 3)
    narrow = dense_plan(rows, torch.ones(12, 4))
    turned = narrow.pool(x.reshape(12, 4, 3)).reshape(2, 6, 3, 3).transpose(1, 2).reshape(6, 6, 3)
    sizes = narrow.total(torch.ones(12, 4)).reshape(2, 6, 3).transpose(1, 2).reshape(6, 6)
    columns = dense_plan(tokens.bipartite(tokens.similarity(turned), 4), sizes)
    plan = GridPlan((6, 4), (4, 3), (1, 1), narrow, columns)
    matrix = plan.matrix()
    sizes = plan.total(torch.ones(2, 24))
    assert torch.equal(matrix.sum(1), torch.ones(2, 24))
    assert torch.equal(sizes, matrix.sum(2))
    expected = (matrix @ x) / sizes.unsqueeze(-1)
    assert torch.allclose(plan.pool(x), expected, atol=1e-5)
    assert torch.allclose(plan.copy(plan.pool(x)), matrix.transpose(1, 2) @ expected, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "ratio", "prefix", "kept"), [(197, 0.7, 1, 138), (197, 1.0, 1, 197), (10, 0.5, 0, 5), (9, 0.01, 2, 3)]
)
def test_kept_tokens(count: int, ratio: float, prefix: int, kept: int) -> None:
    assert tokens.kept_tokens(count, ratio, prefix) == kept


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.3, 1.0), st.booleans())
def test_kept_grid_keeps_tiles_whole(height: int, width: int, ratio: float, strided: bool) -> None:
    kept = tokens.kept_grid(height, width, ratio, strided=strided)
    for side, left in zip((height, width), kept):
        cuts = tokens.tiles(side)
        assert side % cuts == 0 and left % cuts == 0 and (side + 1) // 2 <= left <= side
    assert tokens.kept_grid(height, width, 1.0, strided=strided) == (height, width)


def test_a_map_that_is_halved_later_keeps_sides_that_halve_well() -> None:
    assert tokens.kept_grid(14, 14, 0.7) == (12, 11)  # 6 x 6 of 7 x 7 after a stride: 0.73
    assert tokens.kept_grid(14, 14, 0.7, strided=True) == (14, 10)  # 7 x 5: 0.71
    assert tokens.kept_grid(8, 8, 0.5, strided=True) == (6, 5)  # 8 x 4 would halve one side alone


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.3, 1.0))
def test_rows_merge_alone_only_where_that_meets_the_ratio(height: int, width: int, ratio: float) -> None:
    alone, both = tokens.kept_grid(height, width, ratio, 8, True), tokens.kept_grid(height, width, ratio, 8)
    if alone != both:
        assert alone[0] == height and 0.65 * width <= alone[1] < width
        assert ratio - 0.1 - 1e-9 < alone[1] / width < ratio + 0.05 + 1e-9


@contextmanager
def exporting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_exporting", lambda: True)
        yield


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(2, short_lines.LINE), st.integers(0, 10**6))
def test_lines_are_exported_with_the_same_cosines(lines: int, length: int, seed: int) -> None:
    metric = torch.randn(lines, length, 32, generator=torch.Generator().manual_seed(seed))
    wanted = tokens.similarity(metric)
    lowered = tokens.less(wanted, metric[..., 0])
    with exporting():
        torch.testing.assert_close(tokens.similarity(metric), wanted, atol=1e-6, rtol=1e-5)
        assert torch.equal(tokens.less(wanted, metric[..., 0]), lowered)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 2 * short_lines.SHORT), st.integers(0, 10**6))
def test_masses_are_summed_by_products_with_constants(lines: int, kept: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    share, mass = torch.rand(lines, kept, length, generator=generator), torch.rand(lines, length, generator=generator)
    wanted = (share @ mass[..., None])[..., 0]
    torch.testing.assert_close(short_lines.sums(share, mass), wanted)
    with exporting():
        torch.testing.assert_close(short_lines.sums(share, mass), wanted)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10**6))
def test_the_first_maximum_is_exported_as_it_is(length: int, seed: int) -> None:
    x = torch.randint(-3, 3, (2, 5, length), generator=torch.Generator().manual_seed(seed)).float()  # ties
    top, first = tokens.first_max(x)
    assert torch.equal(top[..., 0], x.amax(-1)) and torch.equal(first.argmax(-1), x.argmax(-1)) and (first.sum(-1) == 1).all()
    with exporting():
        assert all(torch.equal(a, b) for a, b in zip(tokens.first_max(x), (top, first)))


@settings(max_examples=80, deadline=None)
@given(st.integers(2, short_lines.SHORT), st.booleans(), st.booleans(), st.data())
def test_short_lines_are_exported_with_the_same_merges(length: int, ordered: bool, drop: bool, data: st.DataObject) -> None:
    evens, odds = (length + 1) // 2, length // 2
    prefix = data.draw(st.integers(0, 2)) if length > 3 else 0
    keep = data.draw(st.integers(length - max(evens - (prefix + 1) // 2, 0), length))
    few = st.sampled_from([-0.5, 0.25, 0.25 + 2**-25, 0.75])  # ties and near ties
    scores = torch.tensor(data.draw(st.lists(few, min_size=2 * evens * odds, max_size=2 * evens * odds)))
    scores = scores.reshape(2, evens, odds)
    options = {"prefix": prefix, "drop": drop, "ordered": ordered}
    wanted = tokens.bipartite(scores, keep, **options)
    with exporting():
        route = tokens.bipartite(scores, keep, **options)
        assert torch.equal(route.slot, wanted.slot) and torch.equal(route.matrix(), wanted.matrix())


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_ratios_outside_are_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="outside"):
        tokens.kept_tokens(10, ratio)
    with pytest.raises(UsageError, match="outside"):
        tokens.kept_grid(8, 8, ratio)


def test_a_ratio_is_any_real_number_and_nothing_else() -> None:
    assert tokens.kept_tokens(10, np.float32(0.7)) == tokens.kept_tokens(10, np.float64(0.7)) == 7
    for array in (np.array([0.7]), torch.tensor(0.7), "a"):
        with pytest.raises(UsageError, match=f"is a {type(array).__name__}; give a number in"):
            tokens.kept_tokens(10, array)  # type: ignore[arg-type]


def test_what_one_matching_cannot_reach_is_refused() -> None:
    with pytest.raises(UsageError, match="one matching leaves 5 to 9"):
        tokens.match(torch.randn(1, 9, 4), 3, prefix=1)
    with pytest.raises(UsageError, match="at least 0.25"):
        tokens.kept_grid(8, 8, 0.1)


def test_straight_through_has_the_hard_value_and_a_gradient() -> None:
    x = torch.randn(2, 9, 4)
    threshold = torch.tensor(0.2, requires_grad=True)
    scores = tokens.similarity(x)
    soft = torch.sigmoid((scores.amax(-1, keepdim=True) - threshold) / 0.1)
    hard = tokens.bipartite(scores, 6).matrix()
    trained = tokens.bipartite(scores, 6, soft=soft).matrix()
    assert torch.allclose(hard, trained, atol=1e-6)
    (trained @ x).pow(2).sum().backward()
    assert threshold.grad is not None and threshold.grad.abs() > 0


@pytest.mark.parametrize("merger", ["tome", "ibtm"])
def test_autocast_changes_no_decision_of_long_lines(merger: str) -> None:
    """In bfloat16 a slot above 256 would be rounded, and two tokens have one place."""
    site = Site(make_merger(merger, 8, 3), 0.9, "sequence").eval()
    z = torch.randn(1, 701, 8, generator=torch.Generator().manual_seed(0))
    given = Tokens(z, torch.ones(1, 701), z, prefix=1)
    wanted = site(given)
    with torch.autocast("cpu", torch.bfloat16):
        got = site(given)
    assert wanted.plan is not None and got.plan is not None
    if merger == "tome":
        assert torch.equal(got.plan.matrix(), wanted.plan.matrix())
    assert torch.equal(got.plan.matrix().sum(1), torch.ones(1, 701)) and (got.plan.matrix().sum(2) > 0).all()
