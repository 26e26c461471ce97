"""Published numbers that ours are set beside, each with its source. Data only; nothing here was measured by us."""

from dataclasses import dataclass

PAPER = "paper: Shi et al., UPop, ICML 2023 (arXiv 2301.13741), its table of DeiT-S on ImageNet"
REPORT = "earlier report: reproduction study BYOP_Repro_UPop, DeiT on CIFAR-10; one run each, no seeds"
CAVEATS = (
    "The paper's rows are ImageNet at 224 pixels from pretrained weights; ours are not comparable with them in level, "
    "only in shape.",
    "The earlier report's drops are against its own damaged baseline (68 to 75 % where about 98 % is usual for that "
    "model), with weights set to zero but never removed, ratios missed (.45, .71 and .80 reached) and the test set "
    "used for decisions.",
)


@dataclass(frozen=True)
class Published:
    """One number as printed: `value` in per cent or points, at a share removed of `ratio`.

    Our side is the mean over runs of `method` with the schedule and tolerance named here (None: the standard), those
    of upop in the paper's setting otherwise, at the same ratio; `minus` names what our number is taken against where
    the printed one is a difference.
    """

    source: str
    what: str
    ratio: float
    value: float
    unit: str
    method: str
    minus: str | None = None
    schedule: str | None = None
    adaptive: bool = False


def _drops(schedule: str, values: tuple[float, float, float]) -> tuple[Published, ...]:
    what = f"retrained, drop against the dense model, {schedule} schedule"
    return tuple(
        Published(REPORT, what, ratio, value, "points", "upop", "dense", schedule)
        for ratio, value in zip((0.5, 0.8, 0.9), values, strict=True)
    )


# The setting that the paper itself proposes, as values and in words: shown whether or not we have it.
OWN = {"schedule": "sine", "normalise": "zscore", "binarise": "topk"}
OWN_SETTING = "progressive and unified (upop), sine schedule, z-score, top-k"
PUBLISHED = (
    Published(PAPER, "dense model", 0.0, 79.9, "%", "dense"),
    *(
        Published(PAPER, f"retrained: {OWN_SETTING}", ratio, value, "%", "upop")
        for ratio, value in {0.1: 81.1, 0.2: 80.8, 0.3: 80.2, 0.4: 79.6, 0.5: 78.9}.items()
    ),
    Published(PAPER, "retrained: mask-based", 0.5, 77.9, "%", "mask"),
    *_drops("linear", (-3.0, -6.0, -7.0)),
    *_drops("sigmoid", (-3.0, -6.0, -7.0)),
    *_drops("exponential", (-4.5, -5.0, -5.5)),
    *(
        Published(REPORT, "retrained, above mask-based", ratio, value, "points", "upop", "mask")
        for ratio, value in {0.5: 3.0, 0.8: 5.0, 0.9: 5.5}.items()
    ),
    Published(REPORT, "adaptive rate, drop against the dense model", 0.8, -6.0, "points", "upop", "dense", None, True),
    Published(REPORT, "the same without the adaptive rate", 0.8, -7.5, "points", "upop", "dense"),
)
