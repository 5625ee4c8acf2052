"""token_statistics and token_statistics_from_logits, against their definition in float64."""

import itertools
import math

import pytest
import torch
from coverings import BACKENDS, grid
from heads import Case, assert_agree, assert_equal, cast, error, ids, make
from hypothesis import given
from hypothesis import strategies as st
from statistics_cases import (
    DTYPES,
    assert_right,
    both_ops,
    definition,
    exact,
    from_logits,
    logits_of,
    op_module,
    scored,
    truth,
)
from test_ops_log_likelihood import LAYOUTS

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import reference, token_statistics, token_statistics_from_logits

pytestmark = pytest.mark.usefixtures("poisoned")


# ---------------------------------------------------------------- values and gradients


@grid(dtype=DTYPES, vocabulary=[1, 2, 123, 3001], backend=BACKENDS)
def test_every_shape(dtype, vocabulary, device, backend):
    """All four fields must agree with float64 for any width and vocabulary; padding of blocks never counts."""
    for width, workspace in itertools.product([1, 64, 123], [0, None]):
        case = make(7, width, vocabulary, dtype=dtype, device=device)
        assert_right(scored(case, workspace=workspace), case)


@grid(dtype=[torch.float32, torch.bfloat16], vocabulary=[50257, 65537], backend=BACKENDS)
def test_large_vocabularies(dtype, vocabulary, device, backend):
    """Hundreds of blocks must add up to the result of one."""
    case = make(5, 8, vocabulary, dtype=dtype, device=device)
    for workspace in (0, None):
        assert_right(scored(case, workspace=workspace), case)


@grid(dtype=DTYPES, masked=[0.0, 0.6, 1.0], backend=BACKENDS)
def test_every_option(dtype, masked, device, backend):
    """All four fields, 0 in ignored rows, must agree with float64 for each mix of options."""
    for bias, logit_scale, softcap in itertools.product([False, True], [1.0, 0.0625], [None, 2.5]):
        case = make(13, 20, 203, dtype=dtype, device=device, bias=bias, masked=masked)
        options = {"logit_scale": logit_scale, "softcap": softcap}
        assert_right(scored(case, workspace=3000, **options), case, **options)
        if dtype.itemsize > 2:  # rounding the product to 16 bits would be the test's own error
            actual = from_logits(*case[:2], case.targets, bias=case.bias, **options)
            assert_right(actual, case, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_workspace(dtype, device, backend):
    """Any number of bytes gives the same rank, and changes only the last digits of the other fields."""
    case = make(30, 16, 1111, dtype=dtype, device=device, masked=0.3)
    wanted = scored(case)
    for workspace in (0, 1, 1000, 10**5, 1 << 50):
        actual = scored(case, workspace=workspace)
        assert torch.equal(actual.rank, wanted.rank)
        assert_agree(actual, [x.cpu() for x in wanted], 2e-6)


@grid(
    {"dtype": torch.bfloat16, "shape": (40, 64, 3001), "softcap": 5.0, "backend": "compiled"},
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    shape=[(252, 507, 123), (40, 64, 3001)],
    softcap=[None, 5.0],
    backend=BACKENDS,
)
def test_no_worse_than_pytorch(dtype, shape, softcap, device, backend):
    """Against float64, no field is further off than float32 PyTorch from logits of the same dtype, plus 2e-6."""
    case = make(*shape, dtype=dtype, device=device, masked=0.3)
    wanted, theirs = truth(case, softcap=softcap), definition(logits_of(case, softcap=softcap).float(), case.targets)
    for workspace in (0, None):
        ours = scored(case, softcap=softcap, workspace=workspace)
        for at in (0, 2, 3):
            far = [error(x[at], wanted[at]) for x in (ours, theirs)]
            assert far[0] <= far[1] + 2e-6, (at, far)


def test_reference_is_the_definition():
    """pyunlearn.ops.reference must agree with a loop over the tokens."""
    z = logits_of(make(4, 8, 30, dtype=torch.float64))
    z[2, 4:9] = -torch.inf
    targets = torch.tensor([0, 7, 11, 29])
    actual = reference.token_statistics_of(z, targets)
    for n, (row, t) in enumerate(zip(z.tolist(), targets.tolist(), strict=True)):
        total = sum(math.exp(x) for x in row)
        p = [math.exp(x) / total for x in row if x > -math.inf]
        mean = sum(x * math.log(x) for x in p)
        square = sum(x * math.log(x) ** 2 for x in p)
        right = [row[t] - math.log(total), sum(x > row[t] for x in row), -mean, square - mean**2]
        assert [x[n].item() for x in actual] == pytest.approx(right, abs=1e-12)


# ---------------------------------------------------------------- rank


@grid(dtype=[torch.float32, torch.bfloat16], bias=[False, True], width=[1, 64, 1000], backend=BACKENDS)
def test_first_choice(dtype, bias, width, device, backend):
    """The largest logit has rank 0 and the next one 1, unless float32 cannot tell them apart; rounding never counts."""
    case = make(1500, width, 150, dtype=dtype, device=device, bias=bias)
    z = logits_of(exact(case))
    two, order = z.topk(2, dim=1)
    for place in (0, 1):
        case = case._replace(targets=order[:, place].to(device))
        for workspace in (0, None):
            rank = scored(case, workspace=workspace).rank.cpu()
            clear = (two[:, 0] - two[:, 1]) > 1e-6 * math.sqrt(width) * z.abs().amax(dim=1)
            assert (rank <= place).all()
            assert torch.equal(rank[clear], torch.full_like(rank[clear], place))


@pytest.mark.parametrize("columns", [2, 4])
def test_a_target_above_its_own_threshold_does_not_count(columns, device, backend):
    """The threshold is a bound of rounding errors above an exact product, and the block's own product may exceed it."""
    z, targets = torch.tensor([[3.0, 1.0, 2.0, 0.0]] * 4, device=device), torch.arange(4, device=device)
    sums = op_module._Sums(z, targets, torch.full((4,), 0.5, device=device))
    for first in range(0, 4, columns):
        sums.add(z[:, first : first + columns].contiguous(), first, None, 1.0, 0.0)
    assert sums.rank.tolist() == [2, 2, 2, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_token_and_its_copies(dtype, softcap, device, backend):
    """Copies of the target's row of the head, anywhere in the vocabulary, tie with it and never count."""
    case = make(400, 96, 41, dtype=dtype, device=device)
    z = logits_of(exact(case), softcap=softcap)
    right = 5 * (z > z.gather(1, case.targets.cpu()[:, None])).sum(dim=1)
    many = Case(case.hidden, case.weight.repeat(5, 1), case.bias.repeat(5), case.targets)
    for copy in (0, 1, 4):
        actual = scored(many._replace(targets=many.targets + 41 * copy), softcap=softcap, workspace=0)
        assert torch.equal(actual.rank.cpu(), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_where_one_term_of_a_product_is_large(dtype, device, backend):
    """Each addition is then rounded to its size, and still a copy of the target's row never counts."""
    for width in (64, 640, 2048):
        case = make(64, width, 256, dtype=dtype, device=device)
        case.hidden[:, width // 2] = 3000
        z = logits_of(exact(case))
        right = (z > z.gather(1, case.targets.cpu()[:, None])).sum(dim=1)
        many = Case(case.hidden, case.weight.repeat(2, 1), case.bias.repeat(2), case.targets)
        assert (scored(many).rank.cpu() <= 2 * right).all()


@given(
    rows=st.integers(1, 130).flatmap(
        lambda n: st.lists(st.lists(st.integers(-2, 2), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    at=st.integers(0, 129),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from([{}, {"logit_scale": 0.3}, {"softcap": 1.7}]),
)
def test_ties(rows, at, dtype, options, device, backend):
    """Among logits that are small integers, equal ones never count and larger ones always do."""
    logits = torch.tensor(rows, dtype=dtype, device=device)
    targets = torch.full((len(rows),), at % logits.shape[1], device=device)
    actual = token_statistics_from_logits(logits, targets, **options)
    z = logits.double().cpu() * options.get("logit_scale", 1)
    z = 1.7 * torch.tanh(z / 1.7) if "softcap" in options else z
    right = reference.token_statistics_of(z, targets.cpu())
    assert torch.equal(actual.rank.cpu(), right[1])
    assert_agree(actual, right, 2e-6)


# ---------------------------------------------------------------- the edges


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("workspace", [0, None])
def test_common_offset(offset, workspace, device, backend):
    """A constant on all logits, where adding it is exact, changes nothing."""
    case = make(6, 16, 500, device=device)
    case = Case(*((t.clamp(-2, 2) * 8).round() / 8 for t in case[:3]), case.targets)  # so that products are exact too
    actual = scored(case._replace(bias=case.bias + offset), workspace=workspace)
    assert_right(actual, case)
    assert_equal(actual, scored(case, workspace=workspace))


@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_tokens(dtype, device, backend):
    """Logits of -inf, whole blocks of them, add nothing to any field, first, last or between."""
    case = make(6, 8, 90, dtype=dtype, device=device)
    logits = logits_of(case)
    nothing = torch.full((6, 130), -torch.inf, device=device, dtype=dtype)
    wanted = token_statistics_from_logits(logits, case.targets)
    for parts, moved in (([nothing, logits], 130), ([logits, nothing], 0)):
        actual = token_statistics_from_logits(torch.cat(parts, 1), case.targets + moved)
        assert_agree(actual, [x.cpu() for x in wanted], 1e-6)
    wide = make(6, 8, 500, dtype=dtype, device=device)
    wide.bias[:130], wide.bias[200:330] = -torch.inf, -torch.inf
    wide.targets.copy_(torch.tensor([130, 150, 199, 330, 400, 499]))
    for op in (token_statistics, from_logits):
        actual, right = op(*wide[:2], wide.targets, bias=wide.bias, workspace=0), truth(wide)
        assert_agree(actual[2:], right[2:], 2e-2 if op is from_logits and dtype.itemsize == 2 else 4e-6)


@both_ops
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5}, {"softcap": 3.0}])
def test_impossible_target(op, options, device, backend):
    """All possible tokens rank before a target with a bias of -inf, whose logit is -inf, or -softcap."""
    case = make(3, 8, 90, device=device)
    case.bias[5:8], case.targets[:] = -torch.inf, 6
    actual = op(*case[:2], case.targets, bias=case.bias, **options)
    assert "softcap" in options or (actual.log_likelihood == -torch.inf).all()
    assert actual.rank.tolist() == [87] * 3


def test_no_distribution(device, backend):
    """Rows that are no distribution (all -inf, +inf, NaN) give NaN and rank -1, and leave the others alone."""
    case = make(6, 8, 130, device=device)
    logits, bad = logits_of(case), torch.tensor([False, True, True, True, False, False])
    good = token_statistics_from_logits(logits, case.targets)
    logits[1], logits[2, 7], logits[3, 100] = -torch.inf, torch.inf, torch.nan
    actual = token_statistics_from_logits(logits, case.targets)
    assert actual.log_likelihood.isnan().tolist() == bad.tolist()
    assert (actual.rank.cpu()[bad] == -1).all()
    assert_equal([x[~bad] for x in actual], [x[~bad] for x in good])

    good = scored(case, workspace=0)
    case.hidden[1], case.hidden[2, 3], case.hidden[3, 0] = torch.nan, torch.inf, torch.nan
    actual = scored(case, workspace=0)
    assert actual.log_likelihood.isnan().tolist() == bad.tolist()
    assert (actual.rank.cpu()[bad] == -1).all()
    assert_equal([x[~bad] for x in actual], [x[~bad] for x in good])
    case.targets[1:4] = -100
    assert not any(x[1:4].any() for x in scored(case))  # the contents of an ignored row do not matter


@pytest.mark.parametrize("gap", [3.0, 12.0, 17.0, 60.0, 200.0])
def test_nearly_certain(gap, device, backend):
    """Entropy and variance of a nearly certain token are float64's, and never negative."""
    logits = torch.zeros(1, 3001)
    logits[0, 1234], targets = gap, torch.tensor([1234])
    actual = token_statistics_from_logits(logits.to(device), targets.to(device))
    assert_agree(actual, reference.token_statistics_of(logits.double(), targets), 1e-5)
    assert actual.entropy >= 0
    assert actual.variance >= 0


@pytest.mark.parametrize("vocabulary", [1, 2, 123, 50257])
def test_uniform(vocabulary, device, backend):
    """Uniform logits have entropy log V, variance 0 and rank 0."""
    case = Case(
        torch.zeros(2, 3), torch.ones(vocabulary, 3), torch.full((vocabulary,), 2.5), ids(2) * (vocabulary // 2)
    )
    actual = scored(cast(case, device=device), workspace=0)
    assert_agree([actual.entropy], [torch.full((2,), math.log(vocabulary))], 1e-6)
    assert not actual.variance.any()
    assert not actual.rank.any()


@both_ops
@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (2, 0), (0,)])
def test_leading_dimensions(op, shape, device, backend):
    """Targets of any shape, int32 ones and none at all too, come back in that shape."""
    case = make(math.prod(shape), 8, 90, device=device, bias=False)
    actual = op(case.hidden.reshape(*shape, 8), case.weight, case.targets.reshape(shape).int())
    assert [x.shape for x in actual] == [shape] * 4
    assert_agree([x.flatten() for x in actual], truth(case), 4e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device, backend):
    """Logits in any memory layout must give the result of a contiguous copy."""
    for rows, vocabulary in ((1, 131), (6, 131), (6, 1)):
        case = make(rows, 8, vocabulary, device=device)
        shown = LAYOUTS[layout](logits_of(case))
        actual = token_statistics_from_logits(shown, case.targets)
        assert_agree(actual, reference.token_statistics_of(shown.double().cpu(), case.targets.cpu()), 4e-6)


@both_ops
def test_no_gradient(op, device):
    """No field has a graph, for inputs that require a gradient too."""
    case = make(4, 8, 90, device=device)
    hidden, weight, bias = (t.requires_grad_() for t in case[:3])
    assert not any(x.requires_grad for x in op(hidden, weight, case.targets, bias=bias))


@both_ops
def test_two_runs(op, device, backend):
    """Two calls with the same inputs must give the same bits."""
    case = make(65, 33, 1000, device=device, masked=0.3)
    first, second = (op(*case[:2], case.targets, bias=case.bias, softcap=9.0) for _ in range(2))
    assert_equal(second, first)


def test_mixed_dtypes(device, backend):
    """Hidden states, head and bias of different dtypes are computed in the widest."""
    case = make(9, 16, 200, device=device)
    mixed = Case(case.hidden.bfloat16(), case.weight, case.bias.double(), case.targets)
    assert_agree(scored(mixed), truth(mixed), 4e-6)


@both_ops
@pytest.mark.parametrize("wrong", [-1, 100, 2**40])
def test_target_out_of_range(op, wrong, device, backend, monkeypatch):
    """A target outside the vocabulary is an error on the CPU; the kernels, as on a GPU, give NaN and -1 in its row."""
    case = make(4, 8, 100, device=device)
    case.targets[2] = wrong
    if device == "cpu":
        with pytest.raises(ArgumentError, match=rf"must lie in \[0, 100\) or be -100 \(ignored\), got {wrong}: "):
            op(*case[:2], case.targets)
        monkeypatch.setattr(op_module, "check_targets", lambda *_: True)
    actual = op(*case[:2], case.targets)
    assert actual.log_likelihood.isnan().tolist() == [False, False, True, False]
    assert [r == -1 for r in actual.rank.tolist()] == [False, False, True, False]
