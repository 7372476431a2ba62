import pytest

from teal_jax.training.flops import peak_flops, training_flops
from tests.teal_jax.training.tiny import CONFIG


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
