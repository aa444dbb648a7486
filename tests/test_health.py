"""The figures of a dictionary against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.health import (
    MOST_ROWS,
    RecentLabels,
    alignment,
    effective_rank,
    encoder_distance,
    key_age,
    measure,
    similarity_counts,
    some_rows,
    uniformity,
)


def unit(rows, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_effective_rank_of_an_orthonormal_set_is_its_size(repeats):
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    for count in (1, 5, 8):
        rows = basis[:count].repeat(repeats, 1)
        assert effective_rank(rows).item() == pytest.approx(count, rel=1e-5)


def test_the_effective_rank_is_the_entropy_of_the_singular_values():
    rows = torch.diag(torch.tensor([3.0, 1.0]))
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(rows).item() == pytest.approx(expected)
    wide = unit(5, 20)
    singular = torch.linalg.svdvals(wide.double())
    share = singular / singular.sum()
    assert effective_rank(wide).item() == pytest.approx(
        torch.exp(-(share * share.log()).sum()).item()
    )


def test_the_effective_rank_of_equal_rows_is_one_and_of_zeros_finite():
    assert effective_rank(unit(1, 16).repeat(50, 1)).item() == pytest.approx(1, abs=1e-4)
    assert math.isfinite(effective_rank(torch.zeros(4, 4)).item())


def test_uniformity_of_known_sets():
    point = unit(1, 8)
    assert uniformity(torch.cat([point, -point])).item() == pytest.approx(-8)  # distance 2
    assert uniformity(point.repeat(9, 1)).item() == pytest.approx(0)
    basis = torch.eye(6)  # distance sqrt(2)
    assert uniformity(basis).item() == pytest.approx(-4)
    assert uniformity(unit(2000, 128)).item() == pytest.approx(-4 + 8 / 128, abs=0.02)


def test_alignment_of_equal_opposite_and_orthogonal_pairs():
    query = torch.eye(4)
    assert alignment(query, query).item() == 0
    assert alignment(query, -query).item() == 4
    assert alignment(query, query.roll(1, dims=0)).item() == pytest.approx(2)


def test_similarities_are_counted_from_minus_one_to_one():
    counts = similarity_counts(torch.tensor([-1.0, -1.0000001, 0.01, 1.0, 1.0000001]))
    assert (counts[0], counts[20], counts[-1], counts.sum()) == (2, 1, 2, 5)


def test_the_distance_of_encoders_is_relative():
    query = [torch.full((3, 4), 2.0), torch.full((2,), 2.0)]
    assert encoder_distance(query, query).item() == 0
    assert encoder_distance(query, [t * 0.9 for t in query]).item() == pytest.approx(0.1)
    assert encoder_distance(query, [-t for t in query]).item() == pytest.approx(2)


def ages_by_counting(steps, batch, length):
    queue = []
    for _ in range(steps):
        queue = [1] * batch + [age + 1 for age in queue]
    return queue[:length]


@pytest.mark.parametrize(("steps", "batch", "length"),
                         [(0, 4, 10), (1, 4, 10), (2, 4, 10), (3, 4, 10), (9, 4, 10), (5, 4, 12),
                          (2, 20, 8)])  # fmt: skip
def test_the_age_of_keys_is_what_counting_gives(steps, batch, length):
    ages = ages_by_counting(steps, batch, length)
    found = key_age(steps, batch, length)
    assert found.filled == len(ages) / length
    assert found.oldest_steps == max(ages, default=0)
    assert found.mean_steps == pytest.approx(sum(ages) / max(len(ages), 1))


def test_false_negatives_are_the_keys_of_a_querys_class():
    labels = RecentLabels(6)
    assert labels.false_negative_share([0, 1]) is None
    labels.push([9, 9, 9])  # overwritten by the next
    labels.push([0, 0, 0, 1, 2, 2])
    assert labels.false_negative_share([0]) == pytest.approx(3 / 6)
    assert labels.false_negative_share([0, 1, 7]) == pytest.approx((3 + 1 + 0) / 18)


def test_pictures_without_labels_are_left_out_of_false_negatives():
    labels = RecentLabels(10)
    labels.push([-1, -1, 3])
    assert labels.false_negative_share([-1]) is None
    assert labels.false_negative_share([-1, 3]) == 1
    unlabelled = RecentLabels(10)
    unlabelled.push([-1, -1])
    assert unlabelled.false_negative_share([-1, -1]) is None


def test_all_figures_of_a_step_are_those_of_their_functions():
    query, key, negative = unit(6, 16, 1), unit(6, 16, 2), unit(40, 16, 3)
    found = measure(query, key, negative)
    assert found["positive_similarity"].item() == pytest.approx(
        sum(float(q @ k) for q, k in zip(query, key, strict=True)) / 6, abs=1e-6
    )
    assert found["negative_similarity"].item() == pytest.approx(
        sum(float(q @ k) for q in query for k in negative) / 240, abs=1e-6
    )
    assert found["alignment"].item() == pytest.approx(
        2 - 2 * found["positive_similarity"].item(), abs=1e-5
    )
    assert found["effective_rank"] == effective_rank(negative)
    assert found["uniformity"] == uniformity(negative)
    assert (found["positive_counts"].sum(), found["negative_counts"].sum()) == (6, 240)


def test_without_a_queue_the_other_pictures_of_the_batch_are_looked_at():
    query, key = unit(6, 16, 1), unit(6, 16, 2)
    found = measure(query, key, None)
    others = [float(q @ k) for i, q in enumerate(query) for j, k in enumerate(key) if i != j]
    assert found["negative_similarity"].item() == pytest.approx(sum(others) / 30, abs=1e-6)
    assert found["negative_counts"].sum() == 30
    assert found["effective_rank"] == effective_rank(key)
    assert found["highest_rank"] == 6


def test_no_gradient_flows_into_the_figures():
    query = unit(4, 8).requires_grad_()
    found = measure(query, unit(4, 8), unit(9, 8)).values()
    assert not any(torch.is_tensor(value) and value.requires_grad for value in found)


@pytest.mark.parametrize(("length", "filled", "expected"),
                         [(100, 1.0, 100), (100, 0.25, 25), (100, 0.0, 1), (65_536, 1.0, 1024),
                          (MOST_ROWS + 1, 1.0, 513)])  # fmt: skip
def test_only_filled_rows_are_looked_at_and_not_too_many(length, filled, expected):
    rows = torch.arange(length).unsqueeze(1)
    found = some_rows(rows, filled)
    assert len(found) == expected
    assert int(found.max()) < max(length * filled, 1)
