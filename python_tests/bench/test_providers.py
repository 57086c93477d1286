"""The providers that the benchmarks compare: their problems, their results and the check of these."""

import os
from dataclasses import replace

import pytest
import torch

import cbn_ext
from bench import cases, providers
from bench.cases import ADD_RELU, RELU, Case, WrongResultError, check, expected_results, make_problem
from bench.providers import BATCHNORM, JOINT, OURS, PROVIDERS, REFERENCE, SPLIT
from cbn_ext import Mode, Options, reference

SMALL = Case((4, 6, 5, 5))


def posterior(case: Case) -> torch.Tensor:
    problem = make_problem(case)
    running = (problem.state[f"running_{name}"] for name in ("prior", "mean", "var"))
    options = Options(Mode.CHANNEL, training=True, relu=False, detach_responsibility=False, eps=cases.EPS)
    return reference.responsibilities(problem.x.detach(), None, *running, options)


def test_mixed_data_shares_the_responsibility_between_all_components():
    p = posterior(Case((32, 16, 16, 16)))
    shares = p.mean((1, 3, 4))
    assert 0.1 < shares.min() <= shares.max() < 0.45
    assert p.amax(0).mean() < 0.75


def test_saturated_data_gives_each_value_to_one_component_and_every_component_some():
    p = posterior(Case((32, 16, 16, 16), data="saturated"))
    assert p.amax(0).mean() > 0.999
    assert p.mean((1, 3, 4)).min() > 0.2


def test_constant_data_has_every_other_channel_constant():
    x = make_problem(replace(SMALL, data="constant")).x.detach()
    assert (x.amax((0, 2, 3)) == x.amin((0, 2, 3))).tolist() == [True, False] * 3


@pytest.mark.parametrize("data", ["mixed", "saturated", "constant"])
def test_problems_are_repeatable_and_x_the_same_for_any_number_of_components(data):
    case = replace(SMALL, data=data)
    first, again, one = (make_problem(replace(case, components=m)) for m in (4, 4, 1))
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert torch.equal(first.x, one.x)
    assert torch.equal(first.grad_output, one.grad_output)


def test_groups_are_of_one_size_and_in_no_order():
    groups = make_problem(Case((20, 2, 2, 2))).groups
    assert groups.bincount().tolist() == [5] * 4
    assert groups.diff().unique().numel() > 3


@pytest.mark.parametrize("mode", [Mode.GROUPS, Mode.JOINT])
def test_results_of_a_mixture_for_each_channel_are_not_those_of_another_mode(mode):
    problem = make_problem(SMALL)
    expected = expected_results(problem, mode=mode)
    actual = providers.set_up(OURS, problem).results()
    with pytest.raises(WrongResultError, match="y differs"):
        check(OURS, problem.case, actual, expected)


def test_channels_last_problems_are_channels_last():
    problem = make_problem(replace(SMALL, layout="channels_last"))
    for tensor in (problem.x, problem.grad_output):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_unknown_data_and_provider_are_named():
    with pytest.raises(ValueError, match="got 'smooth'"):
        make_problem(replace(SMALL, data="smooth"))
    with pytest.raises(ValueError, match="unknown provider 'GroupNorm'"):
        providers.set_up("GroupNorm", make_problem(SMALL))
    with pytest.raises(ValueError, match="expected one component for BatchNorm2d, got 4"):
        providers.set_up(BATCHNORM, make_problem(SMALL))


@pytest.mark.parametrize("provider", [name for name, provider in PROVIDERS.items() if provider.compiled])
def test_compiled_providers_are_compiled(provider):
    components = 4 if PROVIDERS[provider].layer == REFERENCE else 1
    problem = make_problem(replace(SMALL, components=components))
    assert isinstance(providers.set_up(provider, problem).layer, torch._dynamo.OptimizedModule)


@pytest.mark.parametrize("data", ["mixed", "saturated", "constant"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("provider", "components"),
    [
        (OURS, 4),
        (OURS, 1),
        (OURS + RELU, 4),
        (OURS + ADD_RELU, 4),
        (OURS + SPLIT, 4),
        (OURS + JOINT, 4),
        (BATCHNORM, 1),
        (BATCHNORM + RELU, 1),
        (BATCHNORM + ADD_RELU, 1),
        (REFERENCE, 4),
    ],
)
def test_every_provider_passes_the_check_and_keeps_its_running_statistics(provider, components, layout, data):
    problem = make_problem(replace(SMALL, components=components, layout=layout, data=data))
    workload = providers.set_up(provider, problem)
    operation, mode = workload.provider.operation, workload.provider.mode
    # Without groups, evaluation is that of the mixture.
    mixture = Mode.CHANNEL if mode is Mode.GROUPS else mode
    check(provider, problem.case, [workload.evaluate()], [cases.expected_evaluation(problem, operation, mixture)])
    assert workload.layer.training
    actual = workload.results()
    expected = expected_results(problem, operation, mode, actual[0])
    assert len(actual) == len(expected) == (5 if operation == ADD_RELU else 4)
    check(provider, problem.case, actual, expected, operation)
    kept = workload.layer.running_mean.reshape(components, -1)
    torch.testing.assert_close(kept, problem.state["running_mean"], rtol=1e-4, atol=1e-4)


def test_expected_results_do_not_depend_on_the_blocks():
    problem = make_problem(SMALL)
    output = torch.randn_like(problem.x)
    for operation in cases.OPERATIONS:
        whole, blocks = (expected_results(problem, operation, Mode.CHANNEL, output, n) for n in (10**6, 200))
        for one, other in zip(whole, blocks, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_results_of_some_channels_are_those_of_all():
    problem, channels = make_problem(SMALL), torch.tensor([0, 3, 5])
    whole, some = expected_results(problem), expected_results(problem.part(channels))
    for one, other in zip(whole, some, strict=True):
        torch.testing.assert_close(one[:, channels], other, rtol=1e-12, atol=1e-12)


@pytest.fixture
def environments(monkeypatch) -> list[tuple[str | None, ...]]:
    """What the CUDA operators read of two variables, of which the first one is set before."""
    names = ("CBN_CUDA_CLUSTER", "CBN_CUDA_BLOCKS")
    seen = []
    read = lambda: seen.append(tuple(os.environ.get(name) for name in names))  # noqa: E731
    monkeypatch.setattr(cbn_ext.ops, "read_cuda_environment", read)
    monkeypatch.setenv(names[0], "2")
    monkeypatch.delenv(names[1], raising=False)
    return seen


def test_settings_are_read_and_then_those_of_before(environments):
    with providers.cuda_settings({"CLUSTER": 0, "BLOCKS": 8}):
        assert environments == [("0", "8")]
    assert environments == [("0", "8"), ("2", None)]
    with pytest.raises(KeyError), providers.cuda_settings({"BLOCKS": 16}):
        raise KeyError
    assert environments[2:] == [("2", "16"), ("2", None)]


def test_without_settings_nothing_is_read(environments):
    with providers.cuda_settings(PROVIDERS[OURS].settings):
        pass
    assert environments == []


def test_names_tell_layer_operation_and_settings_and_are_told_apart():
    provider = PROVIDERS["cbn_ext cluster=0 blocks=16"]
    assert provider == providers.Provider(OURS, settings={"CLUSTER": 0, "BLOCKS": 16})
    assert PROVIDERS["BatchNorm2d + add + ReLU compiled"] == providers.Provider(BATCHNORM, ADD_RELU, compiled=True)
    assert PROVIDERS["cbn_ext + ReLU"].peer == "BatchNorm2d + ReLU"
    assert len({str(provider) for provider in PROVIDERS.values()}) == len(PROVIDERS)
    assert {provider.peer for provider in PROVIDERS.values()} <= PROVIDERS.keys()


@pytest.mark.parametrize(
    ("output", "grad", "message"),
    [
        (1.001, 1.0, r"y differs from the float64 reference by 0\.001 of its norm, expected at most 0\.0001"),
        (1.0, 0.98, r"grad x differs from the float64 reference by 0\.02 of its norm"),
        (float("nan"), 1.0, r"y differs from the float64 reference by nan"),
    ],
)
def test_wrong_results_are_named_with_their_error(output, grad, message):
    problem = make_problem(SMALL)
    y, grad_x, *others = expected = expected_results(problem)
    with pytest.raises(WrongResultError, match="mine, shape 4x6x5x5.*" + message):
        check("mine", problem.case, [y * output, grad_x * grad, *others], expected)


def test_gradients_behind_a_relu_may_differ_in_an_element_of_many():
    problem = make_problem(SMALL)
    y, grad_x, *others = expected = expected_results(problem)
    actual = [y, grad_x * 1.004, *others]
    with pytest.raises(WrongResultError, match="grad x"):
        check("mine", problem.case, actual, expected)
    check("mine", problem.case, actual, expected, RELU)
    with pytest.raises(WrongResultError, match=r"grad x .* by 0\.006 of its norm"):
        check("mine", problem.case, [y, grad_x * 1.006, *others], expected, RELU)
    with pytest.raises(WrongResultError, match="y differs"):
        check("mine", problem.case, [y * 1.004, grad_x, *others], expected, RELU)
