"""token_statistics and token_statistics_from_logits, against their definition in float64."""

import itertools
import math
import sys

import pytest
import torch
from heads import Allocations, Case, assert_agree, assert_equal, cast, elsewhere, error, ids, make, products
from hypothesis import given
from hypothesis import strategies as st
from test_ops_log_likelihood import LAYOUTS

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import TokenStatistics, _backend, reference, token_statistics, token_statistics_from_logits
from pyunlearn.ops._plan import MIB

pytestmark = pytest.mark.usefixtures("poisoned")
op_module = sys.modules["pyunlearn.ops.token_statistics"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float64: 1e-11}  # for the others 4e-6: they are all computed in float32


def scored(case, **options):
    """token_statistics of a case."""
    return token_statistics(*case[:2], case.targets, bias=case.bias, **options)


def from_logits(hidden, weight, targets, *, workspace=None, **options):
    """token_statistics_from_logits with token_statistics's signature."""
    return token_statistics_from_logits(hidden @ weight.T, targets, **options)


def logits_of(case, logit_scale=1.0, softcap=None):
    """The logits, in whole, in the case's dtype."""
    z = case.hidden @ case.weight.T
    z = (z if case.bias is None else z + case.bias) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def exact(case):
    """The case in float64 on the CPU."""
    return cast(case, dtype=torch.float64, device="cpu")


def definition(logits, targets):
    """The four fields, 0 in ignored rows."""
    masked = targets == -100
    return [x.masked_fill(masked, 0) for x in reference.token_statistics_of(logits, targets.masked_fill(masked, 0))]


def truth(case, **options):
    """What `scored` should find, from float64."""
    return definition(logits_of(exact(case), **options), exact(case).targets)


def assert_right(found, case, **options):
    """Every field is what the definition says.

    rank: whoever is larger by more than float32 can round away counts, and whoever is not larger never does.
    """
    dtype = case.hidden.dtype
    real = dtype if dtype is torch.float64 else torch.float32
    assert isinstance(found, TokenStatistics)
    assert [x.dtype for x in found] == [real, torch.int64, real, real]
    wanted = truth(case, **options)
    assert_agree([found[0], found[2]], [wanted[0], wanted[2]], TOLERANCE.get(dtype, 4e-6))
    assert_agree([found[3]], [wanted[3]], TOLERANCE.get(dtype, 1e-5))  # a difference of squares
    case, live = exact(case), (case.targets != -100).cpu()
    z = logits_of(case, **options)
    size = case.hidden.abs() @ case.weight.abs().T + (0 if case.bias is None else case.bias.abs())
    slack = 8 * torch.finfo(real).eps * abs(options.get("logit_scale", 1.0)) * size.amax(dim=1, keepdim=True)
    above = (z > z.gather(1, case.targets.clamp(0)[:, None]) + slack).sum(dim=1) * live
    assert ((above <= found.rank.cpu()) & (found.rank.cpu() <= wanted[1])).all()


both_ops = pytest.mark.parametrize(
    "op", [pytest.param(token_statistics, id="linear"), pytest.param(from_logits, id="logits")]
)


# ---------------------------------------------------------------- the answer is right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 123, 3001])
def test_every_shape(dtype, vocabulary, device, backend):
    """All four fields must agree with float64 for any width and vocabulary, whole blocks or not, padding never counted."""
    for width, workspace in itertools.product([1, 64, 123], [0, None]):
        case = make(7, width, vocabulary, dtype=dtype, device=device)
        assert_right(scored(case, workspace=workspace), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [50257, 65537])
def test_large_vocabularies(dtype, vocabulary, device, backend):
    """Hundreds of blocks must add up to what one gives."""
    case = make(5, 8, vocabulary, dtype=dtype, device=device)
    for workspace in (0, None):
        assert_right(scored(case, workspace=workspace), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [0.0, 0.6, 1.0])
def test_every_option(dtype, masked, device, backend):
    """All four fields must agree with float64 for each mix of dtype, mask, bias, scale and softcap, 0 in ignored rows."""
    for bias, logit_scale, softcap in itertools.product([False, True], [1.0, 0.0625], [None, 2.5]):
        case = make(13, 20, 203, dtype=dtype, device=device, bias=bias, masked=masked)
        options = {"logit_scale": logit_scale, "softcap": softcap}
        assert_right(scored(case, workspace=3000, **options), case, **options)
        if dtype.itemsize > 2:  # rounding the product to 16 bits would be the test's own error
            found = from_logits(*case[:2], case.targets, bias=case.bias, **options)
            assert_right(found, case, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_workspace(dtype, device, backend):
    """However few bytes are allowed, the rank is the same and the others move in their last digits."""
    case = make(30, 16, 1111, dtype=dtype, device=device, masked=0.3)
    wanted = scored(case)
    for workspace in (0, 1, 1000, 10**5, 1 << 50):
        found = scored(case, workspace=workspace)
        assert torch.equal(found.rank, wanted.rank)
        assert_agree(found, [x.cpu() for x in wanted], 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(252, 507, 123), (40, 64, 3001)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_worse_than_pytorch(dtype, shape, softcap, device, backend):
    """Against float64, no field may be further off than plain PyTorch, float32 from logits of the same dtype, plus 2e-6 (of its size, above 1)."""
    case = make(*shape, dtype=dtype, device=device, masked=0.3)
    wanted, theirs = truth(case, softcap=softcap), definition(logits_of(case, softcap=softcap).float(), case.targets)
    for workspace in (0, None):
        ours = scored(case, softcap=softcap, workspace=workspace)
        for at in (0, 2, 3):
            far = [error(x[at], wanted[at]) for x in (ours, theirs)]
            assert far[0] <= far[1] + 2e-6, (at, far)


def test_reference_is_the_definition():
    """pyunlearn.ops.reference must say what a loop over the tokens says."""
    z = logits_of(make(4, 8, 30, dtype=torch.float64))
    z[2, 4:9] = -torch.inf
    targets = torch.tensor([0, 7, 11, 29])
    found = reference.token_statistics_of(z, targets)
    for n, (row, t) in enumerate(zip(z.tolist(), targets.tolist(), strict=True)):
        total = sum(math.exp(x) for x in row)
        p = [math.exp(x) / total for x in row if x > -math.inf]
        mean = sum(x * math.log(x) for x in p)
        square = sum(x * math.log(x) ** 2 for x in p)
        right = [row[t] - math.log(total), sum(x > row[t] for x in row), -mean, square - mean**2]
        assert [x[n].item() for x in found] == pytest.approx(right, abs=1e-12)


# ---------------------------------------------------------------- rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 64, 1000])
def test_first_choice(dtype, bias, width, device, backend):
    """The largest logit has rank 0 and the next one 1 unless float32 cannot tell them apart: rounding the target never counts."""
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_token_and_its_copies(dtype, softcap, device, backend):
    """Copies of the target's row of the head tie with it, wherever they stand, and never count."""
    case = make(400, 96, 41, dtype=dtype, device=device)
    z = logits_of(exact(case), softcap=softcap)
    right = 5 * (z > z.gather(1, case.targets.cpu()[:, None])).sum(dim=1)
    many = Case(case.hidden, case.weight.repeat(5, 1), case.bias.repeat(5), case.targets)
    for copy in (0, 1, 4):
        found = scored(many._replace(targets=many.targets + 41 * copy), softcap=softcap, workspace=0)
        assert torch.equal(found.rank.cpu(), right)


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
    found = token_statistics_from_logits(logits, targets, **options)
    z = logits.double().cpu() * options.get("logit_scale", 1)
    z = 1.7 * torch.tanh(z / 1.7) if "softcap" in options else z
    right = reference.token_statistics_of(z, targets.cpu())
    assert torch.equal(found.rank.cpu(), right[1])
    assert_agree(found, right, 2e-6)


# ---------------------------------------------------------------- the edges


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("workspace", [0, None])
def test_common_offset(offset, workspace, device, backend):
    """A constant on all logits, where adding it is exact, changes nothing."""
    case = make(6, 16, 500, device=device)
    case = Case(*((t.clamp(-2, 2) * 8).round() / 8 for t in case[:3]), case.targets)  # so that products are exact too
    found = scored(case._replace(bias=case.bias + offset), workspace=workspace)
    assert_right(found, case)
    assert_equal(found, scored(case, workspace=workspace))


@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_tokens(dtype, device, backend):
    """Logits of -inf, whole blocks of them, add nothing to any field, first, last or between."""
    case = make(6, 8, 90, dtype=dtype, device=device)
    logits = logits_of(case)
    nothing = torch.full((6, 130), -torch.inf, device=device, dtype=dtype)
    wanted = token_statistics_from_logits(logits, case.targets)
    for parts, moved in (([nothing, logits], 130), ([logits, nothing], 0)):
        found = token_statistics_from_logits(torch.cat(parts, 1), case.targets + moved)
        assert_agree(found, [x.cpu() for x in wanted], 1e-6)
    wide = make(6, 8, 500, dtype=dtype, device=device)
    wide.bias[:130], wide.bias[200:330] = -torch.inf, -torch.inf
    wide.targets.copy_(torch.tensor([130, 150, 199, 330, 400, 499]))
    for op in (token_statistics, from_logits):
        found, right = op(*wide[:2], wide.targets, bias=wide.bias, workspace=0), truth(wide)
        assert_agree(found[2:], right[2:], 2e-2 if op is from_logits and dtype.itemsize == 2 else 4e-6)


@both_ops
@pytest.mark.parametrize("logit_scale", [1.0, 0.5])
def test_impossible_target(op, logit_scale, device, backend):
    """A target whose own logit is -inf has log-likelihood -inf, and all possible tokens stand before it."""
    case = make(3, 8, 90, device=device)
    case.bias[5:8], case.targets[:] = -torch.inf, 6
    found = op(*case[:2], case.targets, bias=case.bias, logit_scale=logit_scale)
    assert (found.log_likelihood == -torch.inf).all()
    assert found.rank.tolist() == [87] * 3


def test_no_distribution(device, backend):
    """Rows that are no distribution (all -inf, +inf, NaN) give NaN and rank -1, and leave the others alone."""
    case = make(6, 8, 130, device=device)
    logits, bad = logits_of(case), torch.tensor([False, True, True, True, False, False])
    good = token_statistics_from_logits(logits, case.targets)
    logits[1], logits[2, 7], logits[3, 100] = -torch.inf, torch.inf, torch.nan
    found = token_statistics_from_logits(logits, case.targets)
    assert found.log_likelihood.isnan().tolist() == bad.tolist()
    assert (found.rank.cpu()[bad] == -1).all()
    assert_equal([x[~bad] for x in found], [x[~bad] for x in good])

    good = scored(case, workspace=0)
    case.hidden[1], case.hidden[2, 3], case.hidden[3, 0] = torch.nan, torch.inf, torch.nan
    found = scored(case, workspace=0)
    assert found.log_likelihood.isnan().tolist() == bad.tolist()
    assert (found.rank.cpu()[bad] == -1).all()
    assert_equal([x[~bad] for x in found], [x[~bad] for x in good])
    case.targets[1:4] = -100
    assert not any(x[1:4].any() for x in scored(case))  # what an ignored row holds does not matter


@pytest.mark.parametrize("gap", [3.0, 12.0, 17.0, 60.0, 200.0])
def test_nearly_certain(gap, device, backend):
    """Entropy and variance of a nearly certain token are float64's, and never negative."""
    logits = torch.zeros(1, 3001)
    logits[0, 1234], targets = gap, torch.tensor([1234])
    found = token_statistics_from_logits(logits.to(device), targets.to(device))
    assert_agree(found, reference.token_statistics_of(logits.double(), targets), 1e-5)
    assert found.entropy >= 0
    assert found.variance >= 0


@pytest.mark.parametrize("vocabulary", [1, 2, 123, 50257])
def test_uniform(vocabulary, device, backend):
    """Where every token is as likely, the entropy is log V, the variance 0, and no token stands before any other."""
    case = Case(
        torch.zeros(2, 3), torch.ones(vocabulary, 3), torch.full((vocabulary,), 2.5), ids(2) * (vocabulary // 2)
    )
    found = scored(cast(case, device=device), workspace=0)
    assert_agree([found.entropy], [torch.full((2,), math.log(vocabulary))], 1e-6)
    assert not found.variance.any()
    assert not found.rank.any()


@both_ops
@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (2, 0), (0,)])
def test_leading_dimensions(op, shape, device, backend):
    """Targets of any shape, int32 ones and none at all too, come back in that shape."""
    case = make(math.prod(shape), 8, 90, device=device, bias=False)
    found = op(case.hidden.reshape(*shape, 8), case.weight, case.targets.reshape(shape).int())
    assert [x.shape for x in found] == [shape] * 4
    assert_agree([x.flatten() for x in found], truth(case), 4e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device, backend):
    """Logits in any layout must count as the numbers they show."""
    for rows, vocabulary in ((1, 131), (6, 131), (6, 1)):
        case = make(rows, 8, vocabulary, device=device)
        shown = LAYOUTS[layout](logits_of(case))
        found = token_statistics_from_logits(shown, case.targets)
        assert_agree(found, reference.token_statistics_of(shown.double().cpu(), case.targets.cpu()), 4e-6)


@both_ops
def test_no_gradient(op, device):
    """No field has a graph, whatever asks for a gradient."""
    case = make(4, 8, 90, device=device)
    hidden, weight, bias = (t.requires_grad_() for t in case[:3])
    assert not any(x.requires_grad for x in op(hidden, weight, case.targets, bias=bias))


@both_ops
def test_two_runs(op, device, backend):
    """The same inputs must give the same bits again."""
    case = make(65, 33, 1000, device=device, masked=0.3)
    first, second = (op(*case[:2], case.targets, bias=case.bias, softcap=9.0) for _ in range(2))
    assert_equal(second, first)


def test_mixed_dtypes(device, backend):
    """Hidden states, head and bias of different dtypes meet in the widest."""
    case = make(9, 16, 200, device=device)
    mixed = Case(case.hidden.bfloat16(), case.weight, case.bias.double(), case.targets)
    assert_agree(scored(mixed), truth(mixed), 4e-6)


@both_ops
@pytest.mark.parametrize("wrong", [-1, 100, 2**40])
def test_target_out_of_range(op, wrong, device, backend, monkeypatch):
    """A target outside the vocabulary is an error on the CPU; the kernels alone, as on a card, say NaN and -1 in its row."""
    case = make(4, 8, 100, device=device)
    case.targets[2] = wrong
    if device == "cpu":
        with pytest.raises(ArgumentError, match=rf"must lie in \[0, 100\) or be -100 \(ignored\), got {wrong}: "):
            op(*case[:2], case.targets)
        monkeypatch.setattr(op_module, "check_targets", lambda *_: None)
    found = op(*case[:2], case.targets)
    assert found.log_likelihood.isnan().tolist() == [False, False, True, False]
    assert [r == -1 for r in found.rank.tolist()] == [False, False, True, False]


# ---------------------------------------------------------------- what it costs, and PyTorch's own checks


def watched():
    """Allocations that see into token_statistics."""
    used = Allocations()
    used.inside[torch.ops.pyunlearn.token_statistics.default] = op_module._forward
    return used


@pytest.mark.parametrize("workspace", [MIB, 4 * MIB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cost(workspace, dtype, device):
    """One product, a quarter of the workspace for a block of logits, a few numbers a row, and never N * V of anything."""
    rows, width, vocabulary = 1024, 8, 8192  # 32 MiB of float32 logits
    case = make(rows, width, vocabulary, dtype=dtype, device=device, masked=0.3)
    seen = []

    def run():
        with watched() as used:
            scored(case, workspace=workspace)
        seen.append(used)

    assert products(case, run) == 1
    blocks = 8 if _backend.kernels_for(case.hidden) == "reference" else 1  # plain torch makes copies of a block
    assert workspace // 8 < seen[0].largest <= workspace // 4 * blocks
    assert seen[0].peak <= workspace // 4 * blocks + rows * 8 * 24 + MIB // 4


def test_opcheck(device):
    """torch.library must find schema, fake kernels and the missing autograd of both ops in order."""
    ops, (hidden, weight, bias, targets) = torch.ops.pyunlearn, make(4, 8, 90, device=device)
    torch.library.opcheck(ops.token_statistics.default, (hidden, weight, bias, targets, 0.5, 3.0, -100, None))
    torch.library.opcheck(
        ops.token_statistics.default, (hidden.double(), weight.double(), None, targets, 1.0, 0.0, -100, 0)
    )
    logits = hidden @ weight.T
    for bias_or_none in (bias, None):
        torch.library.opcheck(
            ops.token_statistics_from_logits.default, (logits.bfloat16(), bias_or_none, targets, 0.5, 3.0, -100)
        )


@both_ops
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(op, dynamic, device):
    """torch.compile(fullgraph=True) must take it without a break and give the eager answer, at every shape."""
    torch._dynamo.reset()

    def function(hidden, weight, targets, bias):
        return op(hidden, weight, targets, bias=bias, softcap=4.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9) if dynamic else (6,):
        hidden, weight, bias, targets = make(rows, 8, 200, device=device, masked=0.3)
        assert_equal(compiled(hidden, weight, targets, bias), function(hidden, weight, targets, bias))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden": ids(3, 4)}, r"hidden must be a float32, .*, got torch\.int64 of shape \(3, 4\)"),
        ({"targets": ids(4)}, r"one token id for each row of hidden, shape \(3,\), got \(4,\)"),
        ({"targets": torch.ones(3)}, r"targets must be an int64 tensor"),
        ({"targets": ids(3, **elsewhere)}, "targets are on meta and hidden on cpu: move them to one device"),
        ({"weight": torch.ones(10, 5)}, r"weight must have shape \(V, 4\) to match hidden .*, got \(10, 5\)"),
        ({"weight": torch.ones(10, 4, **elsewhere)}, "weight is on meta and hidden on cpu: move them to one device"),
        ({"bias": torch.ones(9)}, r"bias must have shape \(10,\), one number for each vocabulary entry, got \(9,\)"),
        ({"bias": torch.ones(10, **elsewhere)}, "bias is on meta and the rest on cpu: move them to one device"),
        ({"softcap": 0.0}, r"softcap must be positive, got 0\.0"),
        ({"workspace": -1}, "workspace must be a number of bytes, 0 or more, got -1"),
    ],
)
def test_errors(changes, sentence):
    """Each wrong argument is named with what was wanted and what came."""
    case = make(3, 4, 10)
    with pytest.raises(ArgumentError, match=sentence):
        token_statistics(**{"hidden": case.hidden, "weight": case.weight, "targets": case.targets} | changes)
    if "bias" in changes:
        with pytest.raises(ArgumentError, match=sentence.replace("hidden", "logits")):
            token_statistics_from_logits(torch.ones(3, 10), case.targets, **changes)
