"""How many heads become dummy: a number, a share, or what costs little attention; of the model or of each layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dummy.budget import DummyBudget
from dummy.config import DummyForcingConfig
from dummy.policies.registry import split_of
from dummy.roles import HeadRoles, Role, dummy_ranks
from pipeline.config.config import check_against_model, load_config
from pipeline.planning.plan import planner_for
from pipeline.runtime.loading import generator_settings
from tests.conftest import ROOT, Program
from utils.errors import InputError
from wan.config import WAN_1_3B

AUTO = "dummy_forcing.num_dummy=auto"
SELF_FORCING = ROOT / "configs" / "self_forcing_inference.yaml"


def by_frame(seed: int = 0, layers: int = 3, heads: int = 4, context: int = 6) -> Tensor:
    mass = torch.rand(layers, heads, context + 1, generator=torch.Generator().manual_seed(seed)) ** 3
    return mass / mass.sum(-1, keepdim=True)


def found(**settings: object) -> HeadRoles:
    return split_of(DummyForcingConfig(**settings), 3).find_roles(by_frame())[0]


@pytest.mark.parametrize(("amount", "heads"), [(0, 0), (5, 5), (0.5, 6), (0.25, 3), (1.0, 12), (12, 12), (1, 1)])
def test_a_number_or_a_share_of_the_model(amount: int | float, heads: int) -> None:
    roles = found(num_dummy=amount)
    assert roles.counts()[Role.DUMMY] == heads
    # Always the first in the order of the paper.
    _, shares = split_of(DummyForcingConfig(), 3).find_roles(by_frame())
    dummy = torch.tensor(roles.codes()) == int(Role.DUMMY)
    assert torch.equal(dummy, dummy_ranks(shares) < heads)


@pytest.mark.parametrize(("amount", "heads"), [(1, 1), (0.5, 2), (4, 4), ("auto", None)])
def test_a_budget_of_each_layer(amount: int | float | str, heads: int | None) -> None:
    roles = found(num_dummy=amount, num_dummy_within="layer", max_loss=0.2)
    counts = [row.count(Role.DUMMY) for row in roles.table]
    if heads is not None:
        assert counts == [heads] * 3
        return
    lost = split_of(DummyForcingConfig(), 3).lost_by_dummy(by_frame())
    for row, losses in zip(roles.table, lost, strict=True):
        assert sum(float(loss) for role, loss in zip(row, losses, strict=True) if role is Role.DUMMY) / 4 <= 0.2


@pytest.mark.parametrize("max_loss", [0.0, 0.05, 0.1, 0.3, 1.0])
def test_auto_takes_as_many_as_the_bound_allows(max_loss: float) -> None:
    roles = found(num_dummy="auto", max_loss=max_loss)
    split = split_of(DummyForcingConfig(), 3)
    lost = split.lost_by_dummy(by_frame()).flatten()
    ranks = dummy_ranks(split.find_roles(by_frame())[1]).flatten()
    count = roles.counts()[Role.DUMMY]
    assert float(lost[ranks < count].sum()) / 12 <= max_loss + 1e-9
    if count < 12:
        assert float(lost[ranks <= count].sum()) / 12 > max_loss
    assert max_loss > 0 or count == 0
    assert max_loss < 1 or count == 12


def test_what_a_dummy_head_loses_is_what_it_does_not_keep() -> None:
    mass = by_frame()
    last = split_of(DummyForcingConfig(), 3).lost_by_dummy(mass)
    torch.testing.assert_close(last, mass[..., :5].sum(-1))
    nothing = split_of(DummyForcingConfig(preset="dummy_none"), 3).lost_by_dummy(mass)
    torch.testing.assert_close(nothing, mass[..., :6].sum(-1))


def test_auto_of_a_run(program: Program) -> None:
    assert program("num_output_frames=15", "inference_iter=1", AUTO, "dummy_forcing.max_loss=0.3") == 0
    assert len(program.mp4s) == 1


def test_a_dry_run_of_auto_says_what_is_possible(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """No head dummy and all of them; with half sink and half neighbour heads otherwise."""
    for max_loss in ("0.05", "0.3"):
        assert program("--dry_run", "num_output_frames=15", AUTO, f"dummy_forcing.max_loss={max_loss}") == 0
        out = capsys.readouterr().out
        assert "Cost: 1.00 to 2.00 earlier frames a head on average" in out
        assert f"as many as lose at most {100 * float(max_loss):g} % of all heads' attention in block 1" in out
        assert "0 to 12 heads: first 0 + last 1" in out and "0 to 6 heads: first 0 + last 3" in out


def test_memory_of_auto_is_planned_for_the_worst(program: Program) -> None:
    def cache(*overrides: str) -> int:
        given = program.arguments("num_output_frames=15", *overrides)
        config = load_config(given[1], given[2:])
        planner = planner_for(config, torch.device("cpu"))
        return planner.memory(config, generator_settings(config, planner.sizes)).cache.total

    assert cache(AUTO) == cache("dummy_forcing.num_dummy=0") > cache("dummy_forcing.num_dummy=6")
    wide = "dummy_forcing.retention.dummy=[0,9]"
    assert cache(AUTO, wide) == cache("dummy_forcing.num_dummy=12", wide) > cache("dummy_forcing.num_dummy=6", wide)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dummy_forcing.num_dummy=1.5", "num_dummy: a share must be from 0.0 to 1.0, got 1.5"),
        ("dummy_forcing.num_dummy=-0.5", "num_dummy: a share must be from 0.0 to 1.0"),
        ("dummy_forcing.num_dummy=half", "num_dummy: expected an integer or a number or one of auto"),
        ("dummy_forcing.max_loss=2", "max_loss: must be from 0 to 1"),
        ("dummy_forcing.num_dummy_within=head", "num_dummy_within: expected one of model, layer"),
        ("dummy_forcing.preset=papper", "preset: expected one of paper, anchor"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(SELF_FORCING, [override])
    assert message in str(caught.value)


def test_a_layer_has_fewer_heads_than_the_model(tmp_path: Path) -> None:
    config = load_config(SELF_FORCING, ["dummy_forcing.num_dummy_within=layer"])
    with pytest.raises(InputError, match=r"num_dummy: 180 is more than a layer has heads; use at most 12"):
        check_against_model(config, WAN_1_3B)
    check_against_model(load_config(SELF_FORCING, ["dummy_forcing.num_dummy=0.5"]), WAN_1_3B)


def test_roles_that_are_found_anew_need_a_number_that_fits() -> None:
    given = ["dummy_forcing.roles=roles.json", "dummy_forcing.num_dummy=361"]
    check_against_model(load_config(SELF_FORCING, given), WAN_1_3B)  # a number that nothing looks at
    with pytest.raises(
        InputError, match=r"num_dummy: 361 is more than the model has heads; use at most 30 layers x 12"
    ):
        check_against_model(load_config(SELF_FORCING, [*given, "dummy_forcing.reclassify_on_switch=true"]), WAN_1_3B)


def test_budgets_before_anything_is_observed() -> None:
    assert DummyBudget(180).possible(30, 12) == (180,)
    assert DummyBudget(6, within="layer").possible(30, 12) == (180,)
    assert DummyBudget(0.25).possible(30, 12) == (90,)
    assert DummyBudget("auto", within="layer", max_loss=0.05).possible(30, 12) == (0, 360)
    assert DummyBudget("auto", max_loss=1.0).possible(30, 12) == (360,)
