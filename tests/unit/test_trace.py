"""The trace of a search: which frames it keeps, what a byte means, and what it refuses to read."""

import json
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from upop import Search
from upop.errors import UpopError
from upop.hook import SearchHook
from upop.trace import TraceRecorder, load_trace, quantise


@dataclass
class Group:
    """What a trace needs to know of a Structure."""

    kind: str
    layer: int
    units: int

    @property
    def name(self):
        return f"{self.kind}.{self.layer}"


GROUPS = [Group("attn", 0, 4), Group("mlp", 0, 10), Group("attn", 1, 3), Group("mlp", 1, 8)]


def masks(seed):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.units, generator=generator) for g in GROUPS}


def record(steps, frames=120, first=1, every=1):
    recorder = TraceRecorder(GROUPS, steps, frames)
    for step in range(first, steps + 1, every):
        recorder.record(step, 0.5 * step / steps, masks(step))
    return recorder


def test_what_is_saved_comes_back(tmp_path):
    recorder = record(30, frames=7)
    recorder.save(tmp_path / "trace.npz")
    saved, loaded = recorder.trace(), load_trace(tmp_path / "trace.npz")
    for name in ("step", "ratio", "masks", "kinds", "layers", "units"):
        assert np.array_equal(getattr(saved, name), getattr(loaded, name)), name
        assert getattr(saved, name).dtype == getattr(loaded, name).dtype, name
    assert (loaded.step.dtype, loaded.ratio.dtype, loaded.masks.dtype) == (np.int32, np.float32, np.uint8)
    assert loaded.kind_names == ["attn", "mlp"]
    assert list(loaded.layers) == [0, 0, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]
    expected = [round(255 * float(v)) for v in masks(30)["mlp.1"]]
    assert loaded.masks[-1, loaded.spans[3]].tolist() == expected


def test_zero_and_one_are_kept_exactly_and_nothing_else_becomes_them():
    values = np.array([0, 1e-6, 0.0019, 0.5, 0.9981, 1 - 6e-8, 1, 1.3, -0.2], dtype=np.float32)
    assert quantise(values).tolist() == [0, 1, 1, 128, 254, 254, 255, 255, 0]


def test_a_mask_below_zero_is_not_shown_as_removed():
    recorder = TraceRecorder(GROUPS, 1)
    recorder.record(1, 0.0, {name: -values for name, values in masks(0).items()})
    same = TraceRecorder(GROUPS, 1)
    same.record(1, 0.0, masks(0))
    assert np.array_equal(recorder.trace().masks, same.trace().masks)


def test_masks_of_half_precision_that_want_a_gradient_are_read_too():
    recorder = TraceRecorder(GROUPS, 1)
    recorder.record(1, 0.0, {k: v.bfloat16().requires_grad_() for k, v in masks(0).items()})
    assert recorder.trace().masks.shape == (1, 25)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("steps", "frames"), [(1, 120), (2, 2), (5, 120), (119, 120), (120, 120), (1000, 120), (997, 13)]
)
def test_first_and_last_step_are_frames_and_frames_are_bounded(steps, frames, first):
    step = record(steps, frames, first).trace().step
    assert (step[0], step[-1]) == (first, steps)
    assert len(step) <= frames
    assert len(step) >= min(frames, steps) - 1
    if steps > 10 * frames:
        assert np.diff(step).max() - np.diff(step).min() <= 2


def test_a_search_that_updates_now_and_then_still_fills_its_frames():
    step = record(1000, frames=20, first=0, every=7).trace().step
    assert 19 <= len(step) <= 20


def test_a_tensor_that_changes_later_changes_no_frame():
    recorder, values = TraceRecorder(GROUPS, 2), {g.name: torch.ones(g.units) for g in GROUPS}
    recorder.record(1, 0.0, values)
    for value in values.values():
        value.zero_()
    assert (recorder.trace().masks == 255).all()


def test_the_summary_says_what_a_slow_reference_says():
    recorder = record(200, frames=50)
    trace, summary = recorder.trace(), recorder.summary(frames=9)
    assert json.loads(json.dumps(summary)) == summary
    assert (len(summary["step"]), summary["step"][0], summary["step"][-1]) == (9, 1, 200)
    for frame, step in enumerate(summary["step"]):
        row = trace.step.tolist().index(step)
        assert summary["ratio"][frame] == round(float(trace.ratio[row]), 4)
        for group in GROUPS:
            mean = sum(float(v) for v in masks(step)[group.name]) / group.units
            assert summary["mean_mask"][group.kind][frame][group.layer] == pytest.approx(mean, abs=1 / 255)
    assert len(trace.summary(frames=500)["step"]) == len(trace.step)


def test_the_summary_of_final_masks_is_exact():
    recorder = TraceRecorder(GROUPS, 1)
    recorder.record(1, 0.5, {g.name: (torch.arange(g.units) < 3).float() for g in GROUPS})
    assert recorder.summary()["mean_mask"] == {"attn": [[0.75, 1.0]], "mlp": [[0.3, 0.375]]}


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(UpopError, match=r"expected steps >= 1 and frames >= 2, got steps=5, frames=1$"):
        TraceRecorder(GROUPS, 5, frames=1)
    recorder = TraceRecorder(GROUPS, 5)
    with pytest.raises(UpopError, match=r"nothing was recorded; call record\(\)"):
        recorder.trace()
    with pytest.raises(UpopError, match="expected a step above -1, up to 5, got 6"):
        recorder.record(6, 0.0, masks(0))
    recorder.record(2, 0.0, masks(0))
    with pytest.raises(UpopError, match="expected a step above 2, up to 5, got 2"):
        recorder.record(2, 0.0, masks(0))


def saved(tmp_path, **changes):
    """A trace file in which some arrays are replaced, or left out where None."""
    trace = record(10, frames=4).trace()
    names = ("step", "ratio", "masks", "kinds", "layers", "units")
    arrays = {name: getattr(trace, name) for name in names} | changes
    np.savez_compressed(tmp_path / "trace.npz", **{k: v for k, v in arrays.items() if v is not None})
    return tmp_path / "trace.npz"


def refused(path, match):
    with pytest.raises(UpopError, match=match) as found:
        load_trace(path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("options", [{"method": "magnitude"}, {"method": "unified"}, {"method": "upop"}], ids=str)
def test_the_last_frame_is_what_stays_however_it_was_removed(make_model, images, options):
    model = make_model()
    search = Search(model, target="prunable=0.4", steps=3, **options)
    recorder = TraceRecorder(search.structures, search.steps)
    hook = SearchHook(search, lambda: 0.5, 0.1, recorder)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr": 1e-3}, *hook.groups()])
    for _ in range(search.steps):
        (model(images()).logits.square().sum() + hook.penalty()).backward()
        optimizer.step()
        hook.step()
        optimizer.zero_grad()
    stays = np.concatenate([search.keep()[s.name].numpy() for s in search.structures])
    trace = recorder.trace()
    assert not stays.all()
    assert np.array_equal(trace.masks[-1], np.where(stays, 255, 0))
    assert not np.array_equal(trace.masks[-2], trace.masks[-1])


def test_a_missing_trace_is_refused(tmp_path):
    refused(tmp_path / "trace.npz", r"trace\.npz: not found; expected the trace that a pruning run")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and then nothing", b"\x93NUMPY"])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "trace.npz").write_bytes(content)
    refused(tmp_path / "trace.npz", "cannot be read as a trace, it is damaged")


def test_a_trace_without_its_end_or_with_flipped_bytes_is_refused(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for size in range(1, len(whole), 97):
        path.write_bytes(whole[:size])
        refused(path, "cannot be read as a trace, it is damaged")
    with zipfile.ZipFile(saved(tmp_path)) as archive:
        start = archive.getinfo("masks.npy").header_offset + 60
    broken = bytearray(whole)
    broken[start : start + 8] = bytes(255 - b for b in broken[start : start + 8])
    path.write_bytes(broken)
    refused(path, "cannot be read as a trace, it is damaged")


def test_nothing_is_unpickled(tmp_path):
    refused(saved(tmp_path, kinds=np.array([{"a": 1}] * 4, dtype=object)), "cannot be read as a trace, it is damaged")


def test_other_numpy_files_are_refused(tmp_path):
    with (tmp_path / "trace.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    refused(tmp_path / "trace.npz", "expected a trace of a search, got a single array")
    refused(saved(tmp_path, masks=None), "expected a trace of a search, but it holds no array 'masks'")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"masks": np.zeros((4, 25))}, "masks of float64, expected ifUii and uint8"),
        ({"step": np.zeros(4)}, "arrays of types ffUii"),
        ({"masks": np.zeros((4, 24), np.uint8)}, r"masks of shape \(4, 24\), expected \(4, 25\)"),
        ({"ratio": np.zeros(3, np.float32)}, r"\(4,\) steps for \(3,\) ratios"),
        ({"ratio": np.full(4, np.nan, np.float32)}, "ratios are not numbers"),
        ({"step": np.array([1, 2, 2, 3])}, "steps do not increase from 0"),
        ({"units": np.array([4, 10, 11])}, "kinds, layers and units do not fit each other"),
        ({"units": np.array([4, 10, 0, 11])}, "kinds, layers and units do not fit each other"),
        ({"step": np.zeros(0, int), "ratio": np.zeros(0), "masks": np.zeros((0, 25), np.uint8)}, r"\(0,\) steps"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(tmp_path, changes, match):
    refused(saved(tmp_path, **changes), f"not a trace of a search: .*{match}")


def test_a_trace_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    recorder = record(5)
    with pytest.raises(UpopError, match=r"trace\.npz: cannot be written \(No such file or directory\)"):
        recorder.save(tmp_path / "none" / "trace.npz")
    recorder.save(tmp_path / "trace.npz")
    before = (tmp_path / "trace.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UpopError, match="No space left on device"):
        recorder.save(tmp_path / "trace.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]
    assert (tmp_path / "trace.npz").read_bytes() == before
