import csv
import json

import numpy as np
import pytest

from teal_jax.analysis.distribution import Distribution, of_plan, read_published, shown_target
from teal_jax.errors import CheckpointError


def test_means_over_layers_and_thirds(plans):
    ours = of_plan(plans[0])
    assert (ours.model, ours.target, ours.published) == ("random", 0.3, False)
    np.testing.assert_allclose(ours.by_projection, 0.3)
    sparsity = np.random.default_rng(0).uniform(size=(7, 7))
    row = Distribution(model="m", target=0.4, published=False, sparsity=sparsity.tolist())
    np.testing.assert_allclose(row.by_projection, sparsity.sum(0) / 7)
    np.testing.assert_allclose(row.by_depth, [sparsity[a:b].mean(0) for a, b in ((0, 3), (3, 5), (5, 7))])
    assert row.to_dict()["sparsity"] == sparsity.tolist()
    json.dumps(row.to_dict(), allow_nan=False)


def test_two_layers_have_no_last_third(plans):
    assert np.isnan(of_plan(plans[0]).by_depth[2]).all()
    values = of_plan(plans[0]).to_dict()
    assert values["by_depth"][2] == [None] * 7
    json.dumps(values, allow_nan=False)


def test_shown_target(plans):
    assert shown_target([of_plan(plan) for plan in plans]) == 0.6


def test_a_folder_of_published_models(fixtures, tmp_path):
    model = tmp_path / "Some-Model"
    model.mkdir()
    (model / "lookup").symlink_to(fixtures / "teal_published" / "lookup")
    found = read_published(tmp_path, [0.25, 0.5])
    assert [(row.model, row.target, row.published) for row in found] == [
        ("Some-Model", 0.25, True),
        ("Some-Model", 0.5, True),
    ]
    for row in found:
        for layer, shares in enumerate(row.sparsity):
            with (fixtures / "teal_published" / "lookup" / f"layer-{layer}" / "results.csv").open() as file:
                rows = [list(map(float, line)) for line in list(csv.reader(file))[1:] if line]
            assert shares == min(rows, key=lambda line: abs(line[0] - row.target))[3:]
    # Their tables are theirs: only means are written down.
    assert found[0].to_dict()["sparsity"] is None


def test_the_published_tables(shared):
    """The means that were taken from the authors' files when the project began."""
    found = read_published(shared / "data" / "teal_published", [0.5])
    means = {row.model: row.by_projection for row in found}
    expected = {
        "Llama-2-7B": (0.50, 0.53, 0.49, 0.65, 0.46, 0.41, 0.59),
        "Llama-3-8B": (0.59, 0.43, 0.36, 0.62, 0.51, 0.40, 0.54),
        "Mistral-7B": (0.59, 0.47, 0.30, 0.57, 0.47, 0.42, 0.58),
    }
    for model, values in expected.items():
        np.testing.assert_allclose(means[model], values, atol=0.006)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a table of published sparsities"),
        ("[1, 2]", "is not a table of published sparsities"),
        ('{"m": {"half": [[0.1]]}}', "is not a table of published sparsities"),
        ('{"m": {"0.5": [[0.1, 0.2]]}}', "m at 0.5 must be shares in"),
        ('{"m": {"0.5": [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.7]]}}', "m at 0.5 must be shares in"),
    ],
)
def test_broken_tables(tmp_path, text, message):
    path = tmp_path / "greedy_sparsities.json"
    path.write_text(text)
    for given in (path, tmp_path):
        with pytest.raises(CheckpointError, match=message):
            read_published(given, [0.5])


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no MODEL/lookup in"):
        read_published(tmp_path / "absent", [0.5])


def test_targets_that_are_not_published_are_left_out(tmp_path):
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"m": {"0.5": [[0.5] * 7], "0.25": [[0.25] * 7]}}))
    assert [row.target for row in read_published(path, [0.3, 0.5])] == [0.5]
