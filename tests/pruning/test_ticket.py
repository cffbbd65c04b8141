"""Ticket: the record, its file, and what is refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from acefast.errors import InputError
from acefast.graph import Graph
from acefast.pruning.ticket import HEADER, Ticket, pack, unpack


def small_graph(seed=0):
    edges = torch.randint(0, 9, (2, 37), generator=torch.Generator().manual_seed(seed))
    return Graph.from_edge_index(edges, num_nodes=9)


def small_ticket(graph=None, **metadata):
    graph = graph or small_graph()
    draw = torch.Generator().manual_seed(1)
    rewind = {"0.weight": torch.randn(5, 3, generator=draw), "0.bias": torch.randn(5, generator=draw)}
    metadata = {"dataset": "toy", "fingerprint": graph.fingerprint(), "seed": 0, "val": 0.5} | metadata
    edge_keep = torch.rand(graph.num_edges, generator=draw) < 0.6
    return Ticket(edge_keep, {"0.weight": torch.rand(5, 3, generator=draw) < 0.5}, rewind, metadata)


def test_round_trip(tmp_path):
    ticket = small_ticket()
    ticket.save(tmp_path / "a.safetensors")
    again = Ticket.load(tmp_path / "a.safetensors")
    assert torch.equal(again.edge_keep, ticket.edge_keep)
    assert again.weight_keep.keys() == ticket.weight_keep.keys()
    assert torch.equal(again.weight_keep["0.weight"], ticket.weight_keep["0.weight"])
    assert all(torch.equal(again.rewind[name], ticket.rewind[name]) for name in ticket.rewind)
    assert again.metadata == ticket.metadata
    assert again.sparsity == ticket.sparsity


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65])
def test_pack_is_the_inverse_of_unpack(count):
    keep = torch.rand(count) < 0.5
    packed = pack(keep)
    assert packed.dtype == torch.uint8 and packed.numel() == (count + 7) // 8
    assert torch.equal(unpack(packed, count), keep)
    for e in range(count):
        assert bool(packed[e // 8] >> (e % 8) & 1) == bool(keep[e])


def test_no_edges_and_no_masks(tmp_path):
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), num_nodes=3)
    ticket = Ticket(torch.zeros(0, dtype=torch.bool), {}, {}, {"fingerprint": graph.fingerprint()})
    ticket.save(tmp_path / "a")
    assert Ticket.load(tmp_path / "a").sparsity == {"edges": 0.0, "weights": 0.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rewind_keeps_its_dtype(tmp_path, dtype):
    ticket = small_ticket()
    ticket.rewind = {name: value.to(dtype) for name, value in ticket.rewind.items()}
    ticket.save(tmp_path / "a")
    assert torch.equal(Ticket.load(tmp_path / "a").rewind["0.bias"], ticket.rewind["0.bias"])


def test_same_content_gives_same_bytes(tmp_path):
    ticket = small_ticket()
    ticket.save(tmp_path / "a")
    reordered = Ticket(
        ticket.edge_keep,
        ticket.weight_keep,
        dict(reversed(ticket.rewind.items())),
        dict(reversed(ticket.metadata.items())),
    )
    reordered.save(tmp_path / "b")
    Ticket.load(tmp_path / "a").save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_sparsity_is_removed_over_total_in_percent():
    ticket = small_ticket()
    ticket.edge_keep = torch.arange(37) < 30
    ticket.weight_keep = {"0.weight": torch.arange(15).view(5, 3) < 3}
    assert ticket.counts == {"edges": (30, 37), "weights": (3, 15)}
    assert ticket.sparsity == {"edges": pytest.approx(700 / 37), "weights": pytest.approx(80.0)}
    assert "30/37" in repr(ticket)


def test_graph_keeps_the_callers_order():
    graph = small_graph()
    ticket = small_ticket(graph)
    kept = ticket.graph(graph)
    assert torch.equal(kept.edge_index(), graph.edge_index()[:, ticket.edge_keep])
    assert kept.num_nodes == graph.num_nodes


def test_ticket_for_another_graph_is_refused():
    with pytest.raises(InputError, match="another graph"):
        small_ticket().graph(small_graph(seed=5))


def test_apply_sets_weights_and_masks():
    ticket, model = small_ticket(), nn.Sequential(nn.Linear(3, 5))
    assert ticket.apply(model) is model
    assert torch.equal(model[0].weight, ticket.rewind["0.weight"] * ticket.weight_keep["0.weight"])
    assert torch.equal(model[0].bias, ticket.rewind["0.bias"])


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 5, bias=False)),
        nn.Sequential(nn.Linear(4, 5)),
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)),
    ],
    ids=["missing", "shape", "surplus"],
)
def test_apply_refuses_another_model_and_changes_nothing(model):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match="does not fit this model"):
        small_ticket().apply(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(edge_keep=torch.ones(37)), "edge_keep must be bool"),
        (dict(edge_keep=torch.ones(3, 3, dtype=torch.bool)), "edge_keep must be bool"),
        (dict(rewind={"0.weight": torch.full((5, 3), float("nan"))}), "finite"),
        (dict(rewind={"0.weight": torch.ones(5, 3, dtype=torch.int64)}), "floating point"),
        (dict(weight_keep={"1.weight": torch.ones(5, 3, dtype=torch.bool)}), "no rewind weight"),
        (dict(weight_keep={"0.weight": torch.ones(3, 5, dtype=torch.bool)}), "must be bool"),
        (dict(metadata={}), "fingerprint"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    ticket = small_ticket()
    fields = dict(
        edge_keep=ticket.edge_keep, weight_keep=ticket.weight_keep, rewind=ticket.rewind, metadata=ticket.metadata
    )
    with pytest.raises(InputError, match=message):
        Ticket(**fields | change)


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(InputError, match="JSON"):
        small_ticket(seed=torch.ones(1)).save(tmp_path / "a")
    with pytest.raises(InputError, match="JSON"):
        small_ticket(val=float("nan")).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def test_every_cut_is_refused(tmp_path):
    small_ticket().save(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for length in [*range(0, len(data), 13), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(InputError) as error:
            Ticket.load(tmp_path / "cut")
        one_sentence(error)


def test_every_changed_byte_is_refused_or_harmless(tmp_path):
    ticket = small_ticket()
    ticket.save(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for offset in range(len(data)):
        for flip in (1, 0x80):
            changed = bytearray(data)
            changed[offset] ^= flip
            (tmp_path / "changed").write_bytes(changed)
            try:
                again = Ticket.load(tmp_path / "changed")
            except InputError as error:
                assert "\n" not in str(error)
                continue
            # Only white space of the header may change unseen: what was read is what was written.
            assert offset < start, f"byte {offset} of the tensors changed unseen"
            again.save(tmp_path / "again")
            assert (tmp_path / "again").read_bytes() == data


def rewrite(path, header=None, tensors=None):
    """Write a ticket whose parts were changed, with a digest that fits, so that the check in question is met."""
    from acefast.pruning.ticket import canonical, digest

    small_ticket().save(path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][HEADER])
    parts = load(data)
    head.pop("digest")
    head.update(header or {})
    for name, value in (tensors or {}).items():
        parts.pop(name, None)
        if value is not None:
            parts[name] = value
    head["digest"] = digest(head, parts)
    path.write_bytes(save(parts, {HEADER: canonical(head)}))


@pytest.mark.parametrize(
    "header, tensors, message",
    [
        (dict(format=2), {}, "format 2"),
        (dict(extra=1), {}, "other keys"),
        (dict(edges=-1), {}, "number of edges"),
        (dict(edges="37"), {}, "number of edges"),
        (dict(edges=999), {}, r"must be uint8 \[125\]"),
        (dict(edges=33), {}, "bits set beyond|must be"),
        (dict(weights={"0.weight": [3, 5]}), {}, "has shape"),
        (dict(weights={"0.weight": "53"}), {}, "no list"),
        (dict(weights={"9.weight": [5, 3]}), {}, "missing"),
        (dict(metadata=[]), {}, "no JSON objects"),
        (dict(metadata={}), {}, "fingerprint"),
        ({}, {"edge_keep": None}, "edge_keep is missing"),
        ({}, {"weight_keep/0.weight": None}, "is missing"),
        ({}, {"rewind/0.weight": None}, "is missing"),
        ({}, {"surprise": torch.ones(2)}, "no part of a ticket"),
        ({}, {"edge_keep": torch.zeros(4, dtype=torch.uint8)}, "must be uint8"),
        ({}, {"edge_keep": torch.zeros(5, dtype=torch.int8)}, "must be uint8"),
        ({}, {"edge_keep": torch.full((5,), 255, dtype=torch.uint8)}, "beyond its 37"),
        ({}, {"rewind/0.weight": torch.ones(5, 3, dtype=torch.int32)}, "floating point"),
        ({}, {"rewind/0.weight": torch.full((5, 3), float("inf"))}, "finite"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, header, tensors, message):
    rewrite(tmp_path / "ticket", header, tensors)
    with pytest.raises(InputError, match=message) as error:
        Ticket.load(tmp_path / "ticket")
    assert str(tmp_path / "ticket") in one_sentence(error)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no ticket"):
        Ticket.load(tmp_path / "absent")
    with pytest.raises(InputError, match="no ticket"):
        Ticket.load(tmp_path)
    (tmp_path / "plain").write_bytes(save({"x": torch.ones(3)}))
    with pytest.raises(InputError, match="not a whole ticket"):
        Ticket.load(tmp_path / "plain")
    (tmp_path / "json").write_bytes(save({"x": torch.ones(3)}, {HEADER: "[" * 100_000}))
    with pytest.raises(InputError, match="not a whole ticket"):
        Ticket.load(tmp_path / "json")


def test_save_refuses_a_folder_that_is_missing(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        small_ticket().save(tmp_path / "absent" / "a")
