"""The report: its data, its figures and the page."""

import dataclasses
import json
import math
import os
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comcat.errors import ComcatError, NumericsError, SettingsError, StoreError
from comcat.report import (
    ReportData,
    SiteRow,
    Spectrum,
    figure_curves,
    figure_parameters_for_energy,
    figure_ranks,
    figure_spectra,
    progress_series,
    rank_for_energy,
    render,
    search_series,
    tuning_series,
    wording,
    write,
)
from comcat.report.figures import parameters_for_energy, rank_panels
from comcat.report.history import POINTS, search_facts, tuning_facts
from comcat.report.tables import blocks

VOID = {"meta", "link", "br", "img", "hr", "input", "col", "wbr"}


@pytest.fixture
def plain_figures() -> None:
    """In this file figures are drawn."""


HOSTILE = "</title><script>alert('$x_{')</script>&<b \"q\">"


def spectrum(layer="blocks.0.attn", matrix="QK", head=0, values=(4.0, 3.0, 2.0, 1.0), cost=10):
    return Spectrum(layer=layer, matrix=matrix, head=head, singular_values=values, parameters_per_rank=cost)


def site(name="blocks.0.attn:qk", kind="qk", keep=3, full=8, before=800, after=300, loss=None, note="", **more):
    form = None if keep is None else "units" if kind == "units" else "product"
    return SiteRow(
        name=name,
        kind=kind,
        form=more.pop("form", form),
        keep=keep,
        full=full,
        parameters_before=before,
        parameters_after=after,
        predicted_loss=loss,
        note=note,
        **more,
    )


def empty(**changes):
    """A report of which nothing is known but what ``changes`` says."""
    nothing = ReportData(
        title="A report",
        model="",
        created="",
        command=None,
        settings={},
        environment={},
        before={},
        after={},
        agreement={},
        predicted_loss=None,
        measured_loss=None,
        sites=(),
        spectra=(),
        notes=(),
    )
    return dataclasses.replace(nothing, **changes)


def full(depth=2, heads=2, width=4, cost=10):
    """A report in which every part is present."""
    sites = []
    for block in range(depth):
        for kind in ("qk", "vo"):
            sites.append(site(f"blocks.{block}.attn:{kind}", kind, keep=2 + block % 2, full=width, loss=0.01))
        sites.append(site(f"blocks.{block}.mlp.fc1", "linear", keep=5, full=16))
        sites.append(site(f"blocks.{block}.mlp.fc2", "linear", keep=None, full=16, after=800, note="too costly"))
    sites.append(site("head", "linear", keep=4, full=16))
    spectra = tuple(
        spectrum(
            f"blocks.{block}.attn", matrix, head, tuple(math.exp(-k * (1 + head) / width) for k in range(width)), cost
        )
        for block in range(depth)
        for head in range(heads)
        for matrix in ("W_Q", "W_K", "W_V", "W_O", "QK", "VO")
    )
    return empty(
        title="DeiT-small at half its size",
        model="deit_small_patch16_224",
        created="2026-11-03T14:20:11+00:00",
        command="comcat compress deit_small --budget 0.5",
        settings={"method": "search", "tune": {"lr": 1e-4, "warmup": None}, "betas": [0.9, 0.999], "fused": True},
        environment={"torch": "2.15.0"},
        before={"parameters": 22_050_000, "macs": 4.608e9, "top1": 79.8, "throughput": 974.0, "latency_s": 0.0131},
        after={"parameters": 11_029_000, "macs": 2.248e9, "top1": 79.27, "throughput": 1513.0, "latency_s": 0.0085},
        agreement={"agreement": 92.3, "cosine": 0.987, "count": 50_000},
        predicted_loss=0.02,
        measured_loss=0.03,
        sites=tuple(sites),
        spectra=spectra,
        notes=("The value bias folds into the output bias.",),
        curves={"Learning": [{"x": [0, 1, 2], "y": [0.1, None, 0.3], "label": "top-1", "x_label": "epoch"}]},
    )


SEARCH = {
    "settings": {
        "reduce": 0.6, "budget": "parameters", "beta": 1.5, "penalty": "always", "candidates": (), "grid": "near",
        "held_out": 0.2,
        "rounds": 2, "rank_steps": 2, "weight_steps": 1, "batch_size": 10,
    },
    "curve": [
        {"step": 1, "round": 0, "loss": 4.0, "cross_entropy": 2.0, "cost": 0.8},
        {"step": 2, "round": 0, "loss": 3.0, "cross_entropy": 1.5, "cost": 0.6, "top1": 50.0},
        {"step": 3, "round": 0, "loss": 1.4, "cross_entropy": 1.4, "cost": 0.5},
        {"step": 4, "round": 1, "loss": 1.6, "cross_entropy": 1.3, "cost": 0.45},
        {"step": 5, "round": 1, "loss": 1.2, "cross_entropy": 1.1, "cost": 0.41, "top1": 60.0},
    ],
}  # fmt: skip


def tuning(lines=4, **changes):
    """A tuning run of two epochs with an evaluation after each, as its record has it."""
    curve = [
        {"step": i, "epoch": 2 * i / lines, "lr": 1e-4 / i, "loss": 1 / i, "label_loss": 2 / i,
            "distillation_loss": 0.5, "train_top1": 10.0 * i}
        for i in range(1, lines + 1)
    ]  # fmt: skip
    curve[lines // 2 - 1] |= {"top1": 70.0, "eval_loss": 0.7}
    curve[-1] |= {"top1": 75.0, "eval_loss": 0.6}
    settings = {"distillation": "hard", "batch_size": 256, "lr": 1e-4, "min_lr": 1e-6, "weight_decay": 0.005}
    result = {
        "settings": settings, "teacher": "timm:deit_small_patch16_224", "curve": curve, "seconds": 3725.0,
        "images_per_second": 1512.7,
        "before": {"count": 100, "top1": 65.0, "loss": 0.9}, "after": {"count": 100, "top1": 75.0, "loss": 0.6},
        "best": {"step": lines, "top1": 75.0},
    }  # fmt: skip
    return {**result, **changes}


def tuned():
    """The report of a model that was searched, compressed and tuned."""
    made_by = {"search": SEARCH, "saved": 0.605}
    return dataclasses.replace(
        full(),
        between={"parameters": 11_029_000, "macs": 2.248e9, "top1": 70.11},
        curves={"Search of ranks": search_series(SEARCH), "Tuning": tuning_series(tuning())},
        facts={"Search of ranks": search_facts(made_by), "Tuning": tuning_facts(tuning())},
    )


class Page(HTMLParser):
    """What a reader of the page sees, and whether its tags balance."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.resources, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs, closed=False):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        self.resources += [value for key, value in attrs if key in ("src", "href", "xlink:href", "data", "action")]
        if tag not in VOID and not closed:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs, closed=True)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture(scope="module")
def page_text():
    return render(full())


@pytest.fixture(scope="module")
def page(page_text):
    return Page(page_text)


# rank_for_energy


def test_rank_for_energy_takes_the_sum_not_the_squares():
    values = (4.0, 3.0, 2.0, 1.0)  # sums 4, 7, 9, 10; of squares 16, 25, 29, 30
    assert [rank_for_energy(values, share) for share in (0.1, 0.4, 0.41, 0.7, 0.9, 0.91, 1.0)] == [1, 1, 2, 2, 3, 4, 4]


def test_rank_for_energy_is_exact_for_round_shares():
    assert [rank_for_energy([1.0] * 100, share / 100) for share in range(1, 101)] == list(range(1, 101))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), max_size=40), st.floats(0.001, 1))
def test_rank_for_energy_is_the_smallest_that_suffices(values, energy):
    values = sorted(values, reverse=True)
    rank = rank_for_energy(values, energy)
    assert 0 <= rank <= len(values)
    total = math.fsum(values)
    assert math.fsum(values[:rank]) >= energy * total * (1 - 1e-9)
    if rank > 0:
        assert math.fsum(values[: rank - 1]) < energy * total * (1 + 1e-9)


@pytest.mark.parametrize("values", [(), (0.0, 0.0)])
def test_rank_for_energy_of_nothing_is_zero(values):
    assert rank_for_energy(values, 0.9) == 0


def test_rank_for_energy_survives_huge_and_tiny_values():
    assert rank_for_energy([1e308] * 10, 0.5) == 5
    assert rank_for_energy([5e-324] * 10, 0.5) == 5


@pytest.mark.parametrize("energy", [0, -1, 1.1, math.nan])
def test_rank_for_energy_refuses_a_share_outside_its_range(energy):
    with pytest.raises(SettingsError, match="energy"):
        rank_for_energy([1.0], energy)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_values_that_are_no_singular_values_are_refused(bad):
    with pytest.raises(NumericsError):
        rank_for_energy([1.0, bad], 0.9)
    with pytest.raises(NumericsError, match=r"blocks\.0\.attn W_Q head 3"):
        spectrum(matrix="W_Q", head=3, values=(1.0, bad))


# Data


def test_wrong_names_are_refused_with_the_nearest():
    with pytest.raises(SettingsError, match="did you mean 'W_Q'"):
        spectrum(matrix="WQ")
    with pytest.raises(SettingsError, match="did you mean 'linear'"):
        site(kind="linea")


def test_spectra_out_of_order_or_without_cost_are_refused():
    with pytest.raises(SettingsError, match="largest first"):
        spectrum(values=(1.0, 2.0))
    with pytest.raises(SettingsError, match="parameters_per_rank"):
        spectrum(cost=0)
    spectrum(values=(1.0, 1.0 + 1e-9))  # rounding is no disorder


@pytest.mark.parametrize(
    "series", [{"x": [1, 2], "y": [1]}, {"x": [1]}, {"x": 1, "y": 2}, {"x": ["a"], "y": [1]}, {"x": "1", "y": "2"}, 7]
)
def test_malformed_curves_are_refused(series):
    with pytest.raises(SettingsError, match="'Learning'"):
        empty(curves={"Learning": [series]})


def test_json_round_trip():
    data = full()
    assert ReportData.from_json(data.to_json()) == data
    assert ReportData.from_json(empty().to_json()) == empty()
    assert ReportData.from_json(tuned().to_json()) == tuned()
    unsound = empty(between={"loss": math.inf}, facts={"Tuning": {"Teacher": "nan"}})
    assert ReportData.from_json(unsound.to_json()) == unsound


def test_json_holds_numbers_that_json_has_not():
    data = empty(
        before={"loss": 0.5}, after={"loss": math.inf, "top1": math.nan}, curves={"c": [{"x": [1], "y": [math.nan]}]}
    )
    text = data.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = ReportData.from_json(text)
    assert back.after["loss"] == math.inf
    assert math.isnan(back.after["top1"]) and math.isnan(back.curves["c"][0]["y"][0])


def test_json_of_values_that_json_does_not_know(tmp_path):
    numpy = pytest.importorskip("numpy")
    text = empty(settings={"path": tmp_path, "size": (1, 2)}, after={"top1": numpy.float32(0.5)}).to_json()
    back = ReportData.from_json(text)
    assert back.settings == {"path": str(tmp_path), "size": [1, 2]}
    assert back.after == {"top1": 0.5}


def test_damaged_json_is_refused():
    document = json.loads(full().to_json())
    damaged = {
        "not JSON": "{",
        "not a report": "[]",
        "version": json.dumps({**document, "version": 99}),
        "did you mean 'title'": json.dumps({**document, "titel": "x"}),
        "without its field 'model'": json.dumps({key: value for key, value in document.items() if key != "model"}),
        "SiteRow": json.dumps({**document, "sites": [{"name": "x"}]}),
        "damaged": json.dumps({**document, "spectra": 3}),
        "expected an object of Spectrum": json.dumps({**document, "spectra": [3]}),
        "damaged: ": json.dumps({**document, "curves": None}),
    }
    for message, text in damaged.items():
        with pytest.raises(StoreError, match=message):
            ReportData.from_json(text)


# Units


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (wording.scaled(22_050_664), "22.05 M"),
        (wording.scaled(999_960), "1 M"),
        (wording.scaled(999), "999"),
        (wording.scaled(4.608e9), "4.608 G"),
        (wording.size(88.2e6), "84.11 MiB"),
        (wording.size(5e15), "4,547 TiB"),
        (wording.duration(0.01312), "13.1 ms"),
        (wording.duration(0.9996), "1 s"),
        (wording.duration(0.0009996), "1 ms"),
        (wording.duration(3.2e-5), "32 µs"),
        (wording.duration(999.7), "1,000 s"),
        (wording.rate(1512.7), "1,513 images/s"),
        (wording.elapsed(45.24), "45.2 s"),
        (wording.elapsed(59.7), "1 min 0 s"),
        (wording.elapsed(725), "12 min 5 s"),
        (wording.elapsed(12_300), "3 h 25 min"),
        (wording.elapsed(0), "0 s"),
        (wording.plain(-0.25), "−0.25"),
        (wording.signed(-0.0001, 2), "0.00"),
        (wording.change(80.0, 79.5, wording.METRICS["top1"]), "−0.50 points"),
        (wording.change(200, 100, wording.METRICS["parameters"]), "−50.0 %"),
        (wording.change(0, 100, wording.METRICS["parameters"]), ""),
        (wording.ratio(200, 100, wording.METRICS["latency_s"]), "2.00× faster"),
        (wording.ratio(100, 200, wording.METRICS["throughput"]), "2.00× faster"),
        (wording.ratio(100, 200, wording.METRICS["parameters"]), "2.00× larger"),
        (wording.ratio(79.0, 80.0, wording.METRICS["top1"]), ""),
        (wording.cell(math.nan, wording.METRICS["loss"]), "not finite"),
        (wording.cell(2048, wording.metric("cache_bytes")), "2 KiB"),
        (wording.metric("calibration_error_percent").label, "Calibration error"),
    ],
)
def test_units(shown, expected):
    assert shown.replace(wording.SPACE, " ") == expected


# Figures


def test_parameters_for_energy_sums_over_heads_and_pairs():
    spectra = [
        spectrum(matrix="W_Q", head=0, cost=10),  # 90 % of (4, 3, 2, 1) needs rank 3
        spectrum(matrix="W_Q", head=1, values=(1.0, 0.0, 0.0, 0.0), cost=10),
        spectrum(matrix="W_K", head=0, values=(1.0, 1.0, 1.0, 1.0), cost=5),
        spectrum(matrix="QK", head=0, values=(9.0, 1.0), cost=7),
        spectrum(matrix="W_V", head=0),
    ]
    assert parameters_for_energy(spectra, 0.9) == {
        "QK": {"blocks.0.attn": 7},
        "W_Q+W_K": {"blocks.0.attn": 3 * 10 + 1 * 10 + 4 * 5},
    }


def test_figure_spectra_shows_cumulative_shares():
    figure = figure_spectra([spectrum(head=0), spectrum(head=1, values=(1.0, 0.0, 0.0, 0.0))])
    panel = next(axis for axis in figure.axes if axis.images)
    picture = panel.images[0].get_array()
    columns = picture.shape[1]
    assert picture.shape[0] == 2
    assert picture[0, columns // 4 - 1] == pytest.approx(0.4)
    assert picture[0, columns // 2 - 1] == pytest.approx(0.7)
    assert picture[0, -1] == pytest.approx(1)
    assert picture[1, columns // 4 - 1] == pytest.approx(1)
    marks = panel.lines[0].get_xdata()
    assert list(marks[::3]) == [75, 25]  # ranks 3 and 1 of 4 hold 90 %


def test_figure_spectra_shares_one_scale_among_panels_of_any_width():
    spectra = [
        spectrum(matrix="W_O", head=None, values=(1.0,) * 97),
        spectrum(matrix="QK"),
        spectrum(matrix="VO", head=7),
    ]
    figure = figure_spectra(spectra, columns=2)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in figure.axes if axis.images] == ["W_O", "QK = W_Q W_Kᵀ", "VO = W_V W_O"]
    assert {image.get_clim() for image in images} == {(0, 1)}
    assert images[0].get_array()[0, 31] == pytest.approx(0.5)


def test_figure_spectra_orders_rows_by_layer_and_head():
    sharp, flat = (1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)
    layers = ("blocks.0.attn", "blocks.1.attn")
    spectra = [spectrum(layer, head=head, values=flat if head else sharp) for head in (1, 0) for layer in layers]
    panel = figure_spectra(spectra).axes[0]
    assert list(panel.images[0].get_array()[:, 15].round(2)) == [1, 0.25, 1, 0.25]
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["0", "1"]


def test_figure_parameters_compares_both_families():
    figure = figure_parameters_for_energy(full().spectra)
    assert [axis.get_title() for axis in figure.axes] == ["W_Q, W_K against QK", "W_V, W_O against VO"]
    apart, joint = figure.axes[0].lines
    assert list(apart.get_ydata()) == [2 * value for value in joint.get_ydata()]  # the same spectra, two matrices
    only = figure_parameters_for_energy([spectrum(matrix="QK")])
    assert [axis.get_title() for axis in only.axes] == ["QK"]


def test_figure_ranks_draws_rank_outline_and_dense():
    figure = figure_ranks(full().sites)
    assert [axis.get_title() for axis in figure.axes] == ["QK", "VO", "mlp.fc1", "mlp.fc2", "Other layers"]
    query_key, dense = figure.axes[0], figure.axes[3]
    assert [bar.get_height() for bar in query_key.patches] == [2, 3, 4, 4]  # kept, then the outlines
    assert [bar.get_height() for bar in dense.patches] == [0, 0, 16, 16, 16, 16]
    assert [text.get_text() for text in query_key.get_xticklabels()] == ["0", "1"]


def test_rank_panels_tell_towers_apart():
    names = [f"{tower}.layers.{layer}.attn:qk" for tower in ("text", "vision") for layer in range(2)]
    panels = rank_panels([site(name) for name in names])
    assert {title: [row.name for row in rows] for title, rows in panels.items()} == {
        "QK, text": names[:2],
        "QK, vision": names[2:],
    }
    ticks = figure_spectra([spectrum(name.removesuffix(":qk")) for name in names]).axes[0].get_yticklabels()
    assert [tick.get_text() for tick in ticks] == ["text.0", "text.1", "vision.0", "vision.1"]


def test_a_block_that_is_heard_of_last_stands_in_its_place():
    layers = [site(f"blocks.{n}.attn:qk", block=f"blocks.{n}", role="attention") for n in (0, 2, 10)]
    tokens = [
        site(f"blocks.{n}:tokens", "tokens", form="similar", block=f"blocks.{n}", role="tokens") for n in (0, 1, 2, 10)
    ]
    in_place = ["blocks.0", "blocks.1", "blocks.2", "blocks.10"]
    assert [row["name"] for row in blocks([*layers, *tokens])["rows"]] == in_place
    panels = figure_ranks([*layers, *tokens]).axes
    assert [[tick.get_text() for tick in panel.get_xticklabels()] for panel in panels] == [["0", "1", "2", "10"]] * 2
    assert wording.in_order(["b.1", "a.3", "b.0", "a.2", "b.1"]) == ["b.0", "a.2", "b.1", "a.3"]


def test_nested_layer_numbers_label_the_ticks():
    figure = figure_ranks([site(f"layers.{stage}.blocks.{block}.attn:qk") for stage in range(2) for block in range(2)])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0.0", "0.1", "1.0", "1.1"]


def test_figure_curves_leaves_gaps():
    line = figure_curves([{"x": [0, 1, 2], "y": [1.0, None, 3.0], "label": "a"}]).axes[0].lines[0]
    assert math.isnan(line.get_ydata()[1]) and line.get_ydata()[2] == 3
    many = figure_curves([{"x": [0, 1], "y": [0, 1]}] * 14).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in many}) == 14


def test_figure_curves_has_a_panel_for_every_quantity():
    series = [
        {"x": [0, 1], "y": [2, 1], "label": "a", "y_label": "loss"},
        {"x": [0, 1], "y": [3, 2], "label": "b", "y_label": "loss"},
        {"x": [0, 1], "y": [40, 50], "label": "b", "y_label": "top-1", "x_label": "epoch"},
        {"x": [0, 1], "y": [45, 45], "label": "goal", "y_label": "top-1", "reference": True},
    ]
    figure = figure_curves(series)
    loss, accuracy = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["loss", "top-1"]
    assert accuracy.get_xlabel() == "epoch"
    assert loss.lines[1].get_color() == accuracy.lines[0].get_color() != loss.lines[0].get_color()
    assert accuracy.lines[1].get_linestyle() == "--" and accuracy.lines[1].get_color() != accuracy.lines[0].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "goal"]


def test_figure_curves_marks_points_that_no_line_would_show():
    y = [1.0] * 40 + [None, 2.0, math.nan, 3.0, 4.0]
    line = figure_curves([{"x": list(range(45)), "y": y}]).axes[0].lines[0]
    assert line.get_markevery() == [41]
    few = figure_curves([{"x": [0, 1, 2], "y": [1, None, 2]}]).axes[0].lines[0]
    assert few.get_markevery() == [0, 2]


@pytest.mark.parametrize("draw", [figure_spectra, figure_parameters_for_energy, figure_ranks, figure_curves])
def test_nothing_to_draw_is_said(draw):
    with pytest.raises(SettingsError, match="to draw"):
        draw([])


def test_figures_are_saved_by_others_and_leave_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure_ranks(full().sites).savefig(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("part", [{"spectra": full().spectra}, {"sites": full().sites}, {"curves": full().curves}])
def test_without_matplotlib_a_page_has_its_tables_and_names_the_extra(monkeypatch, part):
    """A run of hours must not end without a report because figures cannot be drawn."""
    assert "comcat[report]" not in render(empty(**part))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = render(empty(**part))
    assert "comcat[report]" in page and "<svg" not in page
    assert "comcat[report]" not in render(empty()), "nothing to draw, nothing missing"
    with pytest.raises(ComcatError, match=r"comcat\[report\]"):
        figure_ranks(full().sites)


def test_missing_jinja_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ComcatError, match=r"comcat\[report\]"):
        render(empty())


# Search and tuning


def by_label(series):
    return {(one["y_label"], one["label"]): one for one in series}


def test_search_series_show_cost_only_while_ranks_are_learned():
    series = by_label(search_series(SEARCH))
    cost = "expected cost, % of all parameters"
    assert series[cost, "expected cost"]["x"] == [1, 2, 3, 4, 5]
    assert series[cost, "expected cost"]["y"] == [80, 60, None, 45, 41]
    budget = series[cost, "budget"]
    assert budget["reference"] and budget["x"] == [1, 5] and budget["y"] == [40, 40]
    assert series["loss", "cross-entropy"]["y"] == [2, 1.5, 1.4, 1.3, 1.1]
    assert series["loss", "with the cost factor (Eq. 6)"]["y"] == [4, 3, None, 1.6, 1.2]
    rounds = series["held-out top-1, %", "at a round's end"]
    assert (rounds["x"], rounds["y"]) == ([2, 5], [50, 60])


def test_searches_to_compare_have_one_label_each():
    series = search_series(SEARCH, "β = 2")
    assert [one["label"] for one in series] == ["β = 2", "budget", "β = 2", "β = 2"]
    assert len({one["y_label"] for one in series}) == 3
    macs = {**SEARCH, "settings": {**SEARCH["settings"], "budget": "macs", "weight_steps": 0}}
    assert search_series(macs)[0]["y_label"].endswith("MACs")
    assert None not in search_series(macs)[0]["y"]


def test_tuning_series_begin_before_the_first_step():
    series = by_label(tuning_series(tuning()))
    assert set(series) == {
        *(("loss", label) for label in ("training", "labels", "distillation", "evaluation")),
        ("top-1, %", "training"),
        ("top-1, %", "evaluation"),
        ("learning rate", "training"),
    }
    evaluated = series["top-1, %", "evaluation"]
    assert (evaluated["x"], evaluated["y"]) == ([0, 1, 2], [65, 70, 75])
    assert series["loss", "evaluation"]["y"] == [0.9, 0.7, 0.6]
    assert series["top-1, %", "training"]["x"] == [0.5, 1, 1.5, 2]


def test_a_long_log_is_averaged_and_evaluations_are_not():
    series = by_label(tuning_series(tuning(lines=4 * POINTS, before=None)))
    line = series["top-1, %", "training"]
    assert len(line["x"]) == POINTS
    assert line["y"][0] == pytest.approx(25)  # the mean of 10, 20, 30 and 40
    assert line["x"][0] == pytest.approx(2.5 * 2 / (4 * POINTS))
    assert series["top-1, %", "evaluation"]["x"] == [1, 2]


def test_the_only_part_of_a_loss_is_not_drawn_twice():
    lines = [{"step": 1, "epoch": 1.0, "lr": 0.1, "loss": 1.0, "feature_loss": 1.0, "cosine": 0.9}]
    series = by_label(tuning_series(tuning(curve=lines, before={"cosine": 0.8})))
    assert set(series) == {("loss", "training"), ("cosine to the teacher", "evaluation"), ("learning rate", "training")}
    assert series["cosine to the teacher", "evaluation"]["y"] == [0.8, 0.9]


def test_progress_counts_the_epochs_of_the_search():
    series = by_label(
        progress_series("search", {"search": SEARCH, "saved": 0.6}, tuning(), parameters=20_000_000, pictures=100)
    )
    held_out = series["top-1, %", "search, held-out training pictures"]
    assert held_out["x"] == pytest.approx([0.2, 0.5]) and held_out["y"] == [50, 60]
    evaluated = series["top-1, %", "search"]
    assert evaluated["x"] == pytest.approx([0.5, 1.5, 2.5]) and evaluated["y"] == [65, 70, 75]
    size = series["parameters, millions", "search"]
    assert size["x"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 2.5])
    assert size["y"] == pytest.approx([16, 12, None, 9, 8.2, 8, 8])


def test_progress_of_ranks_set_by_hand_begins_with_tuning():
    series = by_label(progress_series("uniform", {"saved": 0.5}, tuning(), parameters=20_000_000, pictures=100))
    assert set(series) == {("top-1, %", "uniform"), ("parameters, millions", "uniform")}
    size = series["parameters, millions", "uniform"]
    assert (size["x"], size["y"]) == ([0, 2], [10, 10])


def test_facts_say_who_taught_and_how_long():
    facts = {name: text.replace(wording.SPACE, " ") for name, text in tuning_facts(tuning()).items()}
    assert facts["Teacher"] == "timm:deit_small_patch16_224 (hard distillation)"
    assert facts["Length"] == "2 epochs, 4 steps of 256 pictures"
    assert facts["Throughput while training"] == "1,513 images/s"
    assert facts["Took"].startswith("1 h 2 min")
    alone = tuning(teacher=None, images_per_second=None, best=None)
    assert set(facts) - set(tuning_facts(alone)) == {"Throughput while training", "Best top-1 on the way"}
    assert tuning_facts(alone)["Teacher"] == "none"
    assert search_facts({"search": SEARCH, "saved": 0.605})["Saved"].startswith("60.50")


@pytest.fixture(scope="module")
def digits():
    from comcat import open_pictures
    from comcat.data import Preprocess

    return open_pictures("digits:train").take(40, 0), Preprocess(size=(32, 32), mean=(0.3,), std=(0.4,))


def tuned_model(digits, plan=None, **settings):
    """A tiny model, the same compressed and tuned, and how that came about."""
    from comcat import batches, evaluate
    from comcat.methods.compress import CompressSettings, compress_
    from comcat.tuning.settings import TuneSettings
    from comcat.tuning.tune import tune_

    from .models import tiny_vit

    pictures, preprocess = digits
    before, small = tiny_vit(num_classes=10), tiny_vit(num_classes=10)
    loader = batches(pictures, preprocess, batch_size=20)
    done = compress_(small, loader, CompressSettings(statistic="activation", pictures=20, reduce=0.5), plan=plan)
    compressed = evaluate(small, loader, against=before)
    how = TuneSettings(batch_size=20, crop_scale=None, **settings)
    tune_(small, pictures, how, teacher=before, evaluation=pictures, preprocess=preprocess)
    after = evaluate(small, loader, against=before)
    return before, small, done, (evaluate(before, loader), compressed, after)


def test_a_searched_and_tuned_model_is_reported_on(digits):
    from comcat.methods.search import search
    from comcat.report.collect import collect, collect_tuning

    from .models import tiny_vit

    plan = search(
        tiny_vit(num_classes=10), digits[0], preprocess=digits[1], reduce=0.5, rounds=1, rank_steps=2, batch_size=8,
        pictures=16, statistic="activation",
    )  # fmt: skip
    before, small, done, (first, compressed, last) = tuned_model(digits, plan, steps=4, log_every=1)
    told = {"title": "A report", "model": "tiny"}
    report = collect(before, small, done, **told, evaluations=(first, last), compressed=compressed)
    assert ReportData.from_json(report.to_json()).between == report.between
    assert report.before["top1"] == first.top1 and report.after["top1"] == last.top1
    assert report.between["top1"] == compressed.top1 and report.between["loss"] == compressed.loss
    assert report.between["parameters"] == report.after["parameters"] < report.before["parameters"]
    assert report.measured_loss == compressed.divergence  # what compression lost, not what tuning left
    assert list(report.curves) == list(report.facts) == ["Search of ranks", "Tuning"]
    assert "curve" not in json.dumps(report.settings) and report.settings["plan.search"]["rank_steps"] == 2
    assert "soft distillation" in report.facts["Tuning"]["Teacher"]

    later = collect_tuning(small, **told)
    assert later.before["parameters"] == report.after["parameters"] and later.between == {}
    assert later.before["top1"] == compressed.top1 and later.after["top1"] == pytest.approx(last.top1)
    assert list(later.curves) == ["Search of ranks", "Tuning"]
    results = dataclasses.replace(small.comcat_record.results, before=report.before, after=report.after)
    small.comcat_record = dataclasses.replace(small.comcat_record, results=results)
    whole = collect_tuning(small, **told, example=torch.zeros(1, 3, 32, 32))
    assert whole.after["macs"] == report.after["macs"]
    assert whole.before == {k: v for k, v in report.before.items() if k in ("parameters", "macs", "size_bytes")}
    assert whole.between["top1"] == compressed.top1 and "maybe on other pictures" in whole.notes[0]
    text = Page(render(dataclasses.replace(whole, curves={}))).text.replace(wording.SPACE, " ")
    assert "Before Compressed Tuned Change Ratio" in text
    assert f"{compressed.top1:.2f} → {last.top1:.2f} %" in text


def test_a_model_that_was_not_tuned_has_no_tuning_to_report(digits):
    from comcat.report.collect import collect, collect_tuning

    before, small, done, (first, _, last) = tuned_model(digits, steps=0)
    report = collect(before, small, done, title="A report", model="tiny", evaluations=(first, last))
    assert (report.between, report.curves, report.facts) == ({}, {}, {})
    assert report.measured_loss == last.divergence
    for model in (before, small):
        with pytest.raises(SettingsError, match="no record of a tuning run"):
            collect_tuning(model, title="A report", model="tiny")


# The page


def test_page_is_well_formed(page_text, page):
    assert page_text.startswith("<!DOCTYPE html>")
    tags = dict(page.tags[::-1])
    assert tags["html"]["lang"] == "en"
    assert any(attrs.get("name") == "viewport" for tag, attrs in page.tags if tag == "meta")
    assert len(page.ids) == len(set(page.ids))
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_page_refers_to_nothing_outside(page_text, page):
    assert page.resources, "the figures refer to their own parts"
    assert [value for value in page.resources if not value.startswith(("#", "data:image/png;base64,"))] == []
    assert not re.search(r"@import|url\((?!#)", page_text)
    assert "script" not in {tag for tag, _ in page.tags}
    ids = set(page.ids)
    used = {value[1:] for value in page.resources if value.startswith("#")} | set(
        re.findall(r"url\(#(.*?)\)", page_text)
    )
    assert used <= ids


def test_page_says_what_happened(page):
    text = page.text
    for words in (
        "DeiT-small at half its size",
        "2026-11-03 14:20 UTC",
        "−50.0 %",
        "−51.2 %",
        "1.55×",
        "79.80 → 79.27 %",
        "−0.53 points",
        "92.30 %",
        "50,000",
        "13.1 ms",
        "1.54× faster",
        "1.50 times the predicted one",
        "too costly",
        "blocks.1.mlp.fc2",
        "The value bias folds",
        "tune.lr",
        "0.0001",
        "not set",
        "comcat compress deit_small --budget 0.5",
    ):
        assert words in text, words


def test_every_figure_is_described(page):
    labels = [attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg"]
    assert len(labels) == 2 * 4  # ranks, spectra, energy, one curve; each wide and narrow
    assert all(labels)
    assert {attrs.get("role") for tag, attrs in page.tags if tag == "svg"} == {"img"}


def test_page_of_a_tuned_model():
    page = Page(render(tuned()))
    text = page.text.replace(wording.SPACE, " ")
    for words in (
        "Before Compressed Tuned Change Ratio",
        "Top-1 accuracy 79.80 % 70.11 % 79.27 % −0.53 points",
        "Throughput 974 images/s – 1,513 images/s",
        "Search of ranks",
        "60.50 % of the parameters; 60 % were asked for",
        "expected cost, % of all parameters",
        "Tuning",
        "timm:deit_small_patch16_224 (hard distillation)",
        "learning rate",
    ):
        assert words in text, words
    assert len(page.ids) == len(set(page.ids))


def test_a_tuned_model_whose_original_nobody_knows():
    data = empty(before={"parameters": 100, "top1": 70.0}, after={"parameters": 100, "top1": 75.0})
    text = Page(render(data)).text.replace(wording.SPACE, " ")
    assert "Before After Change Ratio" in text and "70.00 → 75.00 %" in text
    assert "Parameters 0.0 %" not in text  # tuning leaves them: no headline
    between = dataclasses.replace(data, before={"parameters": 200}, between=data.before)
    text = Page(render(between)).text.replace(wording.SPACE, " ")
    assert "70.00 → 75.00 %" in text and "Top-1 accuracy – 70.00 % 75.00 % +5.00 points" in text


def test_same_data_same_page():
    data = empty(spectra=full().spectra[4:6], sites=full().sites[:1])
    assert render(data) == render(data)


def test_unknown_metrics_are_shown():
    text = Page(render(empty(before={"robustness": 0.5, "cache_bytes": 2048}, after={"robustness": 0.25}))).text
    assert "Robustness 0.5 0.25 −50.0 % 0.50×" in text
    assert "Cache 2 KiB –" in text


def test_missing_parts_are_left_out():
    page = Page(render(empty(before={"top1": None}, after={"top1": None}, agreement={"cosine": None})))
    assert [tag for tag, _ in page.tags if tag in ("h2", "svg", "table", "section", "pre", "li")] == []
    assert not re.search(r"\b(None|nan|NaN|inf)\b", page.text)


def test_a_few_parts_alone():
    data = empty(
        before={"parameters": 100},
        after={"loss": math.nan, "top1": 50.0},
        measured_loss=-0.5,
        predicted_loss=math.nan,
        sites=(site(keep=None, after=800),),
        spectra=(spectrum(matrix="W_Q", values=()), spectrum(matrix="W_K", values=(0.0, 0.0))),
        settings={"a": None, "b": {}, "c": [], "d": math.inf, "e": [None, 1]},
        curves={"Nothing": []},
    )
    page = Page(render(data))
    assert not re.search(r"\b(None|nan|NaN|inf)\b", page.text)
    assert "Loss – not finite" in page.text
    assert "Predicted loss" not in page.text and "Note" not in page.text.split("All 1 sites")[1]
    assert "The plan leaves them as they are" in page.text
    assert {attrs["style"] for tag, attrs in page.tags if attrs.get("class") == "fill"} == {"width: 0%"}


def test_hostile_text_is_escaped():
    rows = (site(f"blocks.0.{HOSTILE}", "linear"), site(f"blocks.1.{HOSTILE}", "linear"), site(HOSTILE, "linear"))
    data = empty(
        title=HOSTILE,
        model=HOSTILE,
        created=HOSTILE,
        command=HOSTILE,
        settings={HOSTILE: HOSTILE},
        environment={HOSTILE: {HOSTILE: [HOSTILE]}},
        before={HOSTILE: 1.0},
        after={HOSTILE: HOSTILE},
        agreement={HOSTILE: 1.0},
        sites=(*rows, site(name=HOSTILE + "2", kind="qk", keep=None, note=HOSTILE)),
        spectra=(spectrum(layer=HOSTILE, matrix="QK"),),
        notes=(HOSTILE,),
        curves={
            HOSTILE: [
                {"x": [0, 1], "y": [0, 1], "label": HOSTILE, "x_label": HOSTILE, "y_label": y} for y in (HOSTILE, "")
            ]
        },
        between={HOSTILE: 1.0},
        facts={HOSTILE: {HOSTILE: HOSTILE}},
    )
    text = render(data)
    page = Page(text)
    assert "<script" not in text and "<b " not in text
    assert page.text.count(HOSTILE) >= 10  # read as it was written


def test_page_of_a_base_model_stays_small():
    text = render(full(depth=12, heads=12, width=64, cost=1536))
    assert len(text.encode()) < 1_500_000
    Page(text)


# Writing


def test_write_is_atomic(tmp_path, monkeypatch):
    target = tmp_path / "runs" / "report.html"
    write(empty(title="First"), target)
    assert "First" in target.read_text(encoding="utf-8")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(StoreError, match="disk full"):
            write(empty(title="Second"), target)
    assert "First" in target.read_text(encoding="utf-8")
    assert [entry.name for entry in target.parent.iterdir()] == ["report.html"]
    write(empty(title="Third"), str(target))
    assert "Third" in target.read_text(encoding="utf-8")


def test_write_to_a_folder_is_refused(tmp_path):
    with pytest.raises(StoreError, match="cannot be written"):
        write(empty(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        write(empty(), tmp_path / "file" / "report.html")
    with pytest.raises(StoreError, match="expected the name of a file"):
        write(empty(), "")


def test_text_that_is_not_unicode_is_written(tmp_path):
    write(empty(command="comcat \udcff.jpg"), tmp_path / "report.html")
    assert "comcat ?.jpg" in (tmp_path / "report.html").read_text(encoding="utf-8")


# Blocks, by a real compression


@pytest.fixture(scope="module")
def compressed():
    """A report on a tiny model whose first feed-forward lost units and whose second came to low rank."""
    import copy

    from comcat.methods.compress import CompressSettings, compress_
    from comcat.report.collect import collect

    from .models import pictures, tiny_vit

    model = tiny_vit()
    before = copy.deepcopy(model)
    done = compress_(model, pictures(64, 16), CompressSettings(reduce=0.4))
    return done, collect(before, model, done, model="/models/vit_tiny/", judged_on="digits:test (500 pictures)")


def test_every_block_says_what_became_of_its_two_parts_and_why(compressed):
    done, report = compressed
    forms = {n: e.form for n, e in done.plan.sites.items()}
    assert "blocks.0.mlp:units" in forms and "blocks.1.mlp.fc1" in forms  # both kinds, or the test shows nothing
    rows = {row.name: row for row in report.sites}
    assert set(rows) == {*forms, "head"}  # a feed-forward once: by its units or by its layers
    first, second = rows["blocks.0.mlp:units"], rows["blocks.1.mlp.fc1"]
    assert (first.block, second.block) == ("blocks.0", "blocks.1") and first.role == second.role == "feed-forward"
    assert first.rival_loss > first.predicted_loss > 0
    assert second.rival_loss > second.predicted_loss + rows["blocks.1.mlp.fc2"].predicted_loss
    total = sum(row.predicted_loss for row in report.sites if row.predicted_loss is not None)
    assert total == pytest.approx(done.plan.made_by["predicted_loss"], rel=1e-6)
    text = Page(render(report)).text.replace(wording.SPACE, " ")
    units = done.plan.sites["blocks.0.mlp:units"].keep
    assert f"{units} of 192 units" in text and "ranks fc1" in text and "low rank: " in text and "fewer units: " in text
    assert "vit_tiny, compressed" in text and "digits:test (500 pictures)" not in text.split("Before and after")[0]
    assert "A classifier head keeps its size by default" in text


def test_the_figure_of_speed_is_one(compressed):
    """The ratio of two medians and the median of the ratios are two numbers; a reader sees the second alone."""
    _, report = compressed
    speed = {"median": 2.08, "low": 1.9, "high": 2.2, "batch_size": 8, "rounds": 5}
    timed = dataclasses.replace(
        report,
        speed=speed,
        before={**report.before, "latency_s": 0.010, "throughput": 800.0},
        after={**report.after, "latency_s": 0.004, "throughput": 2000.0},
    )
    assert ReportData.from_json(timed.to_json()).speed == speed
    text = Page(render(timed)).text.replace(wording.SPACE, " ")
    assert "Speed-up 2.08× quartiles 1.90–2.20, batch 8, 5 rounds" in text
    assert text.count("2.08× faster") == 2 and "2.50×" not in text  # of latency and of throughput


def test_blocks_that_run_on_fewer_tokens_have_a_column():
    import comcat
    from comcat.report.rows import site_rows

    from .models import pictures, tiny_vit

    model = tiny_vit()
    plan = comcat.merge(model, example=pictures(1)[0], keep=0.7)
    assert any(name.endswith(":tokens") for name in plan.sites)
    rows = site_rows(plan, comcat.find_sites(model))
    tokens = [row for row in rows if row.kind == "tokens"]
    assert {row.name for row in tokens} == {n for n in plan.sites if n.endswith(":tokens")}
    data = empty(sites=rows)
    assert ReportData.from_json(data.to_json()).sites == rows
    text = Page(render(data)).text
    assert "Attention Feed-forward Tokens" in text and f"{tokens[0].keep} of {tokens[0].full} tokens" in text
    assert "Tokens" not in Page(render(empty(sites=(site(block="blocks.0", role="attention"),)))).text


@pytest.mark.parametrize("forms", ["units", "ranks"])
def test_of_forms_that_were_not_asked_for_nothing_is_said(forms):
    import copy

    from comcat.methods.compress import CompressSettings, compress_
    from comcat.report.collect import collect

    from .models import pictures, tiny_vit

    model = tiny_vit()
    before = copy.deepcopy(model)
    done = compress_(model, pictures(16, 16), CompressSettings(reduce=0.3, forms=forms))
    report = collect(before, model, done, model="tiny")
    assert all(row.rival_loss is None for row in report.sites)
    assert any(row.form for row in report.sites) and "low rank: " not in Page(render(report)).text


@pytest.mark.parametrize(
    ("value", "noun", "said"),
    [(1, "picture", "1 picture"), (0, "step", "0 steps"), (1.0, "epoch", "1 epoch"), (2.5, "epoch", "2.5 epochs"),
     (2, "class", "2 classes")],
)  # fmt: skip
def test_numbers_have_their_nouns_in_the_right_form(value, noun, said):
    assert wording.counted(value, noun) == said


@pytest.mark.parametrize(
    ("predicted", "measured", "said"),
    [(1e-5, 5.36e-5, "Both are tiny"), (0.02, 0.04, "2.00 times"), (0.01, -0.001, None), (0.01, None, None)],
)
def test_a_ratio_of_tiny_rises_is_not_said(predicted, measured, said):
    text = Page(render(empty(predicted_loss=predicted, measured_loss=measured))).text
    assert ("times the predicted" in text) == (said == "2.00 times") and (said is None or said in text)


def test_on_a_phone_every_cell_stands_beside_its_heading(compressed):
    """A table too wide for a phone becomes a list: no column is cut off or hidden."""
    _, report = compressed
    page = render(report)
    tags = Page(re.sub(r"<thead>.*?</thead>", "", page, flags=re.DOTALL)).tags
    narrow = re.search(r"@media \(max-width: 40rem\) \{(.*?)\n\}", page, re.DOTALL)[1]
    assert "table.stacked td::before { content: attr(data-label)" in narrow and "td { display: none" not in narrow
    stacked, labels = False, []
    for tag, attributes in tags:
        stacked = "stacked" in (attributes.get("class") or "") if tag == "table" else stacked
        labels += [attributes.get("data-label")] if tag == "td" and stacked else []
    assert {"Change", "Ratio"} <= set(labels) and None not in labels
