"""The graph of a model's forward, by torch.fx, or the reason why a graph cannot stand for it."""

import inspect
import operator
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, fx, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_IN_PLACE = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)


def norms(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The batch normalizations in `module` that can be converted, by name."""
    return ((name, layer) for name, layer in module.named_modules() if type(layer) in NORMS)


def in_place(operation: str, left, right):
    """`left += right` and its relatives, as a call that a graph can hold."""
    return getattr(operator, operation)(left, right)


class _Proxy(fx.Proxy):
    """Keeps in-place operators, which torch.fx records as if they made a new tensor."""


def _recorded(operation: str):
    return lambda left, right: left.tracer.create_proxy("call_function", in_place, (operation, left, right), {})


for name in _IN_PLACE:
    setattr(_Proxy, f"__{name}__", _recorded(name))


class _Tracer(fx.Tracer):
    """Follows the model to its batch normalizations; whatever holds none stays as it is, in a single node."""

    # Computations on buffers belong into the graph; by default their present results would be frozen in it.
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True where the graph calls `m` as it is."""
        sequential = type(m).forward is nn.Sequential.forward
        if super().is_leaf_module(m, module_qualified_name) or not (sequential or any(norms(m))):
            return True
        _check_followed(m, module_qualified_name)
        return False

    def trace(self, root, concrete_args=None) -> fx.Graph:
        """Trace as torch.fx does, and note the modes that the whole graph runs in."""
        self.modes = _modes()
        return super().trace(root, concrete_args)

    def create_node(self, *arguments, **options) -> fx.Node:
        """Refuse calls in another mode: a graph has no context managers."""
        if _modes() != self.modes:
            raise fx.proxy.TraceError("its forward switches gradients or autocast on or off")
        return super().create_node(*arguments, **options)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a):
        """Refuse tensors that the graph would keep in a state of its own."""
        if isinstance(a, Tensor) and not any(a is t for t in chain(self.root.parameters(), self.root.buffers())):
            raise fx.proxy.TraceError("its forward uses a tensor that is neither a parameter nor a buffer")
        if isinstance(a, nn.Module) and any(norms(a)):
            raise fx.proxy.TraceError("its forward passes a module to a function that torch.fx does not follow")
        return super().create_arg(a)


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def has_hooks(module: nn.Module) -> bool:
    """True where hooks of any kind are registered on `module` itself."""
    return any(isinstance(value, dict) and value for name, value in vars(module).items() if name.endswith("_hooks"))


def _check_followed(module: nn.Module, name: str) -> None:
    """The graph has what the module's forward does, and nothing else of it."""
    described = f"{name!r} ({type(module).__name__})" if name else "the model"
    if has_hooks(module):
        raise fx.proxy.TraceError(f"{described} has hooks, which would be lost")
    if "forward" in vars(module):
        raise fx.proxy.TraceError(f"{described} has a forward of its own, not its class's")
    if type(module).train is not nn.Module.train:
        raise fx.proxy.TraceError(f"{described} overrides train(), which would be lost")


def trace(model: nn.Module) -> fx.Graph:
    """The graph of the model's forward, in training and in evaluation alike; the model stays as it is.

    Arguments of forward whose default is None, a number or a string are fixed at it; the graph asserts that.

    Raises:
        ValueError: the model cannot be traced, or the graph would not do what the model does.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is None or type(parameter.default) in (bool, int, float, str)
    }
    before = [(module, module.training, dict(vars(module))) for module in model.modules()]
    try:
        _check_followed(model, "")
        graphs = []
        for training in (True, False):
            for module, _, _ in before:
                module.training = training
            graphs.append(_Tracer().trace(model, defaults))
        _check_same(*graphs)
    except Exception as error:
        _refuse(model, str(error), error)
    finally:
        changed = set()
        for module, training, attributes in before:
            module.training = training
            now = vars(module)
            changed |= {name for name in now.keys() | attributes.keys() if now.get(name) is not attributes.get(name)}
            now.clear()
            now.update(attributes)
    if changed:
        _refuse(model, f"its forward sets attributes, which a graph does not: {', '.join(sorted(changed))}")
    _fix_arguments(graphs[0], defaults)
    return graphs[0]


def _refuse(model: nn.Module, reason: str, cause: Exception | None = None) -> None:
    raise ValueError(
        f"{type(model).__name__} cannot be fused: {reason} (fuse=False converts it without fusing)"
    ) from cause


def _fix_arguments(graph: fx.Graph, defaults: dict) -> None:
    """Give the arguments with a default their names back, and assert the default in a way that survives pickling."""
    placeholders = graph.find_nodes(op="placeholder")
    for node in placeholders:
        # The suffix is from tracing, and so are the present users, an assertion.
        name = node.target.removesuffix("_1")
        if name not in defaults:
            continue
        node.target = name
        for user in list(node.users):
            for assertion in [*user.users, user]:
                graph.erase_node(assertion)
        with graph.inserting_after(placeholders[-1]):
            same = graph.call_function(operator.eq, (node, defaults[name]))
        with graph.inserting_after(same):
            graph.call_function(torch._assert, (same, f"{name} is {defaults[name]!r} in the fused model, no other"))


def _check_same(training: fx.Graph, evaluation: fx.Graph) -> None:
    """A graph is one sequence of calls, so forward must not choose another one in evaluation."""
    for ours, theirs in zip(training.nodes, evaluation.nodes, strict=False):
        if any(str(getattr(ours, what)) != str(getattr(theirs, what)) for what in ("op", "target", "args", "kwargs")):
            # The innermost module that both calls are in made the difference.
            stacks = (node.meta.get("nn_module_stack", {}).values() for node in (ours, theirs))
            common = [module for module, other in zip(*stacks, strict=False) if module == other]
            name = f"of {common[-1][0]!r} ({common[-1][1].__name__}) " if common else ""
            raise fx.proxy.TraceError(f"its forward {name}depends on `training`")
