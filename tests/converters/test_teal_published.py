import dataclasses
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from converters import read_config
from converters.teal_published import LOOKUP_COLUMNS, SiteHistogram, check_widths, read_histograms, read_lookup
from teal_jax.config import ModelConfig
from teal_jax.errors import CheckpointError

HEADER = ",".join(LOOKUP_COLUMNS)
SITE_FILES = ("self_attn.h1", "self_attn.h2", "mlp.h1", "mlp.h2")  # attn_in, attn_out, mlp_in, mlp_hidden


@pytest.fixture
def published(fixtures: Path) -> Path:
    return fixtures / "teal_published"


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "published"))


def model(**fields) -> ModelConfig:
    sizes = {"vocab_size": 32000, "d_model": 4096, "d_mlp": 11008, "num_layers": 2, "num_heads": 32, "num_kv_heads": 32}
    return ModelConfig(**{**sizes, "head_dim": 128, "max_position": 4096, "norm_eps": 1e-5, **fields})


def histograms(*totals: float, layers: int = 2) -> tuple:
    """Histograms whose counts sum to `totals`, spread over bins as float32 counts."""
    centers = np.linspace(-1, 1, 1000, dtype=np.float32)
    sites = tuple(SiteHistogram(np.full(1000, total / 1000, np.float32), centers, round(total)) for total in totals)
    return (sites,) * layers


def test_histograms_are_what_torch_saved(published: Path):
    expected = np.load(published / "expected.npz")
    layers = read_histograms(published)
    assert len(layers) == 2
    for number, layer in enumerate(layers):
        assert len(layer) == 4
        for name, site in zip(SITE_FILES, layer, strict=True):
            counts, centers = expected[f"{number}.{name}"], expected[f"{number}.{name}_centers"]
            assert site.counts.dtype == site.centers.dtype == np.float32
            np.testing.assert_array_equal(site.counts, counts)
            np.testing.assert_array_equal(site.centers, centers)
    assert [site.num_values for site in layers[1]] == [640 * 64, 640 * 64, 640 * 64, 640 * 144]


def test_either_folder_may_be_given(published: Path):
    for ours, theirs in zip(read_histograms(published), read_histograms(str(published / "histograms")), strict=True):
        np.testing.assert_array_equal(ours[3].counts, theirs[3].counts)
    assert len(read_lookup(published)) == len(read_lookup(published / "lookup")) == 2


def test_lookup(published: Path):
    assert LOOKUP_COLUMNS[3:] == ("q", "k", "v", "o", "gate", "up", "down")
    first, second = read_lookup(published)
    assert (first.dtype, first.shape) == (np.float64, (4, 10))
    np.testing.assert_allclose(second[2], [0.2, 2.0, 2.5, *[0.2] * 7], rtol=1e-15)


def test_layers_are_ordered_by_number(copy: Path):
    for i in range(2, 11):
        shutil.copytree(copy / "lookup" / "layer-1", copy / "lookup" / f"layer-{i}")
    (copy / "lookup" / "layer-10" / "results.csv").write_text(f"{HEADER}\n{','.join('7' * 10)}\n")
    (copy / "lookup" / "Untitled").mkdir()  # the published folders hold strays
    tables = read_lookup(copy)
    assert len(tables) == 11
    assert tables[10][0, 0] == 7


def test_a_missing_layer_is_named(copy: Path):
    shutil.rmtree(copy / "histograms" / "layer-0")
    with pytest.raises(CheckpointError, match="lacks layer-0 of its 2 layers"):
        read_histograms(copy)
    shutil.rmtree(copy / "histograms")
    for folder in (copy, copy / "absent"):
        with pytest.raises(CheckpointError, match="no layer-0, layer-1"):
            read_histograms(folder)


def test_a_missing_file_is_named(copy: Path):
    (copy / "histograms" / "layer-1" / "mlp" / "histograms.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no such file: .*layer-1.mlp.histograms\.pt"):
        read_histograms(copy)
    (copy / "lookup" / "layer-0" / "results.csv").unlink()
    with pytest.raises(CheckpointError, match=r"no such file: .*layer-0.results\.csv"):
        read_lookup(copy)


def test_a_missing_histogram_is_named(copy: Path):
    path = copy / "histograms" / "layer-0" / "mlp" / "histograms.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content.replace(b"h2_centers", b"h3_centers"))
    with pytest.raises(CheckpointError, match=r"lacks h2_centers: it has h1, .*h3_centers"):
        read_histograms(copy)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"h1": np.ones(3)}, "lacks h1_centers"),
        ({"h1": np.ones(3), "h1_centers": np.ones(4)}, "two rows of bins"),
        ({"h1": np.ones((2, 2)), "h1_centers": np.ones((2, 2))}, "two rows of bins"),
        ({"h1": np.array([1, np.nan]), "h1_centers": np.arange(2)}, "finite counts"),
        ({"h1": np.array([1, -1]), "h1_centers": np.arange(2)}, "finite counts"),
        ({"h1": np.zeros(2), "h1_centers": np.arange(2)}, "not all of them 0"),
        ({"h1": np.ones(2), "h1_centers": np.array([1, 0])}, "must ascend"),
    ],
)
def test_malformed_histograms(published: Path, monkeypatch, tensors: dict, message: str):
    monkeypatch.setattr("converters.teal_published.load_tensors", lambda _: tensors)
    with pytest.raises(CheckpointError, match=message):
        read_histograms(published)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a table"),
        (f"{HEADER}\n".encode(), "rows of 10 finite numbers"),
        (b"a,b\n1,2\n", "has columns a, b: expected Effective Sparsity"),
        (f"{HEADER}\n1,2,3\n".encode(), "rows of 10 finite numbers"),
        (f"{HEADER}\n{'1,' * 9}1\n1,2\n".encode(), "not a table"),
        (f"{HEADER}\n{'1,' * 9}one\n".encode(), "not a table"),
        (f"{HEADER}\n{'1,' * 9}nan\n".encode(), "rows of 10 finite numbers"),
        (b"\xff\xfe", "not a table"),
    ],
)
def test_malformed_lookup(copy: Path, content: bytes, message: str):
    (copy / "lookup" / "layer-1" / "results.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_lookup(copy)


def test_widths_that_fit(published: Path, fixtures: Path):
    config = dataclasses.replace(read_config(fixtures / "tiny_llama3"), num_layers=2)
    check_widths(config, read_histograms(published))


def test_the_published_llama_3_8b_folder_is_refused():
    tokens = 56_320
    llama_2_7b = histograms(tokens * 4096, tokens * 4096, tokens * 4096, tokens * 11008)
    check_widths(model(), llama_2_7b)
    llama_3_8b = model(d_mlp=14336, num_kv_heads=8, vocab_size=128256)
    with pytest.raises(CheckpointError, match=r"layer 0, mlp_hidden has 2\.6875 times .* mlp_in, .* 3\.5000"):
        check_widths(llama_3_8b, llama_2_7b)
    check_widths(llama_3_8b, histograms(*[43_520 * width for width in (4096, 4096, 4096, 14336)]))


def test_7b_and_13b_are_told_apart_although_rounded():
    slightly_lossy = histograms(*[17_920 * width * 0.9999 for width in (5120, 5120)], 17_920 * 5120, 17_920 * 13824)
    check_widths(model(d_model=5120, d_mlp=13824, num_heads=40, num_kv_heads=40), slightly_lossy)
    with pytest.raises(CheckpointError, match=r"mlp_hidden has 2\.7000 .* 2\.6875"):
        check_widths(model(), slightly_lossy)


def test_other_sites_and_layers_are_checked():
    good = histograms(4096e4, 4096e4, 4096e4, 11008e4)
    bad = histograms(4096e4, 2048e4, 4096e4, 11008e4)
    with pytest.raises(CheckpointError, match=r"layer 1, attn_out has 0\.5000 times .* 1\.0000"):
        check_widths(model(), good[:1] + bad[:1])
    with pytest.raises(CheckpointError, match="of 3 layers, the model has 2"):
        check_widths(model(), good + good[:1])
    # Heads that are together narrower than the model.
    check_widths(model(head_dim=64), bad)
