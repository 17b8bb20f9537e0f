"""Training: the images that a step sees, the loop against values by hand, checkpoints, resuming.

tests/train has what takes several processes, and what goes wrong.
"""

import json
import math
import os
import signal
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    CONFIG,
    assert_same_run,
    at_step,
    contents,
    differing,
    parts,
    read_log,
    resume,
    without_speed,
    write_set,
)
from util import assert_close

import dydilit
from dydilit import (
    Data,
    Diffusion,
    DyDiLiT,
    Training,
    learning_rate,
    load_checkpoint,
    train,
)

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def numbered(tmp_path):
    """23 images that show their own number in brightness, the left half alone; 5 are held out.

    The black half shows whether an image is flipped, which the set allows.
    """
    images = np.zeros((23, 1, 8, 8), np.uint8)
    images[..., :4] = np.arange(1, 24)[:, None, None, None]
    labels = np.arange(23) % 10
    return Data(write_set(tmp_path / "numbered", images, labels, held_out=5, flip=True), CONFIG)


def numbers(x):
    """The rows of `numbered` that a batch shows."""
    pixels = ((x + 1) * 127.5).round().long()
    return (pixels.amax((1, 2, 3)) - 1).tolist()


def flipped(x):
    """Which images of a batch of `numbered` are flipped."""
    pixels = ((x + 1) * 127.5).round().long()
    return (pixels[:, 0, 0, 7] > 0).tolist()


# ----------------------------------------------------------------------------------------------
# The images, flips, labels, timesteps and noise of a step.


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_all_ranks_are_the_batch_of_one_process_bit_for_bit(numbered, world):
    for step in range(4):  # 8 images of 18: the third batch spans two epochs
        whole = numbered.batch(0, step, 8, range(8), 0.5)
        ranges = [range(r * 8 // world, (r + 1) * 8 // world) for r in range(world)]
        shares = [numbered.batch(0, step, 8, share, 0.5) for share in ranges]
        assert not differing(whole, [torch.cat(z) for z in zip(*shares)])


def test_a_batch_is_a_function_of_seed_and_step(numbered):
    whole = range(8)
    batch = numbered.batch(3, 5, 8, whole, 0.5)
    numbered.batch(3, 9, 8, whole, 0.5)  # a later epoch in between must leave no trace
    assert not differing(batch, numbered.batch(3, 5, 8, whole, 0.5))


@pytest.mark.parametrize("seed, step", [(3, 6), (4, 5)])
def test_another_step_and_another_seed_share_nothing_with_a_batch(numbered, seed, step):
    x, _, t, noise = numbered.batch(3, 5, 8, range(8), 0.5)
    other = numbered.batch(seed, step, 8, range(8), 0.5)
    assert numbers(other[0]) != numbers(x)
    assert not torch.equal(other[2], t)
    assert not torch.isclose(other[3], noise).any()  # not one pixel in common


def test_no_two_images_of_a_batch_share_timestep_and_noise(numbered):
    _, _, t, noise = numbered.batch(0, 0, 16, range(16), 0.0)
    assert len(set(t.tolist())) > 12
    assert not torch.isclose(noise[0], noise[1:]).any()


def test_every_epoch_shows_every_training_image_once_in_an_order_of_its_own(numbered):
    seen = []
    for step in range(27):  # 27 batches of 8 are 12 epochs of 18
        seen += numbers(numbered.batch(0, step, 8, range(8), 0.0)[0])
    epochs = [seen[i : i + 18] for i in range(0, len(seen), 18)]
    assert len(epochs) == 12 and all(sorted(e) == list(range(18)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 12


def test_held_out_batch_is_the_last_rows_with_their_own_labels(numbered):
    x, y, *_ = numbered.held_out()
    assert numbers(x) == [18, 19, 20, 21, 22] and flipped(x) == [False] * 5
    assert y.tolist() == [8, 9, 0, 1, 2]


def test_held_out_batch_never_changes(numbered):
    batch = numbered.held_out()
    numbered.batch(0, 0, 8, range(8), 0.5)
    assert not differing(batch, numbered.held_out())
    assert len(numbered.held_out(most=3)[0]) == 3
    assert not differing([z[:3] for z in batch], numbered.held_out(most=3))


def test_a_set_without_held_out_rows_trains_without_held_out_losses(tmp_path, run):
    write_set(tmp_path / "set", np.zeros((9, 1, 8, 8), np.uint8), np.zeros(9, np.int64))
    train(CONFIG, replace(run, data=str(tmp_path / "set"), steps=2))
    assert len(read_log(run.out)) == 2
    for line in read_log(run.out):
        assert not line.keys() & {"held_out_loss", "held_out_mse"}


def test_without_held_out_rows_an_evaluation_gets_the_images_of_its_step(tmp_path, run):
    images, seen = np.arange(9 * 64, dtype=np.uint8).reshape(9, 1, 8, 8), []
    data = write_set(tmp_path / "set", images, np.zeros(9, np.int64))
    run = replace(run, data=str(data), log_every=100, eval_every=2, steps=5)

    def on_eval(ema, batch):
        seen.append(batch)
        return {"seen": len(seen)}

    train(CONFIG, run, on_eval=on_eval)
    assert [(line["step"], line["seen"]) for line in read_log(run.out)] == [(2, 1), (4, 2), (5, 3)]
    for step, batch in zip((1, 3, 4), seen):
        want = Data(data, CONFIG).batch(run.seed, step, 8, range(8), run.label_dropout)
        assert not differing(list(batch), want)


def test_half_of_the_images_are_flipped_if_the_set_allows_it(numbered):
    count = 0
    for step in range(100):
        count += sum(flipped(numbered.batch(0, step, 8, range(8), 0.0)[0]))
    assert abs(count / 800 - 0.5) < 0.07  # four standard deviations


def test_no_image_is_flipped_if_the_set_forbids_it(numbered):
    numbered.meta["flip"] = False
    for step in range(20):
        assert not any(flipped(numbered.batch(0, step, 8, range(8), 0.0)[0]))


def test_pixels_reach_the_model_as_minus_one_to_one(tmp_path):
    images = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    data = Data(write_set(tmp_path / "set", images, np.zeros(4, np.int64)), CONFIG)
    x = data.batch(0, 0, 4, range(4), 0.0)[0]
    assert x.dtype == torch.float32
    assert_close("pixels", x.flatten().sort().values, torch.arange(256) / 127.5 - 1, atol=1e-6)


def test_labels_are_dropped_at_the_given_rate_and_become_the_class_behind_the_last(numbered):
    config = replace(CONFIG, num_classes=12)  # more than the set has: "no label" is the model's
    data = Data(Path(numbered.images.filename).parent, config)
    dropped = 0
    for step in range(100):
        x, y, *_ = data.batch(0, step, 16, range(16), 0.3)
        right = torch.tensor(numbers(x)) % 10
        assert ((y == right) | (y == 12)).all()
        dropped += (y == 12).sum().item()
    assert abs(dropped / 1600 - 0.3) < 4 * (0.3 * 0.7 / 1600) ** 0.5


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_no_label_is_dropped_at_rate_0_and_every_one_at_rate_1(numbered, dropout):
    y = numbered.batch(0, 0, 16, range(16), dropout)[1]
    assert ((y == 10) == bool(dropout)).all()


def test_timesteps_are_uniform_and_noise_is_standard_normal(numbered):
    drawn = [numbered.batch(0, step, 16, range(16), 0.0)[2:] for step in range(100)]
    t, noise = (torch.cat(z) for z in zip(*drawn))
    assert t.min() >= 0 and t.max() <= 999
    counts = torch.histc(t.float(), 10, 0, 1000)
    assert ((counts - 160).abs() < 4 * 12).all()  # binomial(1600, 0.1)
    n = noise.numel()
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 4 / n**0.5 and abs(noise.var() - 1) < 4 * (2 / n) ** 0.5


# ----------------------------------------------------------------------------------------------
# The loop, against values by hand.


@pytest.fixture
def awake(monkeypatch):
    """Undo adaLN-Zero in every new model, and give the difference a weight.

    A short run would not depend on the attention otherwise.
    """
    initialize = dydilit.initialize

    @torch.no_grad()
    def awake(model):
        initialize(model)
        for name, p in model.named_parameters():
            if "adaLN_modulation" in name or name == "final_layer.linear.weight":
                torch.nn.init.normal_(p, std=0.1)
            if name.endswith("lam"):
                torch.nn.init.uniform_(p, 0.3, 0.7)

    monkeypatch.setattr(dydilit, "initialize", awake)


# Printed by this test on an x86-64 CPU, one thread, torch 2.13, numpy 2.4; the same without AVX2.
RECORDED = [1.12661, 0.91331, 0.78505, 0.70875, 0.65683, 0.60667, 0.5646, 0.51975, 0.48044, 0.46109]


def test_ten_steps_overfit_one_batch_to_the_recorded_losses(run, awake, monkeypatch):
    batch = Data.batch

    def first(self, seed, step, *rest):
        return batch(self, seed, 0, *rest)

    monkeypatch.setattr(Data, "batch", first)
    train(CONFIG, replace(run, steps=10, batch_size=4, warmup=0, decay=0.0))
    losses = [line["loss"] for line in read_log(run.out)]
    print([round(loss, 5) for loss in losses])
    # Another order of summation moves them by 2e-6 here, a change of the attention by 2e-2 and
    # more. In a larger run rounding soon tips a route, and the losses then differ by per cents.
    assert_close("losses", torch.tensor(losses), torch.tensor(RECORDED), atol=0, rtol=1e-3)
    assert losses[-1] < 0.5 * losses[0]


def first_step_by_hand(run):
    """The model that `run` starts from, its losses on the first batch, and their gradients."""
    torch.manual_seed(run.seed)
    model, data = DyDiLiT(CONFIG), Data(run.data, CONFIG)
    n = run.batch_size
    mse, vb = Diffusion().loss(model, *data.batch(run.seed, 0, n, range(n), run.label_dropout))
    gradients = torch.autograd.grad((mse + vb).mean(), list(model.parameters()))
    return model, mse.mean().item(), vb.mean().item(), gradients


def test_the_first_line_of_the_log_is_the_mean_loss_of_the_batch(run, awake):
    train(CONFIG, replace(run, steps=1, decay=0.0))
    _, mse, vb, gradients = first_step_by_hand(run)
    norm = sum(g.double().square().sum() for g in gradients).sqrt().item()
    (line,) = read_log(run.out)
    want = {"mse": mse, "vb": vb, "loss": mse + vb, "grad_norm": norm, "lr": run.lr / 2}
    assert {name: line[name] for name in want} == pytest.approx(want, rel=1e-5)


def test_the_first_step_is_adamw_without_weight_decay(run, awake):
    """From zero moments it is lr g / (|g| + eps); a warm-up of 2 steps halves the rate."""
    train(CONFIG, replace(run, steps=1, decay=0.0))
    model, _, _, gradients = first_step_by_hand(run)
    trained = load_checkpoint(Path(run.out, "ckpt.pt"))["model"]
    compared = 0
    for (name, p), g in zip(model.named_parameters(), gradients):
        sure = g.abs() > 1e-6  # below, rounding decides
        want = p - run.lr / 2 * g / (g.abs() + 1e-8)
        assert_close(name, trained[name][sure], want[sure], atol=2e-6)
        compared += sure.sum()
    assert compared > 5000


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_gradients_are_clipped_and_the_log_has_their_norm_before(run, clip):
    train(CONFIG, replace(run, steps=1, grad_clip=clip))
    norm = read_log(run.out)[0]["grad_norm"]
    assert norm > 0.1
    moments = load_checkpoint(Path(run.out, "ckpt.pt"))["optimizer"]["state"]
    first = sum(s["exp_avg"].double().square().sum() for s in moments.values()).sqrt().item()
    # after one step the first moment is (1 - beta1) g
    assert first / 0.1 == pytest.approx(min(norm, clip or math.inf), rel=1e-4)


def test_averaged_weights_follow_their_formula(run, monkeypatch):
    states = []

    def keep(path, state):
        copies = {part: {k: v.clone() for k, v in state[part].items()} for part in ("model", "ema")}
        states.append(copies)

    monkeypatch.setattr(dydilit, "save_checkpoint", keep)
    train(CONFIG, replace(run, steps=4, ckpt_every=1))
    torch.manual_seed(run.seed)
    start_state = DyDiLiT(CONFIG).state_dict()
    for name, start_value in start_state.items():
        average = start_value.double()
        for state in states:
            average = 0.9 * average + 0.1 * state["model"][name].double()
            assert_close(name, state["ema"][name], average, atol=1e-6)
    assert differing(states[-1]["model"], start_state, 1e-3)  # something moved at all


def test_averaged_weights_keep_no_graph(run):
    """It would grow with every step, and the memory with it."""
    graphs = []

    def on_eval(ema, _):
        graphs.extend(p.grad_fn for p in ema.parameters())
        return {}

    train(CONFIG, run, on_eval=on_eval)
    assert graphs and not any(graphs)


def test_learning_rate_warms_up_stays_and_falls_linearly_to_almost_nothing():
    training = Training(steps=20, lr=2.0, warmup=4, decay=0.25)
    rates = [learning_rate(training, s) for s in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:16] == [2.0] * 12
    assert rates[15:] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


def test_learning_rate_without_warm_up_and_decay_is_constant():
    training = Training(steps=20, lr=2.0, warmup=0, decay=0.0)
    assert [learning_rate(training, s) for s in (0, 10, 19)] == [2.0] * 3


def test_log_holds_the_rate_of_each_step(run):
    train(CONFIG, run)
    assert [line["lr"] for line in read_log(run.out)] == [learning_rate(run, s) for s in range(6)]


def test_lines_come_at_log_every_at_eval_every_and_at_the_last_step(run):
    train(CONFIG, replace(run, steps=7, log_every=2, eval_every=3))
    log = read_log(run.out)
    assert [line["step"] for line in log] == [2, 3, 4, 6, 7]
    assert [line["step"] for line in log if "held_out_loss" in line] == [3, 6, 7]


def test_held_out_losses_are_those_of_the_averaged_weights(run):
    train(CONFIG, run)
    model = DyDiLiT.from_pretrained(Path(run.out, "ckpt.pt"))
    with torch.no_grad():
        mse, vb = Diffusion().loss(model, *Data(run.data, CONFIG).held_out())
    line = read_log(run.out)[-1]
    assert line["held_out_mse"] == pytest.approx(mse.mean().item(), rel=1e-5)
    assert line["held_out_loss"] == pytest.approx((mse + vb).mean().item(), rel=1e-5)


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_held_out_losses_take_no_more_memory_than_training(run, micro_batch, monkeypatch):
    sizes, loss = set(), Diffusion.loss

    def recording(self, net, x, *rest):
        sizes.add(len(x))
        return loss(self, net, x, *rest)

    monkeypatch.setattr(Diffusion, "loss", recording)
    train(CONFIG, replace(run, micro_batch=micro_batch))
    assert max(sizes) == (micro_batch or run.batch_size)


def test_held_out_losses_do_not_depend_on_the_micro_batch(run, tmp_path):
    accumulated = replace(run, out=str(tmp_path / "accumulated"), micro_batch=4, steps=2)
    train(CONFIG, replace(run, steps=2))
    train(CONFIG, accumulated)
    one, other = (read_log(out)[-1]["held_out_loss"] for out in (run.out, accumulated.out))
    assert one == pytest.approx(other, rel=1e-5)


def test_bfloat16_trains_and_its_losses_are_near_those_of_float32(run, awake, tmp_path):
    half = str(tmp_path / "bf16")
    train(CONFIG, run)
    train(CONFIG, replace(run, bf16=True, out=half))
    want, got = (torch.tensor([line["loss"] for line in read_log(o)]) for o in (run.out, half))
    assert not torch.equal(want, got)  # it did something
    assert_close("losses", got, want, atol=0, rtol=0.05)
    assert all(p.dtype == torch.float32 for p in parts(half)["model"].values())


def test_router_grad_off_leaves_the_routers_where_they_were(run, awake):
    config = replace(CONFIG, router_grad=False)
    train(config, run)
    torch.manual_seed(run.seed)
    before, after = DyDiLiT(config).state_dict(), parts(run.out)["model"]
    same = {k for k in before if torch.equal(before[k], after[k])}
    assert same >= {k for k in before if "router" in k}
    assert "blocks.0.attn.qkv.weight" not in same


# ----------------------------------------------------------------------------------------------
# Checkpoints.


def test_a_checkpoint_loads_without_pickle_and_describes_itself_in_plain_words(run):
    train(CONFIG, run)
    ckpt = torch.load(Path(run.out, "ckpt.pt"), weights_only=True)
    weights = {"model", "ema", "optimizer"}
    meta = json.loads(Path(run.data, "meta.json").read_text()) | {"images": 1797}
    labels, images = (Path(run.data, f"{name}.npy").read_bytes() for name in ("labels", "images"))
    meta["crc32"] = zlib.crc32(images[128:], zlib.crc32(labels[128:]))  # behind NumPy's headers
    described = {
        "step": 6,
        "kind": "Config",
        "config": asdict(CONFIG),
        "training": asdict(run),
        "meta": meta,
    }
    assert ckpt.keys() == weights | described.keys()
    assert json.loads(json.dumps({k: ckpt[k] for k in described})) == described
    assert ckpt["model"].keys() == ckpt["ema"].keys() == DyDiLiT(CONFIG).state_dict().keys()


def test_a_run_leaves_a_checkpoint_and_a_log(run):
    train(CONFIG, run)
    assert sorted(contents(run.out)) == ["ckpt.pt", "log.jsonl"]


def test_from_pretrained_gives_the_averaged_weights_ready_for_sampling(run):
    train(CONFIG, run)
    path = Path(run.out, "ckpt.pt")
    model, ckpt = DyDiLiT.from_pretrained(path), load_checkpoint(path)
    assert not differing(dict(model.state_dict()), dict(ckpt["ema"])) and not model.training
    assert differing(dict(ckpt["ema"]), dict(ckpt["model"]))


def test_from_pretrained_of_a_checkpoint_knows_its_data_and_its_step(run):
    train(CONFIG, replace(run, steps=3))
    model = DyDiLiT.from_pretrained(Path(run.out, "ckpt.pt"))
    assert model.config == CONFIG and model.step == 3
    assert model.meta["name"] == "digits" and model.meta["classes"] == list("0123456789")


# ----------------------------------------------------------------------------------------------
# Resuming.


@pytest.fixture
def broken(run, tmp_path, monkeypatch):
    """A run whose data cannot be read at step 5: five steps done, the checkpoint is of step 3."""
    batch, broken = Data.batch, replace(run, out=str(tmp_path / "broken"))

    def unreadable(self, seed, step, *rest):
        if step == 5:
            raise OSError("the disk is gone")
        return batch(self, seed, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(Data, "batch", unreadable)
        train(CONFIG, broken)
    assert [line["step"] for line in read_log(broken.out)] == [1, 2, 3, 4, 5]
    assert parts(broken.out)["step"] == 3
    return broken


def assert_same_bits(a, b):
    """Two folders hold the same checkpoint and the same log."""
    assert not differing(parts(a), parts(b))
    assert without_speed(read_log(a)) == without_speed(read_log(b))


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run, broken):
    train(CONFIG, run)
    assert resume(CONFIG, broken) == 6
    assert_same_bits(run.out, broken.out)


def test_a_line_of_the_log_that_a_full_disk_cut_short_is_removed(run, broken):
    train(CONFIG, run)
    with open(Path(broken.out, "log.jsonl"), "a") as f:
        f.write('{"step": 6, "lo')
    assert resume(CONFIG, broken) == 6
    assert_same_bits(run.out, broken.out)


def test_resuming_a_finished_run_changes_nothing(run):
    train(CONFIG, run)
    before = contents(run.out)
    assert resume(CONFIG, run) == 6
    assert contents(run.out) == before


def test_resume_without_a_checkpoint_starts_at_the_beginning(run, tmp_path):
    train(CONFIG, run)
    fresh = replace(run, out=str(tmp_path / "fresh"))
    Path(fresh.out).mkdir()
    # as a run leaves it that was killed before its first checkpoint
    Path(fresh.out, "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert resume(CONFIG, fresh) == 6
    assert_same_bits(run.out, fresh.out)


def test_resume_in_a_new_folder_starts_at_the_beginning(run):
    assert resume(CONFIG, run) == 6


@pytest.mark.parametrize("s", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_resuming_gives_the_same_bits(
    run, s, tmp_path, monkeypatch
):
    stopped = replace(run, out=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(dydilit, "learning_rate", learning_rate)  # undone afterwards, and at_step
        at_step(lambda step: os.kill(os.getpid(), s) if step == 1 else None)
        assert train(CONFIG, stopped) == 2
    assert parts(stopped.out)["step"] == 2
    assert resume(CONFIG, stopped) == 6
    train(CONFIG, run)
    assert_same_bits(run.out, stopped.out)


def test_signals_are_handled_as_before_once_training_is_over(run):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(CONFIG, replace(run, steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_accumulation_gives_the_same_weights_within_rounding(run, tmp_path):
    train(CONFIG, run)
    accumulated = replace(run, out=str(tmp_path / "accumulated"), micro_batch=2)
    train(CONFIG, accumulated)
    assert_same_run(run.out, accumulated.out)
