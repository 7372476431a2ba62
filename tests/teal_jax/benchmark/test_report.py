import io
import json
import re

from rich.console import Console

from teal_jax.benchmark.report import Report, shown
from teal_jax.benchmark.rows import DecodeRow, KernelRow
from teal_jax.benchmark.tables import DECODE, KERNELS, line, markdown_table, notes, rich_table

ROWS = [
    DecodeRow(name="dense", realised=0.0, tokens_per_second=251.2, ms_per_token=3.98, bytes_per_token=15.01e9),
    DecodeRow(name="sparse 50 %", target=0.5, realised=0.5012, tokens_per_second=390.0, kernels={"a": [7.0, 1.5]}),
    DecodeRow(name="peer |", note="not run"),
]
KERNEL_ROWS = [KernelRow(kernel="qkv", path="dense", microseconds=12.5, bytes=50331648, limit_us=11.3, ratio=1.106)]


def make(rows, benchmark="decode"):
    return Report.of(
        rows,
        benchmark=benchmark,
        shape="llama-3-8b",
        command=f"teal bench {benchmark}",
        setting={"context": 512},
        measured={"read_bytes_per_second": 4.45e12, "peak_memory_bytes": None},
        hardware={"gpu": "NVIDIA H200", "driver": None, "memory_bytes": 1},
    )


def test_json_round_trip(tmp_path):
    report = make(ROWS)
    paths = report.write(tmp_path / "new", DECODE)
    assert [path.name for path in paths] == ["decode-llama-3-8b.json", "decode-llama-3-8b.md"]
    again = Report.load(paths[0])
    assert again == report
    assert again.row_objects() == ROWS
    assert {"python", "jax", "jaxlib", "teal_jax"} <= set(again.versions)
    assert again.commit is None or re.match("[0-9a-f]{40}", again.commit)
    kernels = make(KERNEL_ROWS, "kernels")
    assert Report.load(kernels.write(tmp_path, KERNELS)[0]).row_objects() == KERNEL_ROWS


def test_what_is_written_names_no_machine(tmp_path):
    import platform
    from pathlib import Path

    for path in make(ROWS).write(tmp_path, DECODE):
        text = path.read_text()
        assert platform.node() not in text
        assert str(Path.home()) not in text
        assert str(tmp_path) not in text


def test_markdown():
    text = markdown_table(ROWS, DECODE).splitlines()
    assert text[0].startswith("|  | tok/s | ms/token | realised |")
    assert text[2].startswith("| dense | 251.2 | 3.980 | 0.0 % | 15.0 GB | - |")
    assert text[4].startswith("| peer \\| | - |")
    assert "4.45 TB/s" in make(ROWS).markdown(DECODE)
    assert "- peer |: not run\n" in make(ROWS).markdown(DECODE)
    assert "commit" in make(ROWS).markdown(DECODE)


def test_terminal():
    out = io.StringIO()
    Console(file=out, width=120).print(rich_table(KERNEL_ROWS, KERNELS, "kernels"))
    assert re.search(r"qkv\s+dense\s+12\.50\s+50\.3 MB\s+11\.30\s+1\.11", out.getvalue())
    assert line(ROWS[2]) == "peer |, not run"
    assert notes(ROWS) == ["peer |: not run"]
    assert line(ROWS[1]) == "sparse 50 %, tok/s 390.0, realised 50.1 %"


def test_facts_are_readable():
    assert shown({"read_bytes_per_second": 4.449e12, "peak_memory_bytes": 18e9, "none": None}) == {
        "read bandwidth": "4.45 TB/s",
        "peak memory": "18.0 GB",
    }
    assert json.dumps(make(ROWS).to_dict())
