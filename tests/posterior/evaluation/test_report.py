"""The report of a tiny posterior: one page that any browser reads without a network, with the numbers of --json."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from posterior.calibration import metrics
from posterior.calibration.risk import Held
from posterior.cli import evaluate
from posterior.errors import PosteriorError
from posterior.evaluation import plots
from posterior.evaluation.report import MEANING, START, Report, Source
from posterior.files import atomic

ROWS = [{"text": f"a {'fine' if index % 3 else 'poor'} thing {index}", "label": index % 2} for index in range(40)]


SETS, HELD = ("covered", "size"), ("threshold", "answered", "wrong")


class Page(HTMLParser):
    """The tags with their attributes, and the text of each kind of tag. Fails where a tag is not closed."""

    def __init__(self, page: bytes):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page.decode())
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


def draw(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scores.softmax(1), torch.arange(n) % 3


def make(**changes: Any) -> Report:
    p, y = draw()
    options: dict[str, Any] = {
        "posterior": {"name": "it", "hash": "ab", "family": "laplace"},
        "base": {"id": "base", "revision": None, "hash": "sha256:01"},
        "data": Source("test.jsonl", "sha256:02", 200),
        "calibration": None,
        "repeated": 0,
        "ood": None,
        "table": {"MAP": metrics.estimate(p, y, draws=10)},
        "sets": {},
        "held": {},
        "ood_auroc": {},
        "curves": {"MAP": (p, y)},
        "fit": {"seconds": 1.5},
    }
    return Report(**options | changes)


def test_the_page_of_a_tiny_posterior_has_the_numbers_of_json(run_fit, tiny_base, tmp_path, capsys):
    posterior = run_fit()
    for name, rows in {"data": ROWS, "held": ROWS[:15], "ood": [{"text": "1 + 1"}, {"text": "2 x 3"}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    words = [posterior.path, tmp_path / "data.jsonl", "--base", tiny_base, "--particles", 3, "--json"]
    words += [
        "--calibration",
        tmp_path / "held.jsonl",
        "--ood",
        tmp_path / "ood.jsonl",
        "--report",
        tmp_path / "r.html",
    ]
    evaluate.run(parser.parse_args(list(map(str, words))))
    facts = json.loads(capsys.readouterr().out)
    page = Page((tmp_path / "r.html").read_bytes())

    cells = page.text["td"]
    for method, estimates in facts["table"].items():
        start = cells.index(method) + 1
        shown = [f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" for found in estimates.values()]
        assert cells[start : start + len(metrics.METRICS)] == shown
    numbers = [value for found in facts["sets"].values() for value in (found["covered"], found["size"])]
    assert all(found["threshold"] is None for found in facts["max_risk"].values()), "15 rows prove nothing"
    numbers += [value for found in facts["ood_auroc"].values() for value in (found["epistemic"], found["total"])]
    shown = [cell for cell in cells if re.fullmatch(r"\d+\.\d{3}", cell)]
    assert shown == [f"{value:.3f}" for value in numbers]
    assert len(facts["sets"]) == 3 and len(facts["ood_auroc"]) == 4
    assert json.loads(page.text["pre"][0]) == facts["fit"] == posterior.fit
    about = " ".join(page.text["dd"])
    assert facts["posterior"] == {"name": "tiny", "hash": posterior.hash, "family": "laplace"}
    for fact in (
        posterior.hash,
        posterior.base["hash"],
        *(facts[name]["hash"] for name in ("data", "calibration", "ood")),
    ):
        assert fact in about
    assert "40 rows" in about and "15 test rows are among them" in about
    assert set(MEANING) == set(metrics.METRICS) | {*SETS, *HELD, "OOD AUROC"} <= set(page.text["dt"])


def test_the_page_loads_nothing(tmp_path):
    content = make().to_html()
    assert b"http:" not in content and b"https:" not in content and b"url(" not in content and b"@import" not in content
    assert content.startswith(START)
    page = Page(content)
    policy = {"content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'"}
    assert ("meta", {"http-equiv": "Content-Security-Policy"} | policy) in page.tags
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 2 and not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    for source in sources:
        kind, data = (source or "").split(",")
        assert kind == "data:image/png;base64"
        image = Image.open(io.BytesIO(b64decode(data)))
        assert image.width >= 600 and len(set(image.convert("L").get_flattened_data())) > 10
    assert ("meta", {"charset": "utf-8"}) in page.tags


def test_everything_is_escaped():
    """As it was written, also where it looks like the template's own code."""
    bad = "</pre><script>alert('é')</script>&amp;{{ 7 * 7 }}{% raw %}\ud800"
    content = make(
        posterior={"name": bad, "hash": bad, "family": bad}, fit={bad: bad}, data=Source(bad, bad, 1)
    ).to_html()
    page = Page(content)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text["h1"][0].startswith("Evaluation of </pre><script>alert('é')</script>&amp;{{ 7 * 7 }}{% raw %}")


def test_only_what_was_measured_is_explained():
    assert Page(make().to_html()).text["dt"] == ["posterior", "base", "test rows", *metrics.METRICS]


def test_json_holds_what_the_plots_show():
    p, y = draw()
    curve = make().to_json()["curves"]["MAP"]
    assert curve["risk"] == metrics.risk_coverage(p, y).tolist()
    bins = curve["reliability"]
    assert sum(one["rows"] for one in bins) == 200 and all(one["rows"] for one in bins)
    ece = sum(one["rows"] / 200 * abs(one["confidence"] - one["accuracy"]) for one in bins)
    assert ece == pytest.approx(metrics.ece(p, y), abs=1e-12)


def test_plots_show_the_numbers():
    p, y = draw()
    above, below = plots.reliability({"it": (p, y)}).axes
    diagonal, line = above.lines
    count, confidence, share = metrics.reliability(p, y)
    filled = count > 0
    torch.testing.assert_close(torch.tensor(line.get_xydata()), torch.stack([confidence, share], 1)[filled])
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert below.lines[0].get_ydata().tolist() == count[filled].tolist()
    figure = plots.risk_coverage({"it": (p, y)})
    (axes,) = figure.axes
    assert (
        axes.lines[0].get_xdata()[-1] == 1
        and axes.lines[0].get_ydata().tolist() == metrics.risk_coverage(p, y).tolist()
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["it"]


def test_the_curve_shows_where_an_allowed_error_makes_it_stop():
    p, y = draw()
    found = {"it": Held(0.4, 0.7, 0.25, 0.3), "other": Held(0.4, None, 0.0, math.nan)}
    (axes,) = plots.risk_coverage({"it": (p, y), "other": (p, y)}, found).axes
    points = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert points == [[[0.25, 0.3]]], "one that no rows prove has no point"
    assert axes.lines[-1].get_ydata() == [0.4, 0.4]
    report = make(held=found)
    assert report.tables()[1][1:] == [["it", "0.700", "0.250", "0.300"], ["other", "-", "-", "-"]]
    assert report.to_json()["max_risk"]["other"] == {"allowed": 0.4, "threshold": None, "answered": 0.0, "wrong": None}


def test_the_legend_of_as_many_methods_as_the_grid_has_hides_nothing():
    p, y = draw()
    curves = {f"MAP, prior by evidence, temperature {number}": (p, y) for number in range(22)}
    for plot in (plots.reliability, plots.risk_coverage):
        figure = plot(curves)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert all(axes.get_window_extent().x1 <= box.x0 for axes in figure.axes)


def test_a_full_disk_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(PosteriorError, match="cannot write .*r.html: No space left on device; make room"):
        make().save(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_report_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)  # for root every mode is open
    with pytest.raises(PosteriorError, match=f"you may not write into {tmp_path}; name another folder"):
        evaluate._check_report(tmp_path / "new.html")


def test_a_report_replaces_nothing_but_a_report(tmp_path: Path) -> None:
    rows, link, fifo = tmp_path / "rows.jsonl", tmp_path / "link.html", tmp_path / "fifo"
    rows.write_text("{}")
    link.symlink_to(rows)
    os.mkfifo(fifo)
    for path, words in (
        (rows, "something else"),
        (link, "no regular file"),
        (fifo, "no regular file"),
        (tmp_path, "folder"),
    ):
        with pytest.raises(PosteriorError, match=words):
            evaluate._check_report(path)
    assert rows.read_text() == "{}" and fifo.is_fifo()
    for content in (b"", START + b"<html>"):
        (tmp_path / "old.html").write_bytes(content)
        evaluate._check_report(tmp_path / "old.html")
    evaluate._check_report(tmp_path / "new.html")
