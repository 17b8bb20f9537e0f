"""figures.py: every figure is drawn, is not blank, and shows the numbers that it is given."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from runs import read_log

from experiments import costs, figures, pretrained


def assert_picture(path, colours=20):
    """Wide enough, and not blank: many colours, and something in each quarter."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    h, w, _ = pixels.shape
    assert w == 1200 and h > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > colours
    for half in np.array_split(pixels, 2):
        for quarter in np.array_split(half, 2, axis=1):
            assert quarter.std() > 5


@pytest.fixture
def drawn(monkeypatch):
    """The number of panels of every figure that is saved."""
    save, panels = figures.save, []

    def counting(figure, path):
        panels.append(len(figure.axes))
        return save(figure, path)

    monkeypatch.setattr(figures, "save", counting)
    return panels


def test_figures_are_drawn_of_the_runs(finished):
    out, _ = finished
    names = ["attention.png", "curves.png", "routes.png", "smoothness.png"]
    assert sorted(path.name for path in out.glob("*.png")) == names
    for name in names:
        assert_picture(out / name)
        assert f"![{name}]({name})" in (out / "ablate.md").read_text()


def test_a_figure_of_lambdas(tmp_path):
    rows = [[0.01, 0.02, 0.03], [0.02, 0.03, 0.05]]
    models = dict.fromkeys(("ladder-4-difference", "map-wise", "rising-lambda"), rows)
    assert figures.lambdas(tmp_path / "lambdas.png", models) == "lambdas.png"
    assert_picture(tmp_path / "lambdas.png")


def test_a_figure_of_resolutions(tmp_path):
    rows = [[256, 0.1, 20.0], [512, 0.4, 90.0]]
    points = dict.fromkeys(costs.S2, rows)
    path = tmp_path / "resolutions.png"
    assert figures.resolutions(path, points, "somewhere") == "resolutions.png"
    assert_picture(path)


TOO_LARGE = [[256, 0.1, 20.0], [512, None, None]]
NO_MEMORY = [[256, 0.1, None], [512, 0.2, None]]
NOTHING = [[256, None, None]]


@pytest.mark.parametrize(("rows", "panels"), [(TOO_LARGE, [2]), (NO_MEMORY, [1]), (NOTHING, [])])
def test_resolutions_have_a_panel_for_each_known_cost(rows, panels, drawn, tmp_path):
    points = dict.fromkeys(costs.S2, rows)
    found = figures.resolutions(tmp_path / "resolutions.png", points, "somewhere")
    assert found == ("resolutions.png" if panels else None) and drawn == panels


def test_images_keep_their_grey_levels_and_latents_their_contrast():
    x = torch.linspace(-1, 1, 8).view(1, 2, 4)
    assert np.allclose(figures.image_of(x)[..., 0], (x[0] + 1) / 2)
    assert np.allclose(figures.image_of(4 * x)[..., 0], (x[0] + 1) / 2)


@pytest.fixture
def run(finished):
    """A model of the comparison and its log."""
    folder = finished[0] / "DyDi-LiT" / "0"
    return pretrained.load(folder / "ckpt.pt"), read_log(folder)


def test_a_route_figure_shows_the_shares_of_the_tokens(run, tmp_path, monkeypatch):
    """All routers of Q' send all tokens to the first projector: every cell of Q' says so."""
    model, log = run
    texts = []
    monkeypatch.setattr(figures.plt.Axes, "text", lambda self, x, y, s, **_: texts.append(s))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q_projector_router.zero_()
    figures.routes(tmp_path / "routes.png", [model], {"classes": list("0123456789")}, [log])
    assert texts[:20] == ["1: 100%"] * 20 and len(texts) == 40
    assert all(re.fullmatch(r"[123]: \d+%", text) for text in texts)


def test_the_class_tells_all_of_a_route_that_follows_it_and_nothing_of_others():
    """Shares (classes, images, depth, n_P). A block with one route for all has nothing to tell."""
    follows = torch.eye(4).view(4, 1, 1, 4).repeat(1, 8, 2, 1)
    assert figures.told_by_class(follows)[0] == pytest.approx(1)
    follows[:, :, 1] = torch.tensor([1.0, 0, 0, 0])
    told, by_chance = figures.told_by_class(follows)
    assert told == pytest.approx(1) and 0.01 < by_chance < 0.3
    even = torch.full((4, 8, 2, 4), 0.25)
    even[:, :, 0] = torch.tensor([1.0, 0, 0, 0])
    assert figures.told_by_class(even) == pytest.approx((0, 0), abs=1e-6)
    one = torch.tensor([1.0, 0, 0, 0]).expand(4, 8, 2, 4)
    assert figures.told_by_class(one) == (0, 0)


def test_a_route_figure_says_what_the_class_tells_over_all_seeds(run, tmp_path, monkeypatch):
    model, log = run
    shares = [torch.rand(2, 2, 8, 2, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    left = [*shares]
    monkeypatch.setattr(figures, "image_shares", lambda *_, **__: left.pop(0))
    labels = []
    put = figures.plt.Axes.set
    monkeypatch.setattr(
        figures.plt.Axes, "set", lambda self, **kw: labels.append(kw["xlabel"]) or put(self, **kw)
    )
    figures.routes(tmp_path / "routes.png", [model, model], {"classes": ["0", "1"]}, [log])
    for which in range(2):
        told = [100 * figures.told_by_class(seed[which])[0] for seed in shares]
        want = f"told by class: {np.mean(told):.1f} ± {np.std(told, ddof=1):.1f} %\nchance: "
        assert want in labels[which]


def test_routes_of_images_by_chance_are_told_by_no_class():
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(10, 8, 3, 3, generator=generator)
    told, by_chance = figures.told_by_class(shares / shares.sum(-1, keepdim=True))
    assert told == pytest.approx(by_chance, rel=0.35) and by_chance > 0.001


@pytest.mark.parametrize(
    ("logged", "panels"), [([True, True], 3), ([False], 2), ([True, False], 2)]
)
def test_a_route_figure_has_a_panel_of_the_logs_if_all_have_usage(
    run, drawn, tmp_path, logged, panels
):
    model, log = run
    silent = [{k: v for k, v in line.items() if k != "usage_entropy"} for line in log]
    logs = [log if has_usage else silent for has_usage in logged]
    figures.routes(tmp_path / "routes.png", [model], {"classes": ["0", "1"]}, logs)
    assert drawn == [panels]
