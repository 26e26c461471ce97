"""What is said of accuracies that guessing would reach."""

import torch

from upop.measure import chance_warnings

LABELS = torch.tensor([0, 1, 2] * 2)  # guessing: 0.333, and by luck up to 0.911
MANY = torch.tensor([0, 1, 2] * 1000)


def said(labels, **accuracy):
    return chance_warnings({stage: {"validation": value} for stage, value in accuracy.items()}, labels)


def test_nothing_where_models_know_something():
    assert said(MANY, dense=0.9, slim=0.5, retrain=0.8) == []


def test_a_dense_model_that_knows_nothing_is_the_only_news():
    (line,) = said(MANY, dense=0.34, slim=0.33, retrain=0.35)
    assert line == (
        "dense: validation accuracy 0.340 is at chance (0.333); the dense model is not trained, or not for these "
        "classes in this order"
    )


def test_a_model_that_was_better_before_has_collapsed():
    (line,) = said(MANY, dense=0.9, slim=0.35, retrain=0.8)
    assert line.startswith("slim: validation accuracy 0.350 is at chance (0.333); the model has collapsed")


def test_too_few_images_are_no_collapse():
    (line,) = said(LABELS, dense=1.0, retrain=0.667)
    assert (
        line == "retrain: validation accuracy 0.667 cannot be told from guessing (0.333) with 6 images; hold out more"
    )
