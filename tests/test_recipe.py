"""The switches' values, and the two schedules of the learning rate."""

import pytest

from scbert.train.recipe import Recipe, learning_rate_at


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampling", "random"),
        ("leftover_steps", True),
        ("lr_schedule", "cosine"),
        ("trainable_layers", "first"),
        ("key_stabiliser", "cell"),
        ("select_by", "f1"),
        ("report_on", "train"),
        ("class_weight", "uniform"),
    ],
)
def test_a_recipe_refuses_what_it_does_not_know(name, value):
    with pytest.raises(ValueError, match=f"Recipe.{name} must be .*{value!r}"):
        Recipe(**{name: value})


def test_sound_is_the_default_and_published_differs_in_each_switch_but_two():
    assert Recipe() == Recipe.sound()
    sound, published = vars(Recipe.sound()), vars(Recipe.published())
    assert {name for name in sound if sound[name] == published[name]} == {"class_weight", "thin"}


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(1, 1e-6), (6, 1e-4), (16, 1e-6), (21, 9e-5), (41, 1e-6), (46, 8.1e-5), (86, 1e-6), (91, 7.29e-5)],
)
def test_the_published_schedule_restarts_where_the_published_one_does(epoch, rate):
    for step in (7 * (epoch - 1), 7 * epoch - 1):  # constant within an epoch
        assert learning_rate_at(step, 0, 7, 1e-4, "per_epoch") == pytest.approx(rate)


def test_the_schedule_per_step_warms_up_over_a_tenth_and_falls_to_zero():
    rates = [learning_rate_at(step, 100, 7, 1e-3, "per_step") for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert rates[55] == pytest.approx(5e-4)
    assert all(after < before for before, after in zip(rates[10:], rates[11:], strict=False))
    assert 0 < rates[-1] < 1e-6
