"""A search as a moving picture, drawn from a run's trace: a web page with a player, a GIF or an MP4.

Shows which units the one ranking over all layers and kinds chooses, and their masks sinking to 0. Must not need torch:
pictures can be made anywhere from a `trace.npz`.

Units stand in the order of their fate, not of their index: those that stay come first, then the others, latest leaver
first, column by column. An index means nothing in a hidden layer, whereas in this order a layer's survivors are a bar
whose length compares across layers and kinds, and a unit that is chosen for a while and comes back is a fleck in it.

Shape suffixes: F frames, S structures, U units of all structures, R rows, C columns of cells.
"""

import base64
import subprocess
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upop.errors import UpopError
from upop.plots import COLORS, KIND_LABELS
from upop.reading import read_json
from upop.trace import Trace, load_trace

RGB = NDArray[np.uint8]
TEMPLATES = Path(__file__).parent / "templates"
PLAY_S, PAUSE_S = 8.0, 2.5
GIF_FRAMES = 100  # at most: a GIF's size is proportional to them
OTHER_COLORS = ("#2f7d4f", "#9a3fb5", "#b0413e")  # of kinds that have none of their own
REMOVED, PAPER, INK, FAINT = "#e6e8ec", "#ffffff", "#1d2129", "#6b7280"

# Film, in pixels.
DPI, WIDTH, SIDE, MARGIN, TOP, BOTTOM = 100, 960, 262, 18, 106, 46
METER, COUNTS_WIDTH = 76, 38  # of a meter with its lines; characters of its lines of counts


def animate(run_folder: Path, out: Path) -> Path:
    """Draw `run_folder`'s search into `out`, as its suffix says: .html, .gif or .mp4. Returns `out`.

    Written whole or not at all. Raises UpopError for another suffix, a run without a readable trace, a place that
    cannot be written, and for .mp4 without ffmpeg.
    """
    writers: dict[str, Callable[[Trace, str, Path], None]] = {
        ".html": _write_html,
        ".gif": _write_gif,
        ".mp4": _write_mp4,
    }
    write = writers.get(out.suffix.lower())
    if write is None:
        raise UpopError(
            f"out {out}: expected a name that ends in {', '.join(writers)}, got {out.suffix or 'no ending'!r}"
        )
    if not run_folder.is_dir():
        raise UpopError(f"{run_folder}: expected the folder of a run, there is none")
    trace = load_trace(run_folder / "trace.npz")
    # The ending says the format to whoever writes it.
    temporary = out.with_name(f".{out.stem}.partial{out.suffix.lower()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(trace, title(run_folder), temporary)
        temporary.replace(out)
    except OSError as error:
        raise UpopError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
    return out


def title(run_folder: Path) -> str:
    """Method, model and target as far as `result.json` tells them, else the folder's name."""
    try:
        config = read_json(run_folder / "result.json")["config"]
        model, target = str(config["model"]), str(config["target"])
        method = str(config.get("method", "upop"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return run_folder.resolve().name
    # Of a path only its end: where the model lay is nobody's business.
    return f"{method} on {'/'.join(Path(model).parts[-2:])}, {target}"


def fate_order(trace: Trace) -> NDArray[np.int64]:
    """Units [U] of each structure in the order of their fate, as indices into U.

    First who stays, then who left, the last to leave first. A unit leaves after the last frame in which its mask
    was 1; among equals those come first whose masks sum to most.
    """
    untouched = trace.masks == 255
    last = np.where(untouched.any(0), len(untouched) - 1 - untouched[::-1].argmax(0), -1)
    total = trace.masks.sum(0, dtype=np.int64)
    orders = [s.start + np.lexsort((-total[s], -last[s], trace.masks[-1, s] == 0)) for s in trace.spans]
    return np.concatenate(orders)


def shares(trace: Trace, kind: str, frame: int) -> dict[str, float]:
    """Of a kind's units at a frame: mean mask in [0, 1], and how many are untouched, shrinking and removed."""
    values = np.concatenate(
        [trace.masks[frame, s] for s, k in zip(trace.spans, trace.kinds, strict=True) if k == kind]
    )
    untouched, removed = int((values == 255).sum()), int((values == 0).sum())
    return {
        "mean": float(values.mean()) / 255,
        "untouched": untouched,
        "shrinking": len(values) - untouched - removed,
        "removed": removed,
    }


def color_of(kind: str, trace: Trace) -> str:
    """Of the kind's units at mask 1, as `#rrggbb`."""
    others = [k for k in trace.kind_names if k not in COLORS]
    return COLORS[kind] if kind in COLORS else OTHER_COLORS[others.index(kind) % len(OTHER_COLORS)]


def ramp(color: str) -> NDArray[np.uint8]:
    """Colour of each mask byte, [256, 3].

    Full at 255 and the colour of removed cells at 0. Between them linear, but with a step at both ends, so that being
    chosen at all and being gone for good are both seen.
    """
    full, gone = _rgb(color), _rgb(REMOVED)
    share = 0.14 + 0.6 * np.arange(256)[:, None] / 255
    share[0], share[255] = 0, 1
    return np.rint(gone + share * (full.astype(float) - gone)).astype(np.uint8)


def grid(units: int, width: int, height: int) -> tuple[int, int]:
    """Rows and size of the largest square cells with which `units` fit into `width` x `height` pixels.

    Rows that leave no ragged end are preferred where that costs less than a quarter of the size.
    """
    found = (1, 1, 0.0)
    for rows in range(1, min(units, height) + 1):
        columns = -(-units // rows)
        cell = min(width // columns, height // rows)
        worth = cell * (1.34 if rows * columns == units else 1.0)
        if worth > found[2]:
            found = (rows, cell, worth)
    return found[0], found[1]


def _rgb(color: str) -> NDArray[np.uint8]:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.uint8)


# -- web page


def page(trace: Trace, heading: str) -> str:
    """One self-contained page with a player: no requests, the same text for the same trace."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    # Unit by unit: what a mask does over time repeats from unit to unit, which halves the page.
    packed = zlib.compress(np.ascontiguousarray(trace.masks.T).tobytes(), 9)
    data = {
        "step": trace.step.tolist(),
        "ratio": [round(float(r), 4) for r in trace.ratio],
        "structures": [
            {"kind": str(k), "layer": int(n), "units": int(u)}
            for k, n, u in zip(trace.kinds, trace.layers, trace.units, strict=True)
        ],
        "kinds": [{"name": k, "label": KIND_LABELS.get(k, k), "color": color_of(k, trace)} for k in trace.kind_names],
        "order": base64.b64encode(fate_order(trace).astype("<u4").tobytes()).decode(),
        "masks": base64.b64encode(packed).decode(),
        "play_s": PLAY_S,
    }
    return environment.get_template("animate.html.j2").render(title=heading, data=data)


def _write_html(trace: Trace, heading: str, path: Path) -> None:
    path.write_text(page(trace, heading), encoding="utf-8")


# -- film


@dataclass(frozen=True)
class Column:
    """Where a film shows one kind: left edge in pixels, rows and size of its cells in pixels, colours by mask."""

    kind: str
    left: int
    rows: int
    cell: int
    colors: NDArray[np.uint8]


def _columns(trace: Trace) -> tuple[list[Column], int]:
    """The columns of a film, wider for kinds with more units, and the height of a layer's row in pixels."""
    most = {k: int(trace.units[trace.kinds == k].max()) for k in trace.kind_names}
    numbers, label = 44, 32
    room = WIDTH - SIDE - 2 * MARGIN - label - numbers * len(most)
    roots = {k: max(n**0.5, 0.18 * sum(m**0.5 for m in most.values())) for k, n in most.items()}
    widths = {k: int(room * root / sum(roots.values())) for k, root in roots.items()}
    layers = len(set(trace.layers.tolist()))
    # Two pixels a cell at least, whatever the film's height becomes.
    height = max(min(72, max(14, 480 // layers)), *(2 * -(-n // (widths[k] // 2)) for k, n in most.items()))
    columns, left, spare = [], MARGIN + label, 0
    for kind in sorted(most, key=lambda k: most[k]):
        # What the cells of one kind leave free goes to the next.
        rows, cell = grid(most[kind], widths[kind] + spare, height)
        used = -(-most[kind] // rows) * cell
        columns.append(Column(kind, left, rows, cell, ramp(color_of(kind, trace))))
        left, spare = left + used + numbers, widths[kind] + spare - used
    return columns, max(c.rows * c.cell for c in columns)


def paint(values: NDArray[np.uint8], column: Column) -> RGB:
    """A structure's masks [units], in the order they are shown, as a block of cells, [R * cell, C * cell, 3]."""
    size = -(-len(values) // column.rows) * column.rows
    colors = np.full((size, 3), _rgb(PAPER))
    colors[: len(values)] = column.colors[values]
    cells_RC3 = colors.reshape(-1, column.rows, 3).transpose(1, 0, 2)
    block = cells_RC3.repeat(column.cell, 0).repeat(column.cell, 1)
    if column.cell >= 4:
        block[column.cell - 1 :: column.cell] = _rgb(PAPER)
        block[:, column.cell - 1 :: column.cell] = _rgb(PAPER)
    return block


class Film:
    """The picture of one frame after the other, on one figure of fixed size."""

    def __init__(self, trace: Trace, heading: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.trace, self.order = trace, fate_order(trace)
        self.columns, self.row = _columns(trace)
        self.layers = sorted({int(n) for n in trace.layers})
        self.pitch = self.row + max(4, self.row // 6)
        cells = self.pitch * len(self.layers)
        # Even, which video needs.
        self.height = (TOP + max(cells, 200 + METER * len(self.columns)) + BOTTOM) // 2 * 2
        self.figure = Figure(figsize=(WIDTH / DPI, self.height / DPI), dpi=DPI, facecolor=PAPER)
        self.canvas = FigureCanvasAgg(self.figure)
        self.cells = self.figure.figimage(self._cells(0), 0, 0, origin="upper", zorder=-1)
        self._text(MARGIN, 30, heading, size=13, weight="bold")
        self.state = self._text(MARGIN, 52, "", color=FAINT)
        self.numbers = [self._number(s) for s in range(len(trace.units))]
        for column in self.columns:
            self._text(column.left, TOP - 24, column.kind, color=color_of(column.kind, trace), weight="bold")
            self._text(column.left, TOP - 9, KIND_LABELS.get(column.kind, ""), size=8, color=FAINT)
        self._text(MARGIN - 6, TOP - 9, "layer", size=8, color=FAINT)
        for layer in self.layers:
            self._text(MARGIN + 20, self._top(layer) + self.row / 2 + 4, str(layer), color=FAINT, ha="right")
        self._legend()
        self._curve()
        self.meters = [self._meter(n, k) for n, k in enumerate(trace.kind_names)]

    def draw(self, frame: int) -> RGB:
        """The picture of `frame`, [height, width, 3]."""
        self.show_(frame)
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def show_(self, frame: int) -> None:
        """Put `frame` on the figure, to be rendered by whoever writes it."""
        trace, done = self.trace, slice(0, frame + 1)
        self.cells.set_data(self._cells(frame))
        for text, span in zip(self.numbers, trace.spans, strict=True):
            text.set_text(f"{trace.masks[frame, span].sum() / 255:,.0f}")
        self.path.set_data(trace.step[done], trace.ratio[done])
        self.dot.set_data(trace.step[frame : frame + 1], trace.ratio[frame : frame + 1])
        self.state.set_text(f"step {trace.step[frame]:,} of {trace.step[-1]:,}, ratio {trace.ratio[frame]:.3f}")
        for (bar, share, count), kind in zip(self.meters, trace.kind_names, strict=True):
            found = shares(trace, kind, frame)
            bar.set_width(found["mean"] * (SIDE - 2 * MARGIN) / WIDTH)
            share.set_text(f"{100 * found['mean']:.0f} %")
            count.set_text(textwrap.fill(describe(found), COUNTS_WIDTH))

    def _cells(self, frame: int) -> RGB:
        picture = np.full((self.height, WIDTH, 3), _rgb(PAPER))
        columns = {c.kind: c for c in self.columns}
        for kind, layer, span in zip(self.trace.kinds, self.trace.layers, self.trace.spans, strict=True):
            column = columns[str(kind)]
            block = paint(self.trace.masks[frame, self.order[span]], column)
            top = self._top(int(layer)) + (self.row - len(block)) // 2
            picture[top : top + len(block), column.left : column.left + block.shape[1]] = block
        return picture

    def _top(self, layer: int) -> int:
        return TOP + self.pitch * self.layers.index(layer)

    def _text(self, x: float, y: float, text: str, *, size: float = 9, color: str = INK, **more: Any) -> Any:
        """Text whose baseline starts `x` pixels from the left and `y` from the top; a `$` in it is no formula."""
        place = (x / WIDTH, 1 - y / self.height)
        return self.figure.text(*place, text, fontsize=size, color=color, parse_math=False, **more)

    def _number(self, structure: int) -> Any:
        column = next(c for c in self.columns if c.kind == self.trace.kinds[structure])
        shown = -(-int(self.trace.units[structure]) // column.rows) * column.cell
        y = self._top(int(self.trace.layers[structure])) + self.row / 2 + 4
        return self._text(column.left + shown + 6, y, "", size=9, color=INK)

    def _legend(self) -> None:
        """What the colours say, under the cells."""
        x, y = MARGIN + 26, self.height - 22
        for text, share in (("untouched (mask 1)", 255), ("chosen, shrinking", None), ("removed (mask 0)", 0)):
            values = np.array([share] * 6 if share is not None else [250, 200, 150, 100, 50, 5], dtype=np.uint8)
            picture = np.concatenate(
                [c.colors[values][None].repeat(max(2, 12 // len(self.columns)), 0) for c in self.columns]
            ).repeat(6, 1)
            self.figure.figimage(picture, x, self.height - y, origin="upper")
            self._text(x + 44, y - 1, text, size=8, color=FAINT)
            x += 180
        self._text(x, y - 1, "numbers: sum of masks", size=8, color=FAINT)

    def _curve(self) -> None:
        left, width, height = (WIDTH - SIDE + MARGIN + 18) / WIDTH, (SIDE - 2 * MARGIN - 18) / WIDTH, 130
        axes = self.figure.add_axes((left, 1 - (TOP + height) / self.height, width, height / self.height))
        axes.plot(self.trace.step, self.trace.ratio, color=REMOVED, linewidth=2)
        (self.path,) = axes.plot([], [], color=INK, linewidth=1.6)
        (self.dot,) = axes.plot([], [], "o", color=INK, markersize=6, clip_on=False)
        axes.set_ylim(0, max(0.1, 1.12 * float(self.trace.ratio.max())))
        axes.set_title("ratio: share chosen for removal", fontsize=9, loc="left", color=INK)
        axes.set_xlabel("step", fontsize=8, color=FAINT)
        axes.tick_params(labelsize=8, colors=FAINT)
        axes.locator_params(nbins=4)
        axes.spines[["top", "right"]].set_visible(False)

    def _meter(self, index: int, kind: str) -> tuple[Any, Any, Any]:
        """A bar for the mean mask of a kind, its number, and a line of counts."""
        from matplotlib.patches import Rectangle

        left, y = WIDTH - SIDE + MARGIN, TOP + 130 + 82 + METER * index
        color, width = color_of(kind, self.trace), SIDE - 2 * MARGIN
        self._text(left, y - 18, f"{kind}: mean mask", color=INK)
        bars = [
            Rectangle((left / WIDTH, 1 - (y - 2) / self.height), share / WIDTH, 10 / self.height, color=fill)
            for share, fill in ((width, REMOVED), (0, color))
        ]
        for bar in bars:
            self.figure.add_artist(bar)
        share = self._text(left + width, y - 18, "", ha="right", weight="bold", color=color)
        return bars[1], share, self._text(left, y + 5, "", size=8, color=FAINT, va="top")


def describe(found: dict[str, float]) -> str:
    """Counts of a kind in words, no number parted from its own; what there is none of is left out."""
    names = ("untouched", "shrinking", "removed")
    return ", ".join(f"{found[name]:,}\N{NO-BREAK SPACE}{name}" for name in names if found[name])


def seconds_per_frame(frames: int) -> float:
    """So that a film of so many frames lasts about PLAY_S, but never crawls."""
    return min(0.5, PLAY_S / frames)


def _write_gif(trace: Trace, heading: str, path: Path) -> None:
    from PIL import Image

    film, last = Film(trace, heading), len(trace.step) - 1
    chosen = [int(n) for n in np.unique(np.rint(np.linspace(0, last, min(GIF_FRAMES, last + 1))))]
    # Not matplotlib's writer: it repeats the last frame for a pause.
    images = [Image.fromarray(film.draw(frame)).quantize(256, dither=Image.Dither.NONE) for frame in chosen]
    # GIF counts in hundredths of a second.
    each, pause = max(2, round(100 * seconds_per_frame(len(images)))) * 10, round(1000 * PAUSE_S)
    durations = [each] * (len(images) - 1) + [pause]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def _write_mp4(trace: Trace, heading: str, path: Path) -> None:
    from matplotlib.animation import FFMpegWriter

    if not FFMpegWriter.isAvailable():
        raise UpopError(f"out {path.suffix}: writing MP4 needs ffmpeg, which is not installed; install it or use .gif")
    film, frames = Film(trace, heading), len(trace.step)
    rate = round(1 / seconds_per_frame(frames))
    writer = FFMpegWriter(fps=rate, codec="libx264", extra_args=["-pix_fmt", "yuv420p", "-crf", "18"])
    try:
        with writer.saving(film.figure, str(path), DPI):
            for frame in [*range(frames), *[frames - 1] * round(PAUSE_S * rate)]:
                film.show_(frame)
                writer.grab_frame()
    except subprocess.CalledProcessError as error:
        raise UpopError(
            f"out {path.suffix}: ffmpeg failed (exit {error.returncode}), perhaps without libx264; use .gif"
        ) from error
