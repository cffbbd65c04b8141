import pytest

from acefast.errors import InputError
from acefast.search import SearchConfig, load_config, resolve_config


def test_presets_fill_the_settings_of_dataset_and_method():
    cora = resolve_config("cora", method="ace")
    assert (cora.lr, cora.weight_decay, cora.hidden, cora.s1, cora.s2) == (0.008, 8e-5, 512, 1e-2, 1e-2)
    assert (cora.mask_lr, cora.mask_weight_decay, cora.exchange_edges, cora.tau) == (0.008, 0.0, 0.02, 0.1)
    citeseer = resolve_config("citeseer")
    assert (citeseer.lr, citeseer.weight_decay) == (0.01, 5e-4)
    assert resolve_config("pubmed", method="ace").hidden == 256
    ugs = resolve_config("pubmed", method="ugs")
    assert (ugs.hidden, ugs.s1, ugs.s2) == (512, 1e-6, 1e-3)
    assert resolve_config("cora", method="dense").rounds == 0


def test_released_preset():
    c = resolve_config("cora", preset="released")
    assert (c.bias, c.self_loops, c.degrees, c.dropout, c.mask_noise) == (True, False, "none", 0.0, 0.0)
    assert c.mask_weight_decay == c.weight_decay == 8e-5
    assert [resolve_config(d, preset="released").seed for d in ("cora", "citeseer", "pubmed")] == [2377, 4428, 3333]
    assert resolve_config("cora", preset="released", seed=5).seed == 5


def test_overrides_win_and_none_counts_as_not_given():
    c = resolve_config("cora", lr=0.5, hidden=None, tau=1)
    assert (c.lr, c.mask_lr, c.hidden, c.tau) == (0.5, 0.5, 512, 1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(preset="released", axes="edges"), "axes must be joint or weights"),
        (dict(preset="released", method="ugs"), "method must be ace or dense"),
        (dict(preset="released", tau=0.5), "no setting tau"),
        (dict(preset="other"), "preset must be one of paper, best, released"),
        (dict(backbone="gin2"), "backbone must be one of"),
        (dict(method="magic"), "method must be one of"),
        (dict(axes="both"), "axes must be one of"),
        (dict(wheels=4), "unknown setting 'wheels'"),
        (dict(rounds=-1), "rounds must be 0 or more"),
        (dict(rounds=2.5), "rounds must be of type int"),
        (dict(rounds=True), "rounds must be of type int"),
        (dict(lr="fast"), "lr must be of type float"),
        (dict(lr=float("nan")), "lr must be greater than 0"),
        (dict(dropout=1.0), "dropout must be in [0, 1)"),
        (dict(prune_edges=1.0), "prune_edges must be in [0, 1)"),
        (dict(score="size"), "score must be one of magnitude, product"),
        (dict(preset="released", tie_directions=True), "no setting tie_directions"),
        (dict(device="tpu"), "device must be cpu or cuda"),
        (dict(dtype="float16"), "dtype must be one of float32, bfloat16, got 'float16'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(settings, words):
    with pytest.raises(InputError) as caught:
        resolve_config("cora", **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hash_covers_every_setting_but_the_data_folder():
    base = resolve_config("cora", threads=1)
    assert base.hash() == resolve_config("cora", threads=1, data_root="elsewhere").hash()
    for other in (dict(seed=1), dict(threads=2), dict(axes="edges"), dict(tau=0.2), dict(rounds=3)):
        assert base.hash() != resolve_config("cora", **{"threads": 1, **other}).hash()


def test_dict_round_trip_refuses_what_is_no_setting(tmp_path):
    base = resolve_config("cora", seed=4)
    assert SearchConfig.from_dict(base.to_dict()) == base
    with pytest.raises(InputError, match="unknown setting"):
        SearchConfig.from_dict({**base.to_dict(), "colour": "red"})
    with pytest.raises(InputError, match="cannot read"):
        load_config(tmp_path / "config.toml")


def test_every_setting_says_what_it_is():
    import inspect

    source = inspect.getsource(SearchConfig)
    for name in SearchConfig.__dataclass_fields__:
        after = source.split(f"\n    {name}: ")[1]
        assert after.split("\n")[1].strip().startswith('"""'), name


def test_best_is_paper_with_the_outcome_of_the_study():
    paper, best = (resolve_config("pubmed", "gcn", "ugs", preset) for preset in ("paper", "best"))
    assert (best.s1, best.s2, best.complement, best.hidden, best.lr) == (0.0, 0.0, "none", 256, paper.lr)
    assert (paper.s1, paper.s2, paper.hidden) == (1e-6, 1e-3, 512), "the published settings of UGS"
    assert resolve_config("cora", "gat", "ace", "best").hidden == 64
