"""The plan of a search: what it counts, against what a training really takes; what is refused."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from acefast import memory
from acefast.data import Sizes, load_dataset
from acefast.errors import InputError
from acefast.search import look_ahead, resolve_config, run_search
from acefast.search.plan import Machine, predict

ARXIV = Sizes.named("ogbn-arxiv")


def test_sizes_by_name_are_those_of_the_data():
    for name in ("twin:ogbn-arxiv:0.01", "twin:ogbn-proteins:0.001", "twin:ogbn-products:0.0005"):
        by_name, real = Sizes.named(name), Sizes.of(load_dataset(name))
        assert by_name.feature_bytes == pytest.approx(real.feature_bytes, rel=0.02)
        assert replace(by_name, feature_bytes=real.feature_bytes) == real
    assert Sizes.named("cora") is None
    assert (ARXIV.nodes, ARXIV.edges, ARXIV.columns, ARXIV.outputs) == (169_343, 2_484_941, 128, 40)


def test_parts_follow_the_settings():
    def plan(**settings):
        return predict(ARXIV, resolve_config("ogbn-arxiv", "resgcn", **settings))

    row = 4 * ARXIV.nodes * 128  # one [N, hidden]
    kept, again = plan(recompute="no"), plan(recompute="yes")
    assert kept.parts["activations kept"] == 28 * 5 * row and again.parts["activations kept"] == (14 - 1 + 2 * 5) * row
    assert plan(layers=14, recompute="no").parts["activations kept"] == 14 * 5 * row
    # mask, two gradients; and of the kept edges value, two moments, best epoch's and place
    assert kept.parts["edge mask, gradients, moments"] == int(ARXIV.edges * (12 + 20 * 0.95))
    # mask, two gradients, two moments, best epoch's; the graph itself with flags
    large = predict(replace(ARXIV, edges=10**7), resolve_config("ogbn-arxiv", "resgcn")).parts
    assert large["edge mask, gradients, moments"] == 24 * 10**7 and "kept edges, both ways" not in large
    assert kept.parts["graph, both ways"] == 8 * ARXIV.edges + 16 * ARXIV.nodes
    assert not {"edge mask, gradients, moments", "kept edges, both ways"} & plan(axes="weights").parts.keys()
    assert kept.epochs == 500 + 20 * (250 + 500 + 13 * 50) and plan(method="ugs").epochs == 500 + 20 * 750
    slow, fast = (predict(ARXIV, resolve_config("ogbn-arxiv", "resgcn"), Machine(c, c)).seconds for c in (1e9, 2e9))
    assert slow == pytest.approx(2 * fast)


def test_recomputation_is_chosen_where_it_is_needed(monkeypatch):
    # what these tests hold by themselves is no part of it
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=4 * 10**8))
    config = resolve_config("ogbn-arxiv", "resgcn")
    assert look_ahead(config, ARXIV, 10**11).config.recompute == "no"
    ahead = look_ahead(config, ARXIV, 6 * 10**9)
    assert ahead.config.recompute == "yes" and ahead.plan.bytes < 6 * 10**9
    ahead.check()
    asked = look_ahead(replace(config, recompute="no"), ARXIV, 6 * 10**9)
    with pytest.raises(InputError, match=r"needs about 1\d.* GB of memory and 6 GB are there: .* is --recompute yes \("):
        asked.check()
    with pytest.raises(InputError, match=r"--layers \d+ \(\S+ GB\) or --hidden (64|32|16|8) \("):
        look_ahead(config, ARXIV, 2 * 10**9).check()
    with pytest.raises(InputError, match=r"is --dtype bfloat16 \(\S+ GB\) or --layers"):
        look_ahead(config, ARXIV, 23 * 10**8).check()
    with pytest.raises(InputError, match="it does not fit either"):
        look_ahead(config, ARXIV, 10**8).check()


def test_freed_memory_is_kept_where_there_is_ample(monkeypatch, tiny, tiny_config):
    config = resolve_config("ogbn-arxiv", "resgcn", layers=3, recompute="no")
    need = look_ahead(config, ARXIV, 10**12).plan.bytes  # with what the process of the tests holds
    assert look_ahead(config, ARXIV, 5 * need).keeps_memory and not look_ahead(config, ARXIV, 3 * need).keeps_memory
    small = resolve_config("ogbn-arxiv", "resgcn", layers=3, hidden=32, recompute="no")  # 22 MB a tensor: glibc keeps it
    assert not look_ahead(small, ARXIV, 10**12).keeps_memory
    plain, settings = run_search(tiny, tiny_config()), []
    monkeypatch.setattr("acefast.memory.GIVEN_BACK", 0)
    monkeypatch.setattr("acefast.memory.set_allocator", settings.append)
    kept = run_search(tiny, tiny_config(), memory_limit=10**12)
    assert kept.history == plain.history and settings == [memory.KEPT, memory.DEFAULT]
    assert run_search(tiny, tiny_config(), memory_limit=1).history == plain.history and len(settings) == 2


MEASURE = """
import re, sys, torch
from pathlib import Path
from acefast.search import load_data, look_ahead, resolve_config
from acefast.search.rounds import prepare
from acefast.search.state import State
from acefast.data import Sizes
torch.set_num_threads(1)
name, backbone, recompute, dtype = sys.argv[1:]
config = resolve_config(name, backbone, "ugs", layers=8, hidden=128, recompute=recompute, mask_epochs=1, dtype=dtype)
plan = look_ahead(config, Sizes.named(name), 10**12).plan
search = prepare(load_data(config), config, None, lambda event: None)
search.train_masks(State(), "imp", "imp", search.full(), 1)
print(plan.bytes, 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.parametrize(
    ("backbone", "recompute", "dtype"),
    [("resgcn", "yes", "float32"), ("gcn", "no", "float32"), ("resgcn", "no", "bfloat16")],
)
def test_the_planned_memory_is_what_a_training_takes(backbone, recompute, dtype):
    command = [sys.executable, "-c", MEASURE, "twin:ogbn-arxiv:0.1", backbone, recompute, dtype]
    # Freed tensors go back to the system, as those of large graphs do by themselves (glibc: over 32 MiB).
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    planned, measured = map(int, done.stdout.split())
    # Planned in float32 the training in bfloat16 would be 25 % off (835 of 670 MB).
    assert planned == pytest.approx(measured, rel=0.25 if dtype == "float32" else 0.15), (planned, measured)
