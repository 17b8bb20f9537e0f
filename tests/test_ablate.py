"""probe.py, ablate.py, costs.py, figures.py: attention matrices, routes, a table that no kill changes, pictures."""

import argparse
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIG, ROOT, RUN, differing, prepare_digits, read_log
from util import assert_close, choose, power

import ablate
import costs
import dydilit
import figures
import probe
import train_min
from baselines import MODELS, VARIANTS, GatedLinear, Ladder, LiT, variant
from dydilit import Config, Data, DyDiLA, train
from eval_min import evaluate
from load import load_model
from probe import entropies, routers, row_statistics, usage, usage_entropy, watched

BASE = Config(input_size=8, in_channels=1, hidden_size=24, depth=2, n_projectors=2, n_kernels=3, n_lambdas=4,
              num_classes=10)


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


def model_of(name, **changes):
    """A small model of float64 with two blocks and weights that are not near anything."""
    config = replace(variant(name, BASE) if name in VARIANTS else BASE, depth=2, **changes)
    if name == "MoH": config = replace(config, heads=4, shared_heads=1, routed_heads=2)
    if name in ("DiT", "PixArt", "LiT", "DiG", "FLatten"): config = replace(config, heads=2)
    model = config.build().double()
    for key, p in model.named_parameters():
        torch.nn.init.uniform_(p, 1, 4) if "gamma" in key else torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Attention matrices.


def before_projection(attn, x, grid):
    """What the attention gives before its convolution and projection, from a forward pass that nobody watches."""
    if isinstance(attn, Ladder): attn.dwc = None
    if isinstance(attn, DyDiLA): attn.dwc.forward = lambda v, grid: 0
    if isinstance(attn, LiT): attn.local = lambda v, grid: 0
    caught = []
    last = attn.o_proj if isinstance(attn, GatedLinear) else attn.proj
    hook = last.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    attn(x, grid)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", [*VARIANTS, "DyDi-LiT"])
@torch.no_grad()
def test_matrix_times_values_is_the_attention(name, normalize):
    """In both blocks (PixArt compresses in the second, DiG scans otherwise); fewer tokens than channels, and more."""
    model = model_of(name, normalize=normalize)
    for block in model.blocks:
        for grid in ((2, 4), (6, 6)):
            attn, x = block.attn, torch.randn(3, math.prod(grid), 24, dtype=torch.float64)
            want = before_projection(attn, x, grid)
            with watched(model, matrices=True) as seen:
                for z in (torch.randn_like(x), x): attn(z, grid)
            _, (matrix, values) = seen[list(model.blocks).index(block)]["attention"]
            assert matrix.shape[:3] == (3, getattr(attn, "heads", 1), len(x[0]))
            heads = matrix @ values
            if isinstance(attn, GatedLinear):  # a norm and a gate are between, and all in the order of the scan
                o = attn.g_norm(heads).transpose(1, 2).flatten(2) * torch.nn.functional.silu(attn.g_proj(x))
                want = want[:, dydilit_order(grid, attn.i)]
            else:
                o = heads.transpose(1, 2).flatten(2)
            assert_close(f"{name} {grid}", o, want, atol=1e-10, rtol=1e-10)
            if name in ("DiT", "PixArt"): assert_close("a softmax", matrix.sum(-1), torch.ones(matrix.shape[:3]), 1e-12)
            if name == "DiG": assert not torch.equal(matrix, matrix.tril()) or (attn.i, grid) == (0, grid)


def dydilit_order(grid, i):
    """Where the token that is the n-th of the image is in DiG's scan, in the first two blocks: rows, rows backwards."""
    order = list(range(math.prod(grid)))
    return order[::-1] if i % 2 else order


@torch.no_grad()
def test_a_row_is_similarities_over_their_sum():
    attn, x = model_of("Sana").blocks[0].attn, torch.randn(1, 5, 24, dtype=torch.float64)
    model = torch.nn.Module()
    model.blocks = [type("", (), {"attn": attn})]
    with watched(model, matrices=True) as seen: attn(x, (1, 5))
    q, k, _ = (x @ attn.qkv.weight.T).relu().chunk(3, dim=-1)
    for i in range(5):
        row = torch.stack([q[0, i] @ k[0, j] for j in range(5)])
        assert_close(f"row {i}", seen[0]["attention"][0][0][0, 0, i], row / row.sum(), atol=1e-5)


@torch.no_grad()
def test_watching_changes_nothing_and_leaves_nothing_behind():
    model, x = model_of("DyDi-LiT"), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    t, y, before = torch.tensor([3, 700]), torch.tensor([1, 2]), (dydilit.FUSED_DEVICES, dydilit.route)
    alone = model(x, t, y)
    with watched(model, matrices=True) as seen:
        assert dydilit.FUSED_DEVICES == ()
        assert_close("watched", model(x, t, y), alone, atol=1e-9)
    model(x, t, y)
    assert len(seen[0]["attention"]) == 1 and len(seen[0]["routes"]["q_kernel"]) == 1
    with pytest.raises(KeyError), watched(model): raise KeyError
    assert (dydilit.FUSED_DEVICES, dydilit.route) == before and not model.blocks[0].attn._forward_hooks


def test_row_statistics_of_rows_that_are_known():
    uniform, certain, half = torch.ones(4), torch.tensor([0.0, -2, 0, 0]), torch.tensor([3.0, 0, 0, -3])
    assert row_statistics(uniform) == pytest.approx((1, 0))
    assert row_statistics(certain) == pytest.approx((0, 3))
    assert row_statistics(half) == pytest.approx((0.5, 4**2 * np.var([0.5, 0, 0, 0.5])))
    assert row_statistics(torch.stack([uniform, certain, torch.zeros(4)])) == pytest.approx((0.5, 1.5))


# ---------------------------------------------------------------------------------------------------------------------
# Routes.


def test_usage_entropy_is_1_for_even_and_0_for_collapsed_routes():
    assert usage_entropy(usage(torch.arange(12).view(3, 4) % 3, 3)) == pytest.approx(1)
    assert usage_entropy(usage(torch.full((3, 4), 2), 3)) == 0
    assert usage_entropy(usage(torch.zeros(3, 4, dtype=torch.long), 1)) == 1
    half = usage(torch.tensor([0, 0, 1, 1]), 4)
    assert half.tolist() == [0.5, 0.5, 0, 0] and usage_entropy(half) == pytest.approx(0.5)


NAMES = ["q_projector", "k_projector", *probe.KERNELS, *probe.DIFFERENCES]


@pytest.mark.parametrize("name", ["DyDi-LiT", "ladder-4-difference"])
@torch.no_grad()
def test_routes_are_those_of_the_equations(name):
    model, x, grid = model_of(name), torch.randn(2, 12, 24, dtype=torch.float64), (3, 4)
    attn = model.blocks[1].attn
    with watched(model) as seen: attn(x, grid)
    got = {key: index for key, (index,) in seen[1]["routes"].items()}
    assert list(got) == NAMES and seen[0]["routes"] == {key: [] for key in NAMES}
    a = {key: z.numpy() for key, z in attn.named_parameters()}
    for b in range(2):
        for n, token in enumerate(x[b].numpy()):
            q, k, _ = np.split(a["qkv.weight"] @ token, 3)
            want = {f"{s}_projector": choose(token, a[f"{s}_projector_router"]) for s in "qk"}
            primes = [token @ a[f"{s}_projectors"][want[f"{s}_projector"]] for s in "qk"]
            measured = []
            for key, z, router in zip(probe.KERNELS, (q, k, *primes), a["kernel_routers"]):
                want[key] = choose(z, router)
                measured.append(power(z, a["gamma"][want[key]]))
            for i, key in enumerate(probe.DIFFERENCES):
                want[key] = choose(np.concatenate([measured[i], measured[2 + i]]), a["difference_routers"][i])
            assert {key: index[b, n].item() for key, index in got.items()} == want
    model.blocks[1].attn.q_projector_router.zero_()  # ties: all to index 0
    with watched(model) as seen: model(torch.randn(2, 1, 8, 8).double(), torch.tensor([3, 7]), torch.tensor([1, 2]))
    table = entropies(model, seen)
    assert list(table) == NAMES and table["q_projector"][1] == 0 < table["q_projector"][0] <= 1


@torch.no_grad()
def test_routes_of_the_compared_models():
    found = {}
    for name in VARIANTS:
        model = model_of(name)
        with watched(model) as seen: model(torch.randn(2, 1, 8, 8).double(), torch.tensor([3, 7]), torch.tensor([1, 2]))
        found[name] = list(entropies(model, seen))
        assert list(routers(model.blocks[0].attn)) == [key for key in found[name] if key != "heads"]
        if name == "MoH":  # one head is shared, each token takes two of the other three
            attn, x = model.blocks[0].attn, torch.randn(2, 12, 24).double()
            with watched(model) as seen: attn(x, (3, 4))
            gates, index = attn.gates(x)[0], seen[0]["routes"]["heads"][0]
            assert index.shape == (2, 12, 2) and ((gates[..., 1:] > 0).sum(-1) == 2).all()
            assert (gates.gather(-1, index + 1) > 0).all()
            counts = (gates[..., 1:] > 0).sum((0, 1)) / 48
            want = -(counts * counts.log()).sum().item() / math.log(3)
            model.blocks = model.blocks[:1]
            assert entropies(model, seen)["heads"] == [pytest.approx(want)]
    kernels = ["q_kernel", "k_kernel"]
    assert found == {name: [] for name in MODELS} | {"MoH": ["heads"]} | {
        "ladder-0-sana": [], "ladder-1-focused": [], "ladder-2-measure": kernels,
        "ladder-3-projection": [*NAMES[:2], *kernels], "ladder-4-difference": NAMES, "ladder-5-dwc": NAMES,
        "map-wise": [*NAMES[:6], "map_difference"], "rising-lambda": NAMES}


@torch.no_grad()
def test_mean_lambda_is_that_of_the_chosen():
    for name in ("DyDi-LiT", "map-wise"):
        model = model_of(name).float()
        x, noise = torch.randn(2, 3, 1, 8, 8)
        held_out = [x, torch.tensor([0, 1, 2]), torch.tensor([5, 50, 500]), noise]
        with watched(model) as seen: model(*probe.noisy(model, held_out))
        for b, got in enumerate(probe.mean_lambda(model, held_out)):
            lam = model.blocks[b].attn.lam.tolist()
            used = [lam[i] for key, (index,) in seen[b]["routes"].items() if "difference" in key
                    for i in index.flatten().tolist()]
            assert len(used) == 3 * 16 * (1 if name == "map-wise" else 2) and got == pytest.approx(np.mean(used))


# ---------------------------------------------------------------------------------------------------------------------
# The log.


def test_usage_entropy_is_in_the_log_and_disturbs_nothing(digits, tmp_path):
    run = replace(RUN, data=digits, out=str(tmp_path / "watched"))
    train(CONFIG, run, on_eval=probe.usage_at_evaluation)
    train(CONFIG, replace(run, out=str(tmp_path / "alone")))
    train(CONFIG, replace(run, out=str(tmp_path / "halves"), steps=3, decay=0.0), on_eval=probe.usage_at_evaluation)
    ckpts = [torch.load(tmp_path / name / "ckpt.pt") | {"training": None} for name in ("watched", "alone")]
    assert differing(*ckpts) == []
    log, alone = read_log(tmp_path / "watched"), read_log(tmp_path / "alone")
    assert [("usage_entropy" in x) for x in log] == [("held_out_loss" in x) for x in log] == [False, True] * 3
    for x, z in zip(log, alone):
        assert {k: v for k, v in x.items() if k not in ("usage_entropy", "images_per_s")} == {
            k: v for k, v in z.items() if k != "images_per_s"}
    model, held_out = load_model(tmp_path / "watched" / "ckpt.pt")[0], Data(digits, CONFIG).held_out()
    x, y, t, noise = (z[:64] for z in held_out)
    with watched(model) as seen: model(dydilit.Diffusion().q_sample(x, t, noise), t, y)
    want = {key: [round(h, 4) for h in row] for key, row in entropies(model, seen).items()}
    assert log[-1]["usage_entropy"] == want and list(want) == NAMES


def test_a_continued_log_is_that_of_an_uninterrupted_run(digits, tmp_path):
    run = replace(RUN, data=digits, out=str(tmp_path / "once"), decay=0.0)
    train(CONFIG, run, on_eval=probe.usage_at_evaluation)
    for steps in (3, 6):
        train(CONFIG, replace(run, out=str(tmp_path / "twice"), steps=steps), True, on_eval=probe.usage_at_evaluation)
    once, twice = ([{k: v for k, v in x.items() if k != "images_per_s"} for x in read_log(tmp_path / name)
                    if x["step"] != 3] for name in ("once", "twice"))  # the end of the first part is evaluated as well
    assert once == twice


def test_a_model_that_routes_nothing_logs_nothing(digits, tmp_path):
    train(variant("DiT", CONFIG), replace(RUN, data=digits, out=str(tmp_path)), on_eval=probe.usage_at_evaluation)
    assert not any("usage_entropy" in x for x in read_log(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# ablate.py.

TINY = ["--hidden-size=16", "--n-kernels=3", "--n-lambdas=3", "--depth=2", "--batch-size=8", "--steps=40", "--warmup=2",
        "--samples=40", "--sampling-steps=3"]
TWO = ["--models", "ladder-0-sana", "DyDi-LiT", "--seeds=2", "--resolutions"]


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """The folder of a comparison that ran in this process without interruption, and the arguments of ablate.py."""
    out = tmp_path_factory.mktemp("finished")
    arguments = [*TWO, f"--data={digits}", f"--out={out}", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Here)
        patch.setattr(costs, "memory_of", lambda argv, side, batch, train: 12.0)
        ablate.main(arguments)
    return out, arguments


class Here:
    """Popen for a command of ablate.py --run, which runs in this process."""
    def __init__(self, command, env, stdout, stderr):
        assert command[:3] == [sys.executable, str(ROOT / "ablate.py"), "--one-run"] and env["OMP_NUM_THREADS"]
        assert stdout is stderr and stdout.writable()
        self.returncode = None
        try:
            ablate.main(command[2:])
            self.code = 0
        except SystemExit as e:
            self.code = e.code

    def poll(self):
        self.returncode = self.code
        return self.code


def cells(text):
    """{first cell: the others} of the first Markdown table in a text."""
    lines = [line.strip("| ").split(" | ") for line in text.split("\n\n")[2].splitlines()]
    return {line[0]: line[1:] for line in [lines[0], *lines[2:]]}


def test_the_table_is_what_the_runs_say(finished, digits):
    out, _ = finished
    table = cells((out / "ablate.md").read_text())
    assert list(table) == ["model", "ladder-0-sana", "DyDi-LiT", "half of the real images"]
    columns, losses = table["model"], {}
    for model in ("ladder-0-sana", "DyDi-LiT"):
        values = {name: [] for name in ablate.COLUMNS}
        for seed in "01":
            last = read_log(out / model / seed)[-1]
            with np.load(out / model / seed / "samples.npz") as made:
                found = evaluate(made["arr_0"], made["labels"], digits) | last
            for name, row in values.items(): row.append(found[name])
        row, losses[model] = dict(zip(columns, table[model])), values["held_out_loss"]
        for name, title in ablate.COLUMNS.items():
            scale, tolerance = (100, 0.051) if "%" in row[title] else (1, 0.0011 * abs(np.mean(values[name])))
            mean, deviation = (float(x) for x in re.findall(r"-?\d[\d.]*(?:e[+-]\d+)?", row[title]))
            assert mean == pytest.approx(scale * np.mean(values[name]), abs=tolerance), title
            assert deviation == pytest.approx(scale * np.std(values[name], ddof=1), abs=tolerance), title
        state = torch.load(out / model / "0" / "ckpt.pt")
        parameters = sum(z.numel() for name, z in state["model"].items() if name != "pos_embed")
        assert row["blocks"] == "2" and row["parameters"] == f"{parameters / 1e6:.2f} M"
        assert float(row["step, ms"]) >= 0 and row["memory, MiB"] == "12"
    gaps = np.subtract(losses["ladder-0-sana"], losses["DyDi-LiT"])
    got = dict(zip(columns, table["ladder-0-sana"]))["loss minus DyDi-LiT's"].split(" ± ")
    assert [float(x) for x in got] == pytest.approx([gaps.mean(), gaps.std(ddof=1)], abs=1.1e-5)
    assert "40 steps of 8 images, 2 seeds; 40 samples, 3 steps" in (out / "ablate.md").read_text()
    results = json.loads((out / "results.json").read_text())
    assert list(results) == list(losses) and all(list(runs) == ["0", "1"] for runs in results.values())


def test_finished_runs_are_not_repeated(finished, monkeypatch, capsys):
    out, arguments = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".png"}
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(costs, "times_of", None)
    ablate.main(arguments)
    assert {path: path.read_bytes() for path in before} == before
    assert (out / "ablate.md").read_text().startswith(capsys.readouterr().out.partition("\n\nwrote")[0])
    with pytest.raises(ValueError, match=r"ladder-0-sana/0 holds another run, .*--steps=40.*, not .*--steps=41"):
        ablate.main([a.replace("--steps=40", "--steps=41") for a in arguments])
    with pytest.raises(TypeError, match="NoneType"):  # one that is not finished is started
        ablate.main([a.replace("--seeds=2", "--seeds=3") for a in arguments])


@pytest.mark.parametrize("fails", ["draw", "training_costs", "sampling_costs"])
def test_no_figure_and_no_measurement_costs_the_tables(finished, tmp_path, monkeypatch, fails):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for file in ("ablate.md", "results.json", "costs.json"): (tmp_path / file).unlink()

    def failing(*_): raise RuntimeError("days are not lost")

    monkeypatch.setattr(figures if fails == "draw" else ablate, fails, failing)
    monkeypatch.setattr(costs, "memory_of", lambda argv, side, batch, train: 12.0)
    monkeypatch.setattr(subprocess, "Popen", None)
    arguments = [a.replace(str(finished[0]), str(tmp_path)) for a in finished[1]]
    if fails == "sampling_costs": arguments[arguments.index("--resolutions")] = "--resolutions=16"
    with pytest.raises(RuntimeError, match="days are not lost"): ablate.main(arguments)
    now, then = (cells((out / "ablate.md").read_text()) for out in (tmp_path, finished[0]))
    assert {name: row[:-2] for name, row in now.items()} == {name: row[:-2] for name, row in then.items()}
    measured = [row[-2:] for name, row in now.items() if name in ("ladder-0-sana", "DyDi-LiT")]
    assert all((row[1] == "12") == (fails != "training_costs") and (row[0] == "-") == (row[1] == "-")
               for row in measured)
    assert (tmp_path / "results.json").read_bytes() == (finished[0] / "results.json").read_bytes()


def test_nproc_reaches_the_measurement(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(costs, "costs_of", lambda models, configs, batch, *_: {m: [batch, None] for m in models})
    ablate.main([*(a.replace(str(finished[0]), str(tmp_path)) for a in finished[1]), "--nproc=2"])
    text = (tmp_path / "ablate.md").read_text()
    assert cells(text)["DyDi-LiT"][-2:] == ["4000", "-"] and "step: 4 images (of 8: what a process takes" in text


@pytest.mark.parametrize("latents", [False, True])
def test_data_without_held_out_images(latents, tmp_path, monkeypatch):
    """As README prepares ImageNet: no held-out loss, no figure of it; and no samples of latents, unless asked for."""
    out, flags = tmp_path / "out", [*TINY, "--steps=4", "--bf16"]
    meta = {"name": "tiny", "classes": ["a", "b"], "flip": True, "held_out": 0, "levels": 255}
    images = np.random.default_rng(0).integers(256, size=(40, 1, 8, 8)).astype(np.uint8)
    if latents:  # an autoencoder of this name is not there: it would be an error to look for it
        meta |= {"scaling": 0.5, "vae": f"{tmp_path}/none", "pixels": 64}
        images = np.random.default_rng(0).random((40, 2, 8, 8, 8)).astype(np.float16)
        flags = [*(a for a in flags if not a.startswith("--sampl")), "--input-size=8", "--preset-size=S/2"]
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "images.npy", images)
    np.save(tmp_path / "data" / "labels.npy", np.arange(40) % 2)
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    monkeypatch.setattr(subprocess, "Popen", Here)
    monkeypatch.setattr(costs, "memory_of", lambda argv, side, batch, train: 12.0)
    clips, sample = [], dydilit.Diffusion.sample

    def watching(*args, clip, **how):
        clips.append(clip)
        return sample(*args, clip=clip, **how)

    monkeypatch.setattr(dydilit.Diffusion, "sample", watching)
    ablate.main([*TWO, f"--data={tmp_path}/data", f"--out={out}", *flags])
    text, results = (out / "ablate.md").read_text(), json.loads((out / "results.json").read_text())
    row = dict(zip(*(cells(text)[name] for name in ("model", "DyDi-LiT"))))
    assert [row[name] for name in ("held-out loss", "loss minus DyDi-LiT's", "memory, MiB")] == ["-", "-", "12"]
    assert (row["Frechet distance"] == "-") == latents and {*clips} == {not latents}
    assert ("2 seeds; no samples. Mean" in text) == latents and "step: 8 images, bfloat16 autocast, " in text
    assert [p.name for p in out.glob("*.png")] == ["routes.png"] and "![routes.png](routes.png)" in text
    assert_picture(out / "routes.png")
    assert len([*out.glob("*/*/samples.npz")]) == (0 if latents else 4) and list(results) == TWO[1:3]
    if latents:
        args = argparse.Namespace(models=["DyDi-LiT"], size="S/2", data=f"{tmp_path}/data", out="out", seeds=1, nproc=1)
        plan = ablate.plan(args, ["--samples", "30", "--cfg=4"])
        assert train_min.parse(plan["DyDi-LiT", 0])[2].samples == 30
        with pytest.raises(ValueError, match="--cfg and --sampling-steps do nothing without --s"):
            ablate.plan(args, ["--cfg=4"])


def test_samples_of_latents_are_said_not_to_be_evaluated(digits, finished, monkeypatch):
    out = finished[0] / "DyDi-LiT" / "0"
    model, about = load_model(out / "ckpt.pt")
    monkeypatch.setattr(ablate, "load_model", lambda path: (model, about | {"meta": about["meta"] | {"scaling": 0.5}}))
    result = ablate.measured(out, digits, out / "samples.npz", "cpu")
    assert "eval_min.py" in result["not_evaluated"] and "kid" not in result
    assert "not_evaluated" not in ablate.measured(out, digits, None, "cpu")


def alive(group):
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True


def test_killed_and_continued_it_gives_the_same_table(finished, digits, tmp_path):
    """The real command, in processes; all of them killed when the second run has left its first checkpoint."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "error"}
    command = [sys.executable, ROOT / "ablate.py", *TWO, f"--data={digits}", f"--out={tmp_path}", *TINY, "--jobs=1"]

    def begin():
        return subprocess.Popen(command, env=environment, start_new_session=True, text=True, cwd=tmp_path,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    process, second = begin(), tmp_path / "DyDi-LiT" / "0"
    while not (second / "ckpt.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.time() + 10
    while alive(process.pid) and time.time() < deadline: time.sleep(0.05)
    kept = [(tmp_path / name / "0" / "ckpt.pt").stat().st_mtime_ns for name in ("ladder-0-sana", "DyDi-LiT")]
    assert (tmp_path / "ladder-0-sana" / "0" / "result.json").exists() and not (second / "result.json").exists()
    assert not (tmp_path / "ablate.md").exists()
    process = begin()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr + "".join(p.read_text() for p in tmp_path.rglob("output.txt"))
    assert "1/3  DyDi-LiT, seed 0: held-out loss" in stdout and "3/3  DyDi-LiT, seed 1" in stdout
    assert (tmp_path / "ladder-0-sana" / "0" / "ckpt.pt").stat().st_mtime_ns == kept[0], "not trained again"
    tables = [cells((out / "ablate.md").read_text()) for out in (finished[0], tmp_path)]
    costly = len(tables[0]["model"]) - 2
    one, other = ({model: row[:costly] for model, row in table.items()} for table in tables)
    assert one == other
    assert all(float(row[-1]) > 0.1 for name, row in tables[1].items() if name in ("ladder-0-sana", "DyDi-LiT")), "MiB"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--models", "DiT", "DyDiT"], r"unknown model 'DyDiT'; known: DyDi-LiT, no-normalize, .*batch-norm, DiT, .*map-w"),
    (["--preset-size=S/3"], r"unknown preset '\S*S/3'; known: S/2, B/2, L/2, pixels32, photos, digits"),
    (["--seeds=0"], "--seeds, --jobs and --nproc must be at least 1"),
    (["--models", "DiT", "--lr=-1"], "Training.lr must be"),
    (["--models", "DiT", "DyDi-LiT", "--preset", "photos"], "no --preset: --preset-size and --models instead"),
    (["--preset=photos"], "no --preset: --preset-size and --models instead"),
    (["--seed", "3"], "no --seed: --seeds instead"),
    (["--seed=3"], "no --seed: --seeds instead"),
    (["--models", "DyDi-LiT", "--preset-size=DiT-digits"], "unknown preset 'DiT-digits'; known: S/2"),
    (["--models", "DiT", "Sana", "--attention=relu"], "DiT would not be what its name says: flags change its atten"),
    (["--models", "no-normalize", "--normalize"], "no-normalize would not be .* flags change its normalize"),
    (["--models", "DyDi-LiT", "no-normalize", "--no-normalize"], "DyDi-LiT and no-normalize are one and the same mod"),
    (["--nproc=3"], "batch_size 64 for --nproc 3: not divisible"),
    (["--nproc=2", "--micro-batch=12"], "batch_size 64 for --nproc 2: not divisible, or not by micro_batch 12"),
    (["--resolutions", "256", "500"], "--resolutions must be multiples of 16"),
])
def test_a_wrong_argument_is_an_error_before_anything_runs(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ValueError, match=message): ablate.main([*arguments, f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def test_what_no_name_stands_for_may_be_changed():
    args = argparse.Namespace(models=["DiT", "DyDi-LiT", "DiT", "no-normalize"], size="digits", data=None, out="out",
                              seeds=2, nproc=2)
    plans = [ablate.plan(args, ["--depth=2", "--n-kernels=4", "--no-router-grad", "--micro-batch=16", *more])
             for more in ([], ["--resume"])]  # each run is continued if it is there
    assert plans[0] == plans[1] and len(plans[0]) == 6
    configs = [train_min.parse(argv)[0] for argv in plans[0].values()]
    assert all((c.depth, c.n_kernels, c.router_grad) == (2, 4, False) for c in configs)


def test_every_model_is_trained_as_its_name_says():
    configs = {name: train_min.parse(ablate.arguments(name, "digits"))[0] for name in [*ablate.ALTERNATIVES, *VARIANTS]}
    digits = dydilit.PRESETS["digits"]
    assert configs["DyDi-LiT"] == digits and configs["DiT"] == variant("DiT", digits)
    assert configs["no-normalize"] == replace(digits, normalize=False)
    assert configs["no-router-grad"] == replace(digits, router_grad=False)
    assert configs["batch-norm"] == replace(variant("ladder-5-dwc", digits), batch_norm=True)
    assert {*ablate.REDUCED} <= configs.keys() and {*figures.RUNGS} <= {*ablate.REDUCED}


def test_a_run_that_diverges_is_a_result(finished, digits, tmp_path):
    arguments = [*ablate.arguments("DyDi-LiT", "digits"), *TINY, "--lr=1e30", "--warmup=0", f"--data={digits}",
                 "--resume", f"--out={tmp_path}"]
    ablate.work(arguments)
    result = ablate.result_of(arguments)
    assert result["diverged"].startswith("step 1: loss") and ablate.outcome(result) == result["diverged"]
    of = json.loads((finished[0] / "results.json").read_text()) | {"broken": {"0": result}}
    of["DyDi-LiT"]["1"] = result
    table = cells(f"\n\n\n\n{ablate.quality(of, {m: [0.001, 1] for m in of})}")
    assert table["broken (1 diverged)"] == ["-"] * (2 + len(ablate.COLUMNS)) + ["-", "1", "1"]
    assert cells(f"\n\n\n\n{ablate.quality(of, {'DyDi-LiT': [None, None]})}")["DyDi-LiT (1 diverged)"][-2:] == ["-"] * 2
    one = of["DyDi-LiT"]["0"]["held_out_loss"]
    assert float(table["DyDi-LiT (1 diverged)"][2]) == pytest.approx(one, rel=1e-3), "without a spread"


def test_several_processes_and_jobs(finished, tmp_path, monkeypatch):
    """--nproc: torchrun; --jobs: so many at once. A run that fails is named at the end, after all the others."""
    commands, active = [], []

    class Failing:
        def __init__(self, command, env, stdout, stderr):
            commands.append(command)
            active.append(self)
            assert len(active) <= 3 and (env["OMP_NUM_THREADS"] == "1" or "OMP_NUM_THREADS" in os.environ)

        def poll(self):
            self.returncode = 1
            if len(active) == 3 or len(commands) == 4: active.clear()
            return None if self in active else 1

        def terminate(self): pass

    monkeypatch.setattr(subprocess, "Popen", Failing)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    arguments = [a.replace(str(finished[0]), str(tmp_path)) for a in finished[1]]
    with pytest.raises(OSError, match=r"not finished: .*ladder-0-sana/0 \(exit status 1; .*DyDi-LiT/1 \(exit"):
        ablate.main([*arguments, "--nproc=2", "--jobs=3"])
    assert [c[1:7] for c in commands] == [["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                           str(ROOT / "ablate.py"), "--one-run"]] * 4


def test_a_run_on_two_processes_ends(digits, tmp_path):
    """The real torchrun, which reads the flags behind the script as well."""
    args = argparse.Namespace(models=["DyDi-LiT"], size="digits", data=digits, out=tmp_path, seeds=1, nproc=2)
    runs = ablate.plan(args, [*TINY, "--steps=4", "--micro-batch=2", "--bf16"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        (result,) = ablate.complete(runs, 1, 2).values()
    assert result["held_out_loss"] > 0 and result["n"] == 40


def test_interrupted_it_ends_the_runs_that_it_has_started(finished, tmp_path, monkeypatch):
    calls = []

    class Endless:
        def __init__(self, *_, **__): calls.append("start")
        def terminate(self): calls.append("terminate")
        def wait(self): calls.append("wait")

        def poll(self):
            if calls.count("start") == 2: raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Endless)
    with pytest.raises(KeyboardInterrupt):
        ablate.main([*(a.replace(str(finished[0]), str(tmp_path)) for a in finished[1]), "--jobs=2"])
    assert calls == ["start"] * 2 + ["terminate"] * 2 + ["wait"] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Costs.


def test_times_are_medians_of_steps_that_take_turns(monkeypatch):
    order, models = [], {"a": BASE, "b": variant("DiT", BASE)}

    def seconds(step, device):
        step()
        order.append(step)
        return float(len(order) ** 2)  # 1 4 9 16 25 36 49 64: the first round, 1 and 4, does not count

    monkeypatch.setattr(costs, "seconds", seconds)
    assert costs.times_of(models, 2, "cpu", True, 3) == {"a": 25.0, "b": 36.0}
    assert order[0::2] == [order[0]] * 4 and order[1::2] == [order[1]] * 4 and order[0] is not order[1]


@pytest.mark.parametrize(("train", "bf16"), [(True, False), (True, True), (False, False)])
def test_a_step_is_a_step(train, bf16, monkeypatch):
    torch.manual_seed(0)
    built, autocast = [], []
    monkeypatch.setattr(Config, "build", lambda self: built.append(dydilit.DyDiLiT(self)) or built[0])
    step = costs.step_of(BASE, 2, "cpu", train, bf16)
    built[0].register_forward_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    before = [p.clone() for p in built[0].parameters()]
    step()
    assert autocast == [bf16]
    changed = any(not torch.equal(*pair) for pair in zip(before, built[0].parameters()))
    assert changed == train and built[0].training == train


def test_what_was_measured_once_is_kept_for_as_long_as_it_holds(tmp_path):
    calls = []
    def measure(): return calls.append(1) or [len(calls)]
    results = [costs.once(tmp_path / "c.json", {"batch": batch}, measure) for batch in (1, 1, 2, 2, 1)]
    assert results == [[1], [1], [2], [2], [3]]


def test_memory_is_that_of_the_step_alone():
    """torch itself, some hundred MiB, is not in it; the activations of 512 images are."""
    found = costs.memory_of(["--preset=digits", "--hidden-size=32"], 8, 512, True)
    assert 100 < found < 1000
    assert costs.memory_of(["--preset=digits", "--hidden-size=32"], 8, 8, False) < found / 10


@pytest.mark.parametrize(("flags", "nproc", "batch", "words"), [
    ([], 1, 64, "64 images, float32, "),
    (["--bf16"], 4, 16, "16 images (of 64: what a process takes at once), bfloat16 autocast, "),
    (["--micro-batch=8"], 2, 8, "8 images (of 64: what a process takes at once), float32, "),
])
def test_a_training_step_is_measured_as_it_is_trained(flags, nproc, batch, words, tmp_path, monkeypatch):
    """One process's share of the images, or what it takes of it at once; under autocast, or not. The words say so."""
    calls = {}
    def times_of(configs, *how): return calls.update(time=how) or dict.fromkeys(configs, 0.5)
    def memory_of(argv, *how): return calls.update(memory=how) or 7.0
    monkeypatch.setattr(costs, "times_of", times_of)
    monkeypatch.setattr(costs, "memory_of", memory_of)
    models = {"a": ["--preset=digits", *flags]}
    found, where = costs.training_costs(models, tmp_path / "costs.json", nproc)
    assert found == {"a": [0.5, 7.0]} and where.startswith(words)
    assert calls == {"time": (batch, "cpu", True, 9, "--bf16" in flags), "memory": (8, batch, True)}
    again = costs.training_costs({"a": ["--preset=digits", "--hidden-size=32"]}, tmp_path / "costs.json", 2)
    assert again[1].startswith("32 images (of 64") and calls["memory"] == (8, 32, True), "not what was kept"
    steps = []
    monkeypatch.setattr(costs, "step_of", lambda *how: steps.append(how[1:]) or (lambda: None))
    costs.print_memory(models["a"], 8, batch, True)
    assert steps == [(batch, "cpu", True, "--bf16" in flags)]


def test_what_does_not_fit_in_memory_has_no_costs(tmp_path, monkeypatch, capfd):
    """More images than there are addresses. It is the CPU's allocator that says so, and the kernel, with a signal."""
    models = {"a": ["--preset=digits", "--batch-size=10000000000000"]}
    assert costs.memory_of(models["a"], 8, 10**13, True) == math.inf
    assert costs.times_of({"a": BASE, "b": BASE}, 10**13, "cpu", True, 1) == {"a": None, "b": None}
    assert costs.training_costs(models, tmp_path / "costs.json")[0] == {"a": [None, None]}
    assert costs.training_costs(models, tmp_path / "costs.json")[0] == {"a": [None, None]}, "kept"
    for code, found in ((-signal.SIGKILL, math.inf), (1, None)):
        monkeypatch.setattr(subprocess, "run", lambda command, code=code, **_: subprocess.CompletedProcess(
            command, code, "", "some other error"))
        if found: assert costs.memory_of(models["a"], 8, 2, True) == found
        else:
            with pytest.raises(OSError, match="some other error"): costs.memory_of(models["a"], 8, 2, True)
    for error, known in ((torch.OutOfMemoryError("CUDA"), True), (RuntimeError("shapes"), False)):
        assert costs.no_room(error) == known


def test_models_that_do_not_fit_together_are_timed_one_by_one(monkeypatch):
    """What was timed leaves nothing in memory, also when nothing collects cycles by chance. Other errors are raised."""
    alive, build = weakref.WeakSet(), Config.build

    def noted(self):
        alive.add(model := build(self))
        return model

    def seconds(step, device):
        step()
        if len(alive) > 1: raise torch.OutOfMemoryError("CUDA out of memory")
        if next(iter(alive)).config.depth == 3: raise torch.OutOfMemoryError("CUDA out of memory")
        return next(iter(alive)).config.depth

    monkeypatch.setattr(Config, "build", noted)
    monkeypatch.setattr(costs, "seconds", seconds)
    models = {str(depth): replace(BASE, depth=depth) for depth in (1, 3, 2)}
    gc.collect()
    gc.disable()
    try: assert costs.times_of(models, 2, "cpu", True, 1) == {"1": 1, "3": None, "2": 2}
    finally: gc.enable()
    assert len(alive) == 0
    monkeypatch.setattr(costs, "seconds", lambda step, device: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"): costs.times_of(models, 2, "cpu", True, 1)


def test_where_nobody_counts_memory_there_are_times(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(costs, "PROC", tmp_path / "none")
    costs.print_memory(["--preset=digits", "--hidden-size=16"], 8, 2, True)
    nan = float(capsys.readouterr().out)
    assert math.isnan(nan)
    monkeypatch.setattr(costs, "memory_of", lambda *_: nan)
    found = costs.costs_of({"a": []}, {"a": BASE}, 2, "cpu", True, 1)["a"]
    assert found[0] > 0 and found[1] is None


# ---------------------------------------------------------------------------------------------------------------------
# Pictures.


def assert_picture(path, colours=20):
    """Wide enough, and not blank: many colours, and something in each quarter."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    h, w, _ = pixels.shape
    assert w == 1200 and h > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > colours
    assert all(part.std() > 5 for half in np.array_split(pixels, 2) for part in np.array_split(half, 2, axis=1))


def test_figures_are_drawn_of_the_runs(finished):
    out, _ = finished
    pictures = ["attention.png", "curves.png", "routes.png", "smoothness.png"]
    assert sorted(p.name for p in out.glob("*.png")) == pictures
    for name in pictures:
        assert_picture(out / name)
        assert f"![{name}]({name})" in (out / "ablate.md").read_text()


def test_figures_of_numbers(tmp_path, monkeypatch):
    save, drawn = figures.save, []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.extend(figure.axes) or save(figure, path))
    models = ("ladder-4-difference", "map-wise", "rising-lambda")
    rows = {name: [[0.01, 0.02, 0.03], [0.02, 0.03, 0.05]] for name in models}
    assert figures.lambdas(tmp_path / "lambdas.png", rows) == "lambdas.png"
    points = {name: [[256, 0.1, 20.0], [512, 0.4, 90.0]] for name in costs.S2}
    assert figures.resolutions(tmp_path / "resolutions.png", points, "somewhere") == "resolutions.png"
    for name in ("lambdas.png", "resolutions.png"): assert_picture(tmp_path / name)
    for rows, panels in (([[256, 0.1, 20.0], [512, None, None]], 2), ([[256, 0.1, None], [512, 0.2, None]], 1),
                         ([[256, None, None]], 0)):  # too large; not counted; nothing at all
        drawn.clear()
        found = figures.resolutions(tmp_path / "resolutions.png", dict.fromkeys(costs.S2, rows), "somewhere")
        assert found == ("resolutions.png" if panels else None) and len(drawn) == panels


def test_images_keep_their_grey_levels_and_latents_their_contrast():
    x = torch.linspace(-1, 1, 8).view(1, 2, 4)
    assert np.allclose(figures.image_of(x)[..., 0], (x[0] + 1) / 2)
    assert np.allclose(figures.image_of(4 * x)[..., 0], (x[0] + 1) / 2)


def test_a_route_figure_shows_the_shares_of_the_tokens(finished, tmp_path, monkeypatch):
    """A model whose routers of Q' send everything to the second projector: every cell says so."""
    model = load_model(finished[0] / "DyDi-LiT" / "0" / "ckpt.pt")[0]
    texts = []
    monkeypatch.setattr(figures.plt.Axes, "text", lambda self, x, y, s, **how: texts.append(s))
    with torch.no_grad():
        for block in model.blocks: block.attn.q_projector_router.zero_()
    log = read_log(finished[0] / "DyDi-LiT" / "0")
    figures.routes(tmp_path / "routes.png", model, {"classes": list("0123456789")}, [log])
    assert texts[:20] == ["1: 100%"] * 20 and len(texts) == 40
    assert all(re.fullmatch(r"[123]: \d+%", text) for text in texts)


def test_a_route_figure_has_a_panel_of_the_log_if_it_says_anything(finished, tmp_path, monkeypatch):
    model = load_model(finished[0] / "DyDi-LiT" / "0" / "ckpt.pt")[0]
    log, drawn = read_log(finished[0] / "DyDi-LiT" / "0"), []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(len(figure.axes)) or path.name)
    silent = [{k: v for k, v in x.items() if k != "usage_entropy"} for x in log]
    for logs in ([log, log], [silent], [log, silent]):
        assert figures.routes(tmp_path / "r.png", model, {"classes": ["0", "1"]}, logs) == "r.png"
    assert drawn == [3, 2, 2]
