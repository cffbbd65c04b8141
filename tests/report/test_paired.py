"""The pre-declared comparison of two methods, against cases counted by hand."""

import pytest

from acefast import report
from acefast.report.paired import area, compare, holm, sign_flip


def test_area_is_that_of_the_trapezoids():
    assert area([0.0, 0.02]) == pytest.approx(0.01)
    assert area([0.0, 0.02, -0.02, 0.04]) == pytest.approx((0.01 + 0.0 + 0.01) / 3)
    assert area([0.0, 0.1 + 0.2, -0.3]) == pytest.approx(0.075) and area([0.1, -0.1, 0.1]) == 0.0


@pytest.mark.parametrize(
    "areas, p",
    [
        ([1, 2, 3], 2 / 8),  # of the sums of ±1 ±2 ±3 only 6 and -6 are as far from 0
        ([1, -1, 2], 6 / 8),  # the sums are ±4 once and ±2, 0 twice each; 6 of 8 are at least 2
        ([0, 0, 0], 1),
        ([-0.01] * 10, 2 / 1024),
        ([0.01] * 9 + [-0.01], 22 / 1024),  # ±10 and ±8, of which there are 10 each
    ],
)
def test_sign_flip_counts_the_signs(areas, p):
    assert sign_flip(areas) == pytest.approx(p)


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4]) == [0.4] and holm([0.9, 0.8]) == [1.0, 1.0]


def cell(tmp_path, write_run, seeds, gain, name="cora", base=0.80, **config):
    """UGS and ACE, whose rung 1 is `gain(seed)` better; one rung, so the area is half of the gain."""
    for seed in range(seeds):
        write_run(tmp_path / f"{name}-u{seed}", [base, base], seed=seed, dataset=name, **config)
        ace = [base, base + gain(seed)]
        write_run(tmp_path / f"{name}-a{seed}", ace, seed=seed, dataset=name, method="ace", exchanged=1, **config)


def test_claims_need_ten_seeds_a_gain_and_the_corrected_test(tmp_path, write_run):
    cell(tmp_path, write_run, 10, lambda seed: 0.02 + 0.001 * seed, "cora")
    cell(tmp_path, write_run, 10, lambda seed: 0.0, "citeseer")
    cell(tmp_path, write_run, 10, lambda seed: -0.01, "tiny")
    cell(tmp_path, write_run, 9, lambda seed: 0.05, "pubmed")
    found = {c.cell[0]: c for c in compare(report.read_groups([tmp_path]))}
    assert {name: (c.method, c.base, len(c.areas), c.rungs) for name, c in found.items()} == {
        name: ("ace", "ugs", 9 if name == "pubmed" else 10, 1) for name in ("cora", "citeseer", "tiny", "pubmed")
    }
    verdicts = {name: c.verdict for name, c in found.items()}
    assert verdicts == {"cora": "win", "citeseer": "tie", "tiny": "loss", "pubmed": "not claimed"}
    cora = found["cora"]
    # Both sure cells have 2 of 1024; Holm over the three cells of ten seeds gives 3 and max(2, 3) times that.
    assert cora.p == pytest.approx(2 / 1024)
    assert [found[n].p_holm for n in ("cora", "tiny", "citeseer")] == pytest.approx([6 / 1024, 6 / 1024, 1.0])
    assert found["pubmed"].p is None and found["citeseer"].d is None
    # Areas 0.0100, 0.0105, ... 0.0145: mean 0.01225, sd 0.0015138, t(9) = 2.262.
    assert cora.mean == pytest.approx(0.01225) and cora.d == pytest.approx(12.25 / 1.5138, rel=1e-4)
    assert cora.interval == pytest.approx((0.01225 - 0.0010829, 0.01225 + 0.0010829), rel=1e-3)


def test_only_common_seeds_and_rungs_of_one_ladder_are_compared(tmp_path, write_run):
    write_run(tmp_path / "u0", [0.8, 0.8, 0.8], seed=0)
    write_run(tmp_path / "u1", [0.8, 0.8, 0.8], seed=1)
    write_run(tmp_path / "u2", [0.8, 0.8, 0.8], seed=2)
    for seed in (1, 2, 3):
        write_run(tmp_path / f"a{seed}", [0.8, 0.82], seed=seed, method="ace", exchanged=1)
    write_run(tmp_path / "dense", [0.8], seed=1, method="dense")
    (one,) = compare(report.read_groups([tmp_path]))
    assert (one.method, one.rungs, one.areas) == ("ace", 1, (0.01, 0.01))
    for seed in (0, 1):
        write_run(tmp_path / f"e{seed}", [0.8, 0.8], seed=seed, method="random", axes="edges", dataset="other")
        write_run(tmp_path / f"w{seed}", [0.8, 0.8], seed=seed, method="ugs", axes="weights", dataset="other")
    assert len(compare(report.read_groups([tmp_path]))) == 1
    for seed in (0, 1):  # as if on both axes, but with the ladder of one
        for file in (tmp_path / f"e{seed}", tmp_path / f"w{seed}"):
            text = (file / "config.toml").read_text()
            (file / "config.toml").write_text(text.replace('"edges"', '"joint"').replace('"weights"', '"joint"'))
    assert len(compare(report.read_groups([tmp_path]))) == 1


def test_the_report_shows_it(tmp_path, write_run):
    cell(tmp_path, write_run, 10, lambda seed: 0.02, "cora")
    text = report.write(report.read_groups([tmp_path]))[0].read_text()
    assert "## Methods compared" in text and "a tie is no win" in text
    (row,) = [line for line in text.splitlines() if "ace - ugs" in line]
    assert [part.strip() for part in row.split("|")[1:-1]] == [
        "cora", "gcn", "joint", "ace - ugs", "10", "1", "+1.00", "+1.00 to +1.00", "", "0.0020", "0.0020", "win"
    ]  # fmt: skip
    assert "Methods compared" not in report.write(report.read_groups([tmp_path / "cora-u0"]))[0].read_text()
