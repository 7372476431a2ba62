import json
import sys
import time

import pytest

from teal_jax.benchmark.peer import peer_row, public, sizes
from tests.teal_jax.benchmark.tiny import CONFIG

LENGTHS = range(24, 40)


def peer(program, seconds=30.0):
    return peer_row(CONFIG, "float32", LENGTHS, 2, 1e9, seconds=seconds, command=(sys.executable, "-c", program))


def result(mode, seconds):
    values = {"mode": mode, "seconds_per_token": seconds, "first_token_s": 9.0, "memory_bytes": 5}
    return f"print({json.dumps(json.dumps(values | {'versions': {'torch': '2'}}))}, flush=True)\n"


def test_the_fastest_mode_counts():
    row = peer(result("slow", 0.02) + "print('chatter')\n" + result("fast", 0.01))
    assert row.name == "transformers, fast"
    assert row.tokens_per_second == pytest.approx(100)
    assert row.note == "torch 2"
    assert row.bandwidth_share == pytest.approx(row.bytes_per_token * 100 / 1e9)


def test_it_is_told_the_sizes():
    told = sizes(CONFIG, "float32", LENGTHS, 2)
    assert told["prompt"] == 24
    assert told["tokens"] == 16
    row = peer("import sys, json; print(json.dumps({'error': sys.stdin.read()}))")
    assert '"hidden_size": 64' in row.note


@pytest.mark.parametrize(
    ("program", "note"),
    [
        ("raise SystemExit('no luck at /some/where/x.py')", "it ended with exit code 1: no luck at <path>"),
        ('print(\'{"mode": "m", "error": "bad"}\')', "m failed: bad"),
        ("print('[1]')", "it printed nothing"),
    ],
)
def test_a_failure_is_a_note(program, note):
    row = peer(program)
    assert row.tokens_per_second is None
    assert row.note == note


def test_it_is_stopped_in_time_and_what_it_found_counts():
    begin = time.monotonic()
    row = peer(result("first", 0.5) + "import time; time.sleep(60)", seconds=3)
    assert time.monotonic() - begin < 20
    assert row.tokens_per_second == 2
    assert row.note == "torch 2; stopped after 3 s"


def test_where_torch_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert peer_row(CONFIG, "float32", LENGTHS, 2, 1e9).note == "not run: torch, transformers not installed"


def test_paths_are_not_published():
    assert public("in /a/b-c/d.py line 3, 2 / 3 of a/b\nmore") == "in <path> line 3, 2 / 3 of a/b"
