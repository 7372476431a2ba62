import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from converters.torch_zip import load_tensors
from teal_jax.errors import CheckpointError

FLOATS = np.arange(6, dtype=np.float32)


def rebuild(
    *, storage: str = "FloatStorage", key: str = "0", numel: int = 6, offset: int = 0, size=(6,), stride=(1,)
) -> bytes:
    """The opcodes of one tensor as torch writes them, by hand: pickle 2, `_rebuild_tensor_v2(persistent id, ...)`."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def numbers(values) -> bytes:
        return b"(" + b"".join(number(value) for value in values) + b"t"

    pid = (
        b"("
        + text("storage")
        + b"ctorch\n"
        + storage.encode()
        + b"\n"
        + text(key)
        + text("cpu")
        + number(numel)
        + b"tQ"
    )
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + pid + number(offset) + numbers(size) + numbers(stride) + b"\x89" + hooks + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def saved(path: Path, program: bytes, *, extra: dict[str, str] | None = None, compress: bool = False) -> Path:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", FLOATS.tobytes())
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return path


def in_dict(value: bytes) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "histograms.pt"


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tensors(path)


def test_what_torch_wrote(fixtures: Path):
    folder = fixtures / "teal_published"
    tensors = load_tensors(folder / "histograms" / "layer-0" / "mlp" / "histograms.pt")
    assert set(tensors) == {"h1", "h1_centers", "h2", "h2_centers", "h1.5", "h1.5_centers"}
    expected = np.load(folder / "expected.npz")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[f"0.mlp.{name}"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, FLOATS),
        ({"size": (2, 3), "stride": (3, 1)}, FLOATS.reshape(2, 3)),
        ({"size": (2,), "offset": 4}, FLOATS[4:]),
        ({"size": (), "stride": (), "offset": 2}, FLOATS[2]),
        ({"storage": "IntStorage"}, FLOATS.view(np.int32)),
        ({"storage": "DoubleStorage", "numel": 3, "size": (3,)}, FLOATS.view(np.float64)),
    ],
)
def test_handmade_tensors(path: Path, options: dict, expected: np.ndarray):
    tensor = load_tensors(saved(path, in_dict(rebuild(**options))))["a"]
    assert tensor.dtype == expected.dtype
    np.testing.assert_array_equal(tensor, expected)


class Attack:
    """Runs a command when unpickled."""

    def __init__(self, function, *args: object):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_runs_code_is_refused_and_not_run(path: Path, tmp_path: Path, protocol: int):
    witness = tmp_path / "was-run"
    program = pickle.dumps({"h1": Attack(os.mkdir, str(witness))}, protocol)
    pickle.loads(program)
    assert witness.is_dir()  # it does run, in an unpickler that trusts
    witness.rmdir()
    refused(saved(path, program), r"asks for (posix|nt|os)\.mkdir")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "_load_from_bytes"),
        ("numpy", "load"),
        ("collections", "OrderedDict.fromkeys"),
        ("converters.torch_zip", "Path"),
    ],
)
def test_names_that_are_not_needed_are_refused(path: Path, module: str, name: str):
    program = f"c{module}\n{name}\n(S'x'\ntR.".encode()
    refused(saved(path, program), f"asks for {module}.{name}".replace(".", r"\."))


def test_state_set_on_the_function_does_not_outlive_the_file(path: Path):
    from converters import torch_zip

    state = b"(N}X\x0c\x00\x00\x00__defaults__(K\x07ts" + b"tb"
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + state + b"."
    refused(saved(path, program), "must hold a dict")
    assert torch_zip._rebuild_tensor.__defaults__ is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (7,)}, "beyond its storage of 6"),
        ({"offset": 3, "size": (4,)}, "beyond its storage"),
        ({"offset": -1, "size": (2,)}, "beyond its storage"),
        ({"size": (1000,), "stride": (0,)}, "strides"),
        ({"size": (3,), "stride": (2,)}, "strides"),
        ({"size": (-2, -3), "stride": (-3, 1)}, "corrupt|beyond|strides"),
        ({"numel": 7}, "storage 0 has 24 bytes, not 7 x 4"),
        ({"numel": 5, "size": (5,)}, "larger than 20 bytes"),
        ({"numel": -1}, "larger than -4 bytes"),
        ({"key": "../0"}, "storage named '../0'"),
        ({"key": "1"}, "corrupt"),
        ({"storage": "CharStorage"}, r"asks for torch\.CharStorage"),
    ],
)
def test_tensors_that_reach_outside_are_refused(path: Path, options: dict, message: str):
    refused(saved(path, in_dict(rebuild(**options))), message)


def test_other_persistent_ids(path: Path):
    refused(saved(path, in_dict(b"X\x01\x00\x00\x00xQ")), "refers to 'x'")


def test_compressed_and_huge_entries(path: Path):
    refused(saved(path, in_dict(rebuild()), compress=True), "is compressed or larger")
    refused(saved(path, in_dict(rebuild()) + b"\0" * (1 << 20)), "data.pkl is compressed or larger than")


def test_big_endian(path: Path):
    refused(saved(path, in_dict(rebuild()), extra={"archive/byteorder": "big"}), "little-endian")
    assert "a" in load_tensors(saved(path, in_dict(rebuild()), extra={"archive/byteorder": "little"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole zip file"),
        (b"\x80\x02}.", "no whole zip file.*saved again"),  # torch's layout before 1.6 is a bare pickle
        (pickle.dumps({}), "no whole zip file"),
    ],
)
def test_not_a_zip(path: Path, content: bytes, message: str):
    path.write_bytes(content)
    refused(path, message)


def test_missing_and_damaged(path: Path, fixtures: Path):
    refused(path, "no such file")
    whole = (fixtures / "teal_published" / "histograms" / "layer-0" / "mlp" / "histograms.pt").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "no whole zip file")
    position = whole.index(b"data/0") + 200
    path.write_bytes(whole[:position] + b"\xff" * 8 + whole[position + 8 :])
    refused(path, "no whole zip file|corrupt")


def test_zip_without_a_pickle(path: Path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("other/thing", b"")
    path.write_bytes(buffer.getvalue())
    refused(path, "has no data.pkl")


@pytest.mark.parametrize("program", [b"", b".", b"\x80\x02K\x01.", b"\x80\x02].", b"\x80\x02}K\x01K\x02s.", b"\x80c"])
def test_other_contents(path: Path, program: bytes):
    refused(saved(path, program), "corrupt|must hold a dict of tensors")
