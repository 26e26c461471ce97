"""The moving picture of a search: every format from the same trace, whole or not at all, without torch."""

import base64
import itertools
import json
import re
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import upop
from upop import animate as module
from upop.animate import animate, color_of, fate_order, grid, page, paint, ramp, shares, title
from upop.errors import UpopError
from upop.trace import Trace


def make_trace(frames=6, seed=0, layers=2, attn=8, mlp=30):
    """A search that keeps every unit with some chance; all masks of a frame are 1 or the frame's own value."""
    generator = np.random.default_rng(seed)
    units = [attn, mlp] * layers
    fall = generator.integers(1, 2 * frames, size=sum(units))
    value = 1 - np.arange(frames) / (frames - 1) if frames > 1 else np.zeros(1)
    gone = np.arange(frames)[:, None] >= fall
    masks = np.where(gone, np.clip(np.rint(255 * value), 0, 254)[:, None], 255).astype(np.uint8)
    return Trace(
        np.arange(1, frames + 1, dtype=np.int32),
        np.linspace(0, 0.5, frames, dtype=np.float32),
        masks,
        np.array(["attn", "mlp"] * layers),
        np.repeat(np.arange(layers, dtype=np.int32), 2),
        np.array(units, dtype=np.int32),
    )


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    make_trace().save(folder / "trace.npz")
    return folder


def test_units_stand_in_the_order_of_their_fate():
    masks = np.array(
        [[255, 255, 255, 255, 255], [128, 255, 128, 128, 255], [255, 10, 10, 255, 255], [255, 0, 0, 255, 255]]
    )
    trace = Trace(
        np.arange(4, dtype=np.int32),
        np.zeros(4, dtype=np.float32),
        masks.astype(np.uint8),
        np.array(["mlp"]),
        np.zeros(1, dtype=np.int32),
        np.array([5], dtype=np.int32),
    )
    # 4 was never chosen; 0 and 3 were and came back; 1 left later than 2.
    assert fate_order(trace).tolist() == [4, 0, 3, 1, 2]


def test_the_order_is_one_of_each_structure_by_itself():
    trace = make_trace()
    order = fate_order(trace)
    for span in trace.spans:
        assert sorted(order[span]) == list(range(span.start, span.stop))
        last = trace.masks[-1, order[span]].astype(int)
        assert (np.diff(last) <= 0).all()


def test_the_colours_tell_untouched_and_removed_from_what_is_nearly_so():
    colors = ramp("#4363d8").astype(int)
    assert colors[255].tolist() == [0x43, 0x63, 0xD8]
    steps = np.abs(np.diff(colors, axis=0)).sum(1)
    assert steps[[0, -1]].min() > 10 * steps[1:-1].max()
    assert len({color_of(kind, make_trace()) for kind in ("attn", "mlp")}) == 2


def test_shares_count_every_unit_once():
    trace = make_trace()
    found = shares(trace, "mlp", 5)
    values = np.concatenate([trace.masks[5, trace.spans[n]] for n in (1, 3)])
    assert found["untouched"] + found["shrinking"] + found["removed"] == 60
    assert (found["removed"], found["mean"]) == ((values == 0).sum(), pytest.approx(values.mean() / 255))


@pytest.mark.parametrize("units", [1, 7, 64, 768, 3072])
def test_cells_are_as_many_as_units_and_fit(units):
    rows, cell = grid(units, 430, 72)
    columns = -(-units // rows)
    assert columns * cell <= 430
    assert rows * cell <= 72
    column = module.Column("mlp", 0, rows, cell, ramp("#e6762b"))
    assert paint(np.full(units, 255, np.uint8), column).shape == (rows * cell, columns * cell, 3)


def test_the_title_says_what_the_result_says_but_not_where_the_model_lay(run):
    assert title(run) == "half"
    config = {"model": "/home/somebody/runs/dense/model", "target": "params=0.5", "method": "unified"}
    (run / "result.json").write_text(json.dumps({"config": config}))
    assert title(run) == "unified on dense/model, params=0.5"
    for broken in ("{", "[]", '{"config": 3}', "null"):
        (run / "result.json").write_text(broken)
        assert title(run) == "half"


def test_the_page_asks_nothing_of_the_network_and_is_the_same_twice(run, tmp_path):
    first, second = animate(run, tmp_path / "a.html"), animate(run, tmp_path / "deep/er/b.html")
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|<script[^>]+src|import\(", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "prefers-reduced-motion" in text


def test_the_page_holds_every_mask():
    trace = make_trace()
    text = page(trace, "</script><b>")
    assert "<b>" not in text
    data = json.loads(re.search(r'<script type="application/json" id="trace">(.*?)</script>', text, re.DOTALL)[1])
    masks = np.frombuffer(zlib.decompress(base64.b64decode(data["masks"])), np.uint8).reshape(-1, 6).T
    assert np.array_equal(masks, trace.masks)
    assert np.array_equal(np.frombuffer(base64.b64decode(data["order"]), "<u4"), fate_order(trace))
    assert data["structures"][1] == {"kind": "mlp", "layer": 0, "units": 30}
    assert data["step"] == [1, 2, 3, 4, 5, 6]


def test_a_gif_moves_and_rests_on_its_last_frame(run, tmp_path):
    path = animate(run, tmp_path / "search.GIF")
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"]) == (6, 0)
        assert image.width == module.WIDTH
        pictures, durations = [], []
        for frame in range(image.n_frames):
            image.seek(frame)
            pictures.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    assert durations == [500] * 5 + [2500]
    assert all((a != b).any() for a, b in itertools.pairwise(pictures))


def test_a_gif_has_a_bounded_number_of_frames(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GIF_FRAMES", 3)
    with Image.open(animate(run, tmp_path / "search.gif")) as image:
        assert image.n_frames == 3


def test_one_frame_other_kinds_and_a_dollar_sign_are_drawn_too(tmp_path):
    folder = tmp_path / "a$b$\\frac"
    folder.mkdir()
    trace = make_trace(frames=1)
    kinds = np.array(["qk", "head", "v", "mlp"])
    Trace(trace.step, trace.ratio, trace.masks, kinds, trace.layers, trace.units).save(folder / "trace.npz")
    assert animate(folder, tmp_path / "one.gif").stat().st_size > 0
    assert animate(folder, tmp_path / "one.html").stat().st_size > 0


def test_mp4_without_ffmpeg_is_refused_with_what_to_do(run, tmp_path, monkeypatch):
    from matplotlib.animation import FFMpegWriter

    monkeypatch.setattr(FFMpegWriter, "isAvailable", lambda: False)
    with pytest.raises(UpopError, match=r"writing MP4 needs ffmpeg, which is not installed; install it or use \.gif$"):
        animate(run, tmp_path / "search.mp4")
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.slow
def test_an_mp4_is_written_where_there_is_ffmpeg(run, tmp_path):
    from matplotlib.animation import FFMpegWriter

    if not FFMpegWriter.isAvailable():
        pytest.skip("no ffmpeg here")
    assert b"ftyp" in animate(run, tmp_path / "search.mp4").read_bytes()[:16]


@pytest.mark.parametrize(("name", "got"), [("search.png", r"'\.png'"), ("search", "'no ending'")])
def test_other_formats_are_refused(run, tmp_path, name, got):
    with pytest.raises(UpopError, match=rf"expected a name that ends in \.html, \.gif, \.mp4, got {got}$"):
        animate(run, tmp_path / name)


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(UpopError, match="none: expected the folder of a run, there is none"):
        animate(tmp_path / "none", tmp_path / "a.html")
    (run / "trace.npz").unlink()
    with pytest.raises(UpopError, match=r"trace\.npz: not found"):
        animate(run, tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_a_picture_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text("older")

    def full(trace, heading, path):
        path.write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_html", full)
    with pytest.raises(UpopError, match=r"a\.html: cannot be written \(No space left on device\)"):
        animate(run, tmp_path / "a.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "half"]
    assert (tmp_path / "a.html").read_text() == "older"
    (tmp_path / "file").write_text("")
    with pytest.raises(UpopError, match=r"cannot be written"):
        animate(run, tmp_path / "file" / "a.html")


def test_nothing_here_needs_torch(run, tmp_path):
    # `import upop` itself does, so the package stands in as an empty one with the same folder.
    code = f"""
        import sys, types
        from pathlib import Path
        sys.modules["torch"] = None
        package = sys.modules["upop"] = types.ModuleType("upop")
        package.__path__ = [{str(Path(upop.__file__).parent)!r}]
        from upop.animate import animate
        from upop.trace import load_trace
        load_trace(Path({str(run / "trace.npz")!r})).summary()
        for name in ("a.html", "a.gif"):
            animate(Path({str(run)!r}), Path({str(tmp_path)!r}) / name)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert (tmp_path / "a.html").exists()
    assert (tmp_path / "a.gif").exists()
