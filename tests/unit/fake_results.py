"""Invented results in the form that runs leave, for tests of the report. No number here was ever measured."""

import json
import math
import random

LAYERS = 6
# Points that a method loses at ratio 1, before and after retraining: invented.
LOSS = {
    "upop": (9, 5),
    "progressive": (12, 8),
    "unified": (45, 7),
    "mask": (60, 30),
    "magnitude": (55, 12),
    "taylor": (50, 10),
    "random": (65, 35),
}
CONFIG = {
    "model": "runs/dense/model",
    "data": "data/cifar10",
    "method": "upop",
    "shrink": "progressive",
    "schedule": "sine",
    "normalise": "zscore",
    "gradient_order": "paper",
    "binarise": "topk",
    "threshold": None,
    "max_drop": None,
    "tolerance": None,
    "sparsity_attn": 4.8e-3,
    "sparsity_mlp": 2e-4,
    "seed": 0,
    "target": "prunable=0.5",
    "epochs_search": 4.0,
    "epochs_retrain": 8.0,
    "out": "runs/x",
    "stages": "search,retrain",
}


def both(test):
    return {"validation": round(test + 0.004, 4), "test": round(test, 4)}


def result(**config):
    """One result; the numbers follow from the settings and the seed, no matter in which order it is made."""
    config = {**CONFIG, **config}
    if config["method"] not in ("upop", "progressive"):
        config["shrink"] = "once"
    key = {k: v for k, v in config.items() if k not in ("sparsity_attn", "sparsity_mlp", "out")}
    noise = random.Random(json.dumps(key, sort_keys=True))
    asked = config["target"].partition("=")[2]
    ratio = float(asked) if asked.startswith("0.") else 0.63
    before = {"attn": [64] * LAYERS, "mlp": [768] * LAYERS}
    kept = {
        kind: [max(1, round(n * min(1, (1 - ratio) * (0.7 + 0.1 * layer)))) for layer, n in enumerate(units)]
        for kind, units in before.items()
    }
    soft, hard = LOSS.get(config["method"], (0, 0))
    worse = 4 * (config["normalise"] == "none") + 1.5 * (config["schedule"] == "cubic")
    slim = 0.82 - (soft * ratio**3 + worse + noise.gauss(0, 0.3)) / 100
    retrain = 0.84 - (hard * ratio**3 + worse + noise.gauss(0, 0.25)) / 100
    steps = list(range(0, 1000, 40))
    progress = [math.sin(math.pi * step / 2 / 960) for step in steps]
    return {
        "schema": 2,
        "status": "complete",
        "warnings": [],
        "command": f"upop prune --method {config['method']} --target {config['target']} --seed {config['seed']}",
        "commit": "0123abc",
        "versions": {"python": "3.11.7", "upop": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": "an invented processor", "cores": 2},
        "config": config,
        "data": {"name": "cifar10", "classes": list("abcdefghij"), "images": {"train": 45000, "test": 10000}},
        "ratio": {"target": ratio if "=" in config["target"] else None, "prunable": ratio, "params": 0.97 * ratio},
        "accuracy": {
            "dense": both(0.8208),
            "search": both(slim if config["shrink"] == "progressive" else 0.815),
            "slim": both(slim),
            "retrain": both(retrain),
        },
        "gap": 2e-6 if config["shrink"] == "progressive" else 1.7,
        "params": {"before": 2693578, "after": round(2693578 * (1 - 0.97 * ratio))},
        "macs": {"before": 182849664, "after": round(182849664 * (1 - 0.95 * ratio))},
        "latency": {
            batch: {"before": {"median_ms": ms}, "after": {"median_ms": ms * (1 - 0.6 * ratio)}}
            for batch, ms in {"1": 8.6, "64": 176.7}.items()
        },
        "widths": {"before": before, "after": kept},
        "trajectory": {
            "step": steps,
            "ratio": [ratio * p for p in progress],
            "mean_mask": {
                kind: [[1 - p * (1 - k / 64 if kind == "attn" else 1 - k / 768) for k in kept[kind]] for p in progress]
                for kind in before
            },
        },
        "checks": None,
        "seconds": {"search": 1000.0, "retrain": 1000.0, "all": 2180.0},
    }


def dense(seed=0):
    made = result(method="dense", seed=seed, target="open")
    made["accuracy"] = {"dense": both(0.8208)}
    for key in ("ratio", "gap", "trajectory", "checks"):
        del made[key]
    return made


def continued(seed):
    made = result(method="dense-continued", seed=seed, target="open")
    made["accuracy"] = {"dense": both(0.8208), "retrain": both(0.842 + 0.001 * seed)}
    for key in ("ratio", "gap", "widths", "latency", "trajectory"):
        made[key] = None
    return made


def open_ended(seed, **config):
    made = result(seed=seed, target="open", **config)
    made["ratio"]["prunable"] = 0.6 + 0.02 * seed
    made["checks"] = [{"step": 100 * n, "ratio": 0.07 * n, "accuracy": 0.82 - 0.0003 * n * n} for n in range(10)]
    return made


def study(seeds=(0, 1, 2), targets=("prunable=0.5", "prunable=0.8", "prunable=0.9")):
    """A whole study: label -> result."""
    runs = {"dense": dense()}
    for seed in seeds:
        for target in targets:
            for method in LOSS:
                runs[f"{method}-{target}-s{seed}"] = result(method=method, target=target, seed=seed)
        variants = [{"schedule": s} for s in ("linear", "sigmoid", "exponential", "cosine", "cubic")]
        variants += [{"normalise": n} for n in ("none", "minmax", "rank")]
        variants += [{"sparsity_attn": 0.0, "sparsity_mlp": 0.0}, {"tolerance": 0.02}]
        for number, variant in enumerate(variants):
            runs[f"variant-{number}-s{seed}"] = result(seed=seed, target="prunable=0.8", **variant)
        runs[f"mask-off-s{seed}"] = result(
            method="mask", seed=seed, target="prunable=0.8", sparsity_attn=0.0, sparsity_mlp=0.0
        )
        runs[f"unified-none-s{seed}"] = result(method="unified", seed=seed, target="prunable=0.8", normalise="none")
        runs[f"dense-continued-s{seed}"] = continued(seed)
        runs[f"threshold-s{seed}"] = open_ended(seed, binarise="threshold", threshold=0.5)
        runs[f"budget-s{seed}"] = open_ended(seed, max_drop=0.05)
    return runs


def write(folder, runs, about=None):
    """As the study leaves them: a folder per run, and study.json if `about` is given."""
    for label, made in runs.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / "result.json").write_text(json.dumps(made))
    if about is not None:
        (folder / "study.json").write_text(json.dumps({"schema": 1, "name": "fake", "base": {}, **about}))
    return folder
