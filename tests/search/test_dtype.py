"""Searches with bfloat16 features: close to float32, masters float32, half the memory, the same guarantees."""

from dataclasses import replace

import pytest
import torch

from acefast.data import Sizes, synthetic_citation
from acefast.errors import InputError
from acefast.nn import BACKBONES, GCN, build, state_of
from acefast.pruning import Pattern, SoftMasks
from acefast.report.runs import read_run
from acefast.search import compact, export_ticket, resolve_config, retrain_ticket, run_search
from acefast.search.deploy import prepared
from acefast.search.plan import predict
from acefast.search.rounds import build_model, prepare, prepare_data
from acefast.tasks import make_task
from acefast.train import Schedule, train
from tests.stopping import Stop, stop_after

BF16 = torch.bfloat16
SPARSE = synthetic_citation(
    400, 60, 3, seed=2, num_edges=800, words=6.0, train_per_class=20, num_val=60, num_test=100, name="small"
)
EDGE_ATTR = torch.rand(SPARSE.graph.num_edges, 3, generator=torch.Generator().manual_seed(7))
DENSE = replace(SPARSE, x=SPARSE.x.to_dense(), edge_attr=EDGE_ATTR)
DATA = {"sparse": SPARSE, "dense": DENSE}
# what a network reads and computes with, by backbone; more of resgcn, which has more in it
CASES = [(backbone, kind, {}) for backbone in BACKBONES for kind in DATA]
CASES += [("resgcn", "dense", dict(norm="layer", mlp_layers=2, learn_t=True, aggr="softmax"))]


def setup(backbone, kind, settings=None, dtype="float32", method="ugs"):
    layers = 3 if backbone == "resgcn" else 2
    config = resolve_config("small", backbone, method, hidden=16, layers=layers, threads=1, dtype=dtype, row_normalise=False,
                            **settings or {})  # fmt: skip
    search = prepare(DATA[kind], config, None, lambda event: None)
    assert search.model.dtype == getattr(torch, dtype)
    return search.model, search.data, config


@pytest.mark.parametrize(("backbone", "kind", "settings"), CASES)
def test_a_step_has_the_gradients_of_float32(backbone, kind, settings):
    found, kept = [], []
    for dtype in ("float32", "bfloat16"):
        model, data, _ = setup(backbone, kind, settings, dtype)
        assert data.x.dtype == (BF16 if (dtype, kind) == ("bfloat16", "dense") else torch.float32)
        mask = (0.5 + torch.rand(data.graph.num_edges, generator=torch.Generator().manual_seed(1))).requires_grad_()
        sizes = []

        def keep(t, sizes=sizes):
            sizes.append(t.untyped_storage().nbytes() * (t.dim() > 0 and t.shape[0] == SPARSE.num_nodes))
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            outputs = model.train()(data.graph, data.x, mask, seed=1, step=3)
        loss = make_task(data).loss(outputs[data.train], "train")
        leaves = [mask, *model.parameters()]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        assert outputs.dtype == loss.dtype == torch.float32 and all(t.dtype == torch.float32 for t in (*leaves, *gradients))
        found.append((outputs.detach(), loss.detach(), *gradients))
        kept.append(sum(sizes))
    apart = [float((wide - narrow).norm()) for wide, narrow in zip(*found, strict=True)]
    norms = [float(wide.norm()) for wide in found[0]]
    together = [sum(n * n for n in each[3:]) ** 0.5 for each in (apart, norms)]  # of all weights
    # A bfloat16 has 8 bits, and roundings add up; a norm enlarges what is left of gradients that cancel in it.
    assert apart[0] < 0.02 * norms[0] and apart[1] < 0.02 * norms[1]
    near = 0.2 if backbone == "resgcn" else 0.06  # of other draws of edge_attr up to 0.13 were seen
    assert apart[2] < near * norms[2] and together[0] < near * together[1]
    assert all(a < 0.3 * max(n, 0.01 * max(norms[3:])) for a, n in zip(apart[3:], norms[3:]))
    assert not torch.equal(found[0][0], found[1][0])
    # float32 stay the softmax's denominators of resgcn, one in five tensors or one in nine, and gat's attention terms
    assert kept[1] < {"resgcn": 0.64, "gat": 0.62}.get(backbone, 0.56) * kept[0]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_masters_are_float32_and_the_training_ends_where_float32_does(backbone, fast):
    fits = []
    for dtype in ("float32", "bfloat16"):
        model, data, _ = setup(backbone, "dense", dict(edge_features=False), dtype)
        pattern = Pattern.full(data.graph.num_edges, model.maskable())
        masks, held = SoftMasks.init(pattern, 1e-5, lambda name: torch.Generator().manual_seed(1)), []
        start = {name: value.clone() for name, value in state_of(model).items()}
        schedule = Schedule(25, lr=0.02, weight_decay=5e-4, mask_lr=0.01, s1=1e-4, s2=1e-4)
        fits.append(train(model, data, schedule, start, pattern, masks, 4, True, fast=fast, on_start=held.append))
        assert all(t.dtype in (torch.float32, torch.int32, torch.int64) for t in held[0].tensors().values())
        tensors = [fits[-1].masks.edges, *fits[-1].masks.weights.values(), *fits[-1].weights.values()]
        assert all(t.dtype == torch.float32 for t in tensors)
    wide, narrow = fits
    assert narrow.val == pytest.approx(wide.val, abs=0.05) and narrow.test == pytest.approx(wide.test, abs=0.06)
    assert wide.val > 0.6 and narrow.weights.keys() == wide.weights.keys()


@pytest.mark.parametrize(
    ("backbone", "scored"), [("gcn", dict(score="combined", edge_score="agreement", complement="none")), ("resgcn", {})]
)
def test_a_search_stops_repeats_and_deploys_in_bfloat16(tiny, tiny_config, tmp_path, backbone, scored):
    data = replace(tiny, x=tiny.x.to_dense())
    settings = dict(backbone=backbone, layers=3, rounds=1, row_normalise=False, **scored)
    config = tiny_config(**settings, dtype="bfloat16", recompute="no")
    whole = run_search(data, config)
    for epochs in (3, 4, 5):  # within the dense baseline, the training of masks and the exchange
        with pytest.raises(Stop):
            run_search(data, config, tmp_path, stop_after(epochs, "epoch"))
    assert run_search(data, config, tmp_path).history == whole.history
    assert run_search(data, tiny_config(**settings, recompute="no")).history != whole.history
    assert run_search(data, replace(config, recompute="yes")).history == whole.history

    ticket = whole.ticket(1)
    again = retrain_ticket(ticket, data)
    assert (again["val"], again["test"]) == (again["found_val"], again["found_test"])
    exported = export_ticket(ticket, data)
    assert all(w.dtype == torch.float32 for w in exported.rewind.values())
    config, seen = prepared(exported, data, "")
    model = exported.apply(build_model(seen, config)).eval()
    with torch.no_grad():
        expected = model(seen.graph, seen.x, None, exported.edge_keep)
    network = compact(exported, data)
    assert expected.dtype == torch.float32 and torch.equal(network(), expected) and torch.equal(network(data.x), expected)


def test_features_that_are_learned_and_what_scores_links_are_masters(tiny, tiny_config):
    config = tiny_config(features="learned", task="link", decoder="mlp", dtype="bfloat16", method="ugs", rounds=1)
    run = run_search(tiny, config)
    assert {"embedding", "decoder.hidden.weight"} < run.ticket(1).rewind.keys()
    assert all(value.dtype == torch.float32 for value in run.ticket(1).rewind.values())
    wide = run_search(tiny, replace(config, dtype="float32"))
    assert run.rounds[0]["test"] == pytest.approx(wide.rounds[0]["test"], abs=0.03)


def test_the_setting_is_a_part_of_the_search_that_old_records_need_not_have(tiny, tiny_config, tmp_path):
    config = tiny_config()
    values = config.to_dict()
    assert values.pop("dtype") == "float32" and type(config).from_dict(values) == config
    narrow = replace(config, dtype="bfloat16")
    assert narrow.hash() != config.hash() and narrow.differences(config) == ["dtype"]
    assert config.hash() == "86435314d9c3f886", "folders from before the setting stay valid"

    config = tiny_config(method="ugs", rounds=1)
    with pytest.raises(Stop):
        run_search(tiny, config, tmp_path, stop_after(1, "stage_end"))
    path = tmp_path / "config.toml"
    path.write_text(path.read_text().replace('dtype = "float32"\n', ""))
    assert "dtype" not in path.read_text()
    assert run_search(tiny, config, tmp_path).history == run_search(tiny, config).history
    assert read_run(tmp_path).config["dtype"] == "float32"
    with pytest.raises(InputError, match="holds a search with dtype = 'float32' \\(now 'bfloat16'\\)"):
        run_search(tiny, replace(config, dtype="bfloat16"), tmp_path)


def test_a_model_of_ones_own_says_its_dtype_itself(tiny, tiny_config):
    class Own(torch.nn.Module):
        pass

    config = tiny_config(dtype="bfloat16")
    with pytest.raises(InputError, match="dtype bfloat16 is for the networks of acefast.nn, and the model given is a Own"):
        prepare(tiny, config, Own(), None)
    given = GCN(tiny.num_features, 8, tiny.num_classes)
    assert prepare(tiny, config, given, None).model.dtype == BF16


def test_features_of_edges_go_where_they_are_read():
    narrow, plain = (resolve_config("small", "resgcn", dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert prepare_data(DENSE, narrow).edge_attr.dtype == BF16 and prepare_data(DENSE, plain).edge_attr is DENSE.edge_attr
    for config in (replace(narrow, edge_features=False), replace(narrow, backbone="gcn")):
        assert prepare_data(DENSE, config).edge_attr is None
    assert build("resgcn", 4, 2, hidden=8, layers=1).dtype == torch.float32


def test_the_plan_halves_activations():
    sizes = Sizes.named("ogbn-arxiv")
    row = 2 * sizes.nodes * 128  # one [N, hidden] in bfloat16

    def parts(backbone="resgcn", **settings):
        settings = {"recompute": "no", "dtype": "bfloat16", **settings}
        return predict(sizes, resolve_config("ogbn-arxiv", backbone, **settings)).parts

    narrow, wide = parts(), parts(dtype="float32")
    assert narrow["activations kept"] == 28 * (5 + 1) * row and wide["activations kept"] == 28 * 5 * 2 * row
    assert parts(recompute="yes")["activations kept"] == (14 - 1 + 2 * (5 + 1)) * row
    assert parts(aggr="max")["activations kept"] == 28 * 4 * row
    for backbone in ("gcn", "gin", "gat", "sage"):
        assert 2 * parts(backbone)["activations kept"] == parts(backbone, dtype="float32")["activations kept"]
    # the caller's features stay, a GPU gets the narrow ones alone
    assert narrow["features in bfloat16"] == row and "features in bfloat16" not in wide
    on_gpu = parts(device="cuda")
    assert on_gpu["features and labels"] == narrow["features and labels"] - row and "features in bfloat16" not in on_gpu
    assert predict(replace(sizes, narrow=True), resolve_config("ogbn-arxiv", dtype="bfloat16")).parts.keys() == wide.keys() | {
        "coefficients of edges"
    }
