"""The providers that the benchmarks compare: their problems, their results and the check of these."""

import os
from dataclasses import replace

import pytest
import torch

import cbn_ext
from bench import providers
from bench.providers import (
    ADD_RELU,
    BATCHNORM,
    BATCHNORM_ADD_RELU,
    BATCHNORM_RELU,
    OURS,
    OURS_ADD_RELU,
    OURS_RELU,
    PROVIDERS,
    REFERENCE,
    REFERENCE_COMPILED,
    RELU,
    Case,
)
from cbn_ext import reference

SMALL = Case((4, 6, 5, 5))


def posterior(case: Case) -> torch.Tensor:
    problem = providers.make_problem(case)
    running = (problem.state[f"running_{name}"] for name in ("prior", "mean", "var"))
    options = reference.Options(reference.Mode.CHANNEL, True, False, False, providers.EPS)
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
    x = providers.make_problem(replace(SMALL, data="constant")).x.detach()
    assert (x.amax((0, 2, 3)) == x.amin((0, 2, 3))).tolist() == [True, False] * 3


@pytest.mark.parametrize("data", ["mixed", "saturated", "constant"])
def test_problems_are_repeatable_and_x_the_same_for_any_number_of_components(data):
    case = replace(SMALL, data=data)
    first, again, one = (providers.make_problem(replace(case, components=m)) for m in (4, 4, 1))
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert torch.equal(first.x, one.x)
    assert torch.equal(first.grad_output, one.grad_output)


def test_channels_last_problems_are_channels_last():
    problem = providers.make_problem(replace(SMALL, layout="channels_last"))
    for tensor in (problem.x, problem.grad_output):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_unknown_data_and_provider_are_named():
    with pytest.raises(ValueError, match="got 'smooth'"):
        providers.make_problem(replace(SMALL, data="smooth"))
    with pytest.raises(ValueError, match="unknown provider 'GroupNorm'"):
        providers.set_up("GroupNorm", providers.make_problem(SMALL))
    with pytest.raises(ValueError, match="expected one component for BatchNorm2d, got 4"):
        providers.set_up(BATCHNORM, providers.make_problem(SMALL))


@pytest.mark.parametrize("provider", [name for name, provider in PROVIDERS.items() if provider.compiled])
def test_compiled_providers_are_compiled(provider):
    components = 4 if provider == REFERENCE_COMPILED else 1
    problem = providers.make_problem(replace(SMALL, components=components))
    assert isinstance(providers.set_up(provider, problem).layer, torch._dynamo.OptimizedModule)


@pytest.mark.parametrize("data", ["mixed", "saturated", "constant"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("provider", "components"),
    [
        (OURS, 4),
        (OURS, 1),
        (OURS_RELU, 4),
        (OURS_ADD_RELU, 4),
        (BATCHNORM, 1),
        (BATCHNORM_RELU, 1),
        (BATCHNORM_ADD_RELU, 1),
        (REFERENCE, 4),
    ],
)
def test_every_provider_passes_the_check_and_keeps_its_running_statistics(provider, components, layout, data):
    problem = providers.make_problem(replace(SMALL, components=components, layout=layout, data=data))
    workload = providers.set_up(provider, problem)
    operation = workload.provider.operation
    providers.check(provider, problem.case, [workload.evaluate()], [providers.expected_evaluation(problem, operation)])
    assert workload.layer.training
    actual = providers.results(workload)
    expected = providers.expected_results(problem, operation, actual[0])
    assert len(actual) == len(expected) == (5 if operation == ADD_RELU else 4)
    providers.check(provider, problem.case, actual, expected, operation)
    kept = workload.layer.running_mean.reshape(components, -1)
    torch.testing.assert_close(kept, problem.state["running_mean"], rtol=1e-4, atol=1e-4)


def test_expected_results_do_not_depend_on_the_blocks():
    problem = providers.make_problem(SMALL)
    output = torch.randn_like(problem.x)
    for operation in providers.OPERATIONS:
        whole, blocks = (providers.expected_results(problem, operation, output, n) for n in (10**6, 200))
        for one, other in zip(whole, blocks, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_results_of_some_channels_are_those_of_all():
    problem, channels = providers.make_problem(SMALL), torch.tensor([0, 3, 5])
    whole, some = providers.expected_results(problem), providers.expected_results(providers.part_of(problem, channels))
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


def test_settings_are_those_of_both_paths():
    settings = {name: provider.settings for name, provider in PROVIDERS.items() if provider.settings}
    assert settings["cbn_ext cluster=0 blocks=16 ahead=7"] == {"CLUSTER": 0, "BLOCKS": 16, "AHEAD": 7}
    assert settings["cbn_ext cluster=8 threads=256"] == {"CLUSTER": 8, "THREADS": 256}
    assert len({tuple(each.items()) for each in settings.values()}) == len(settings) == 3 * 2 + 2 * 2


@pytest.mark.parametrize(
    ("output", "grad", "message"),
    [
        (1.001, 1.0, r"y differs from the float64 reference by 0\.001 of its norm, expected at most 0\.0001"),
        (1.0, 0.98, r"grad x differs from the float64 reference by 0\.02 of its norm"),
        (float("nan"), 1.0, r"y differs from the float64 reference by nan"),
    ],
)
def test_wrong_results_are_named_with_their_error(output, grad, message):
    problem = providers.make_problem(SMALL)
    y, grad_x, *others = expected = providers.expected_results(problem)
    with pytest.raises(providers.WrongResultError, match="mine, shape 4x6x5x5.*" + message):
        providers.check("mine", problem.case, [y * output, grad_x * grad, *others], expected)


def test_gradients_behind_a_relu_may_differ_in_an_element_of_many():
    problem = providers.make_problem(SMALL)
    y, grad_x, *others = expected = providers.expected_results(problem)
    actual = [y, grad_x * 1.004, *others]
    with pytest.raises(providers.WrongResultError, match="grad x"):
        providers.check("mine", problem.case, actual, expected)
    providers.check("mine", problem.case, actual, expected, RELU)
    with pytest.raises(providers.WrongResultError, match=r"grad x .* by 0\.006 of its norm"):
        providers.check("mine", problem.case, [y, grad_x * 1.006, *others], expected, RELU)
    with pytest.raises(providers.WrongResultError, match="y differs"):
        providers.check("mine", problem.case, [y * 1.004, grad_x, *others], expected, RELU)
