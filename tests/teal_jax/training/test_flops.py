import dataclasses

import jax.numpy as jnp
import pytest

from teal_jax.progress import Bar
from teal_jax.training import course
from teal_jax.training.devices import make_mesh
from teal_jax.training.flops import peak_flops, training_flops
from tests.teal_jax.training.tiny import CONFIG, SETTINGS


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(Device(kind)) == peak


def test_operations_by_hand():
    # q 16x16, k and v 16x8, o 16x16, gate and up 16x24, down 24x16, the head 64x16; two heads of 8 over 10 tokens.
    weights = 256 + 128 + 128 + 256 + 3 * 384 + 1024
    assert training_flops(CONFIG, 10) == 6 * weights + 6 * 16 * 10
    assert training_flops(CONFIG, 10, teacher=True) == 8 * weights + 8 * 16 * 10


def test_the_share_of_peak_that_is_shown(monkeypatch):
    lines, shown = [], []

    class Log:
        def write(self, **row):
            lines.append(row)

    class Shown(Bar):
        def advance(self, n=1, *, description=None):
            shown.append(description)

    monkeypatch.setattr(course, "peak_flops", lambda device: 1e9)
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16")
    told = course.Course(CONFIG, settings, make_mesh(1), Log(), Shown(enabled=False), None)
    for step in (1, 2):
        told.add(
            step, 64, {"loss": jnp.float32(2.5), "gradient_norm": jnp.float32(1), "learning_rate": jnp.float32(0.1)}
        )
        told.settle()
    speed = 64 / lines[1]["seconds"]
    assert lines[1]["tokens_per_second"] == pytest.approx(speed, rel=0.01, abs=1)
    assert lines[1]["share_of_peak"] == pytest.approx(speed * training_flops(CONFIG, 8) / 1e9, rel=0.01, abs=1e-3)
    assert "seconds" not in lines[0]
    assert "loss 2.500" in shown[1]
    assert "tok/s" in shown[1]
    assert "% peak" in shown[1]
