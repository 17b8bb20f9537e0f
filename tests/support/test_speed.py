"""support/speed.py: peaks of GPUs, the work of a step, the profile; and TF32 and mfu in train."""

import json
from dataclasses import replace

import pytest
import torch
from runs import CONFIG, read_log

from dydilit import PRESETS, Diffusion, train
from support.speed import SKIPPED, flops_of, in_words, peak_of, profiled


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", (19.5, 156.0, 312.0)),
        ("NVIDIA A10", (31.2, 62.5, 125.0)),
        ("NVIDIA A10G", (35.0, 35.0, 70.0)),
        ("NVIDIA H100 80GB HBM3", (67.0, 494.7, 989.4)),
        ("NVIDIA H100 PCIe", (51.0, 378.0, 756.0)),
        ("NVIDIA L4", (30.3, 60.0, 121.0)),
    ],
)
def test_a_gpu_is_known_by_torchs_name_for_it(name, tflops):
    peaks = peak_of(name), peak_of(name, tf32=True), peak_of(name, bf16=True)
    assert peaks == tuple(1e12 * x for x in tflops)


@pytest.mark.parametrize("name", ["NVIDIA A1000", "Tesla T4", "NVIDIA L400"])
def test_an_unknown_gpu_has_no_peak(name):
    assert peak_of(name) is None


def test_the_work_of_a_step_is_six_operations_for_each_multiply_add_of_a_forward_pass():
    # torch's counter knows no groups in the gradient of a convolution, so it counts forward alone
    assert flops_of(PRESETS["S/2"]) == pytest.approx(6 * 6.72e9, rel=1e-3)


def test_the_share_of_the_peak_is_said_where_it_is_known():
    assert in_words(213.4, 0.0) == "213 images/s"
    assert in_words(213.4, 0.001) == "213 images/s, 21% of peak"


def test_a_profile_holds_the_steps_after_the_first_ten(tmp_path):
    with profiled(2, tmp_path / "profile.json") as step_is_done:
        for step in range(SKIPPED + 4):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(2) + 1
            step_is_done()
    events = json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    names = {e["name"] for e in events if e["name"].startswith("step ")}
    assert names == {f"step {SKIPPED}", f"step {SKIPPED + 1}"}


def test_the_log_has_the_share_of_the_peak_where_it_is_known(run, tmp_path):
    train(CONFIG, run, mfu=0.5)
    for line in read_log(run.out):
        assert line["mfu"] == pytest.approx(line["images_per_s"] / 2, rel=0.01)
    train(CONFIG, replace(run, steps=1, out=str(tmp_path / "unknown")))
    assert "mfu" not in read_log(tmp_path / "unknown")[0]


def test_tf32_is_for_training_steps_alone(run, monkeypatch):
    loss, on = Diffusion.loss, {True: [], False: []}

    def recording(self, model, *batch):
        matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        on[torch.is_grad_enabled()].append(matmul or conv)
        return loss(self, model, *batch)

    monkeypatch.setattr(Diffusion, "loss", recording)
    train(CONFIG, replace(run, tf32=True))
    assert all(on[True]) and len(on[True]) == run.steps
    assert not any(on[False]) and len(on[False]) > 0
