"""Finding norm -> (+ residual) -> ReLU in a model, with torch.fx, and putting one layer in its place."""

import copy
import inspect
import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from types import BuiltinFunctionType, FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE_ADDS = {operator.iadd, "add_"}


@dataclass(frozen=True)
class Fusion:
    """What became of one batch normalization.

    Attributes:
        norm: its qualified name in the model.
        residual: the sum before the ReLU went into the layer too.
        reason: why its ReLU was not fused; None if it was.
    """

    norm: str
    residual: bool = False
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.norm}: not fused, {self.reason}"
        return f"{self.norm}: fused with {'the sum and ' if self.residual else ''}the ReLU"


def _norms(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in module.named_modules() if type(layer) in NORMS)


class _Tracer(fx.Tracer):
    """Follows the model to its batch normalizations; whatever holds none stays as it is, in a single node."""

    # Computations on buffers belong into the graph; by default their present results would be frozen in it.
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph calls `m` as it is."""
        sequential = type(m).forward is nn.Sequential.forward
        if super().is_leaf_module(m, module_qualified_name) or not (sequential or any(_norms(m))):
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

    def create_arg(self, a):
        """Refuse tensors that the graph would keep in a state of its own."""
        if isinstance(a, Tensor) and not any(a is t for t in chain(self.root.parameters(), self.root.buffers())):
            raise fx.proxy.TraceError("its forward uses a tensor that is neither a parameter nor a buffer")
        if isinstance(a, nn.Module) and any(_norms(a)):
            raise fx.proxy.TraceError("its forward passes a module to a function that torch.fx does not follow")
        return super().create_arg(a)


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _has_hooks(module: nn.Module) -> bool:
    return any(isinstance(value, dict) and value for name, value in vars(module).items() if name.endswith("_hooks"))


def _check_followed(module: nn.Module, name: str) -> None:
    """The graph has what the module's forward does, and nothing else of it."""
    described = f"{name!r} ({type(module).__name__})" if name else "the model"
    if _has_hooks(module):
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
        if name == node.target or name not in defaults:
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


class _NotFusedError(Exception):
    """The reason."""


@dataclass(frozen=True)
class _Match:
    norm: fx.Node
    add: fx.Node | None
    relu: fx.Node


class _Matcher:
    """Finds the ReLU that belongs to a batch normalization in the graph of `model`."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.calls = defaultdict(list)
        for node in graph.find_nodes(op="call_module", sort=True):
            self.calls[self.modules[node.target]].append(node)

    def match(self, layer: nn.Module) -> _Match:
        """The nodes that one call of the fused layer replaces; raises _NotFusedError."""
        calls = self.calls[layer]
        if len(calls) != 1:
            raise _NotFusedError(f"it is called {len(calls)} times" if calls else "torch.fx sees no call of it")
        if _has_hooks(layer):
            raise _NotFusedError("it has hooks, which are to see its own output")
        norm, add = calls[0], None
        user = self._only_user(norm, "its output")
        if user.op != "call_module" and user.target in _ADDS:
            add = user
            self._check_sum(norm, add)
            user = self._only_user(add, "the sum after it")
        if not self._is_relu(user):
            what = "its output" if add is None else "the sum after it"
            raise _NotFusedError(f"{what} goes to {self._describe(user)}, not to a ReLU")
        if user.op == "call_module" and _has_hooks(self.modules[user.target]):
            raise _NotFusedError(f"the ReLU {user.target!r} has hooks")
        return _Match(norm, add, user)

    def _only_user(self, node: fx.Node, what: str) -> fx.Node:
        if len(node.users) != 1:
            raise _NotFusedError(f"{what} is used {len(node.users)} times")
        return next(iter(node.users))

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.modules[node.target]) is nn.ReLU
        return node.target in _RELUS

    def _describe(self, node: fx.Node) -> str:
        if node.op == "output":
            return "the model's output"
        if node.op == "call_module":
            return f"{type(self.modules[node.target]).__name__} {node.target!r}"
        return getattr(node.target, "__name__", str(node.target))

    def _check_sum(self, norm: fx.Node, add: fx.Node) -> None:
        operands = [*add.args, *(add.kwargs[name] for name in ("input", "other") if name in add.kwargs)]
        if len(operands) != 2 or add.kwargs.keys() - {"input", "other", "alpha"} or add.kwargs.get("alpha", 1) != 1:
            raise _NotFusedError("the sum after it has more arguments than two tensors")
        residual = operands[operands[0] is norm]
        if residual is norm:
            raise _NotFusedError("it is added to itself")
        if not isinstance(residual, fx.Node):
            raise _NotFusedError(f"it is added to the constant {residual}")
        if residual.op == "get_attr":
            raise _NotFusedError(f"it is added to {residual.target!r}, which is broadcast over the batch")
        if add.target in _IN_PLACE_ADDS and operands[0] is residual:
            raise _NotFusedError("it is added in place to a tensor that may be read elsewhere")
        # The fused layer runs where the sum was, because it needs the residual: its input must still be the same there.
        between = norm.next
        while between is not add:
            if self._may_change(between, norm.all_input_nodes[0]):
                raise _NotFusedError(f"{self._describe(between)}, before the sum, may change its input in place")
            between = between.next

    def _may_change(self, node: fx.Node, tensor: fx.Node) -> bool:
        if not self._writes(node):
            return False
        return any(n is tensor or not (self._is_fresh(n) and self._is_fresh(tensor)) for n in node.all_input_nodes)

    def _is_fresh(self, node: fx.Node) -> bool:
        """Memory of its own, no view of what another node gave."""
        fresh = (nn.modules.conv._ConvNd, nn.Linear, *NORMS)
        return node.op == "call_module" and isinstance(self.modules[node.target], fresh)

    def _writes(self, node: fx.Node) -> bool:
        """Whether the call may write into one of its arguments; what is not known as harmless may."""
        if node.kwargs.get("inplace") or "out" in node.kwargs:
            return True
        if node.op == "call_module":
            layer = self.modules[node.target]
            return getattr(layer, "inplace", False) or not type(layer).__module__.startswith("torch.nn")
        if node.op == "call_method":
            return node.target.endswith("_") or node.target.startswith("__")
        if node.op == "call_function":
            if not isinstance(node.target, FunctionType | BuiltinFunctionType):
                return True
            name, module = node.target.__name__, node.target.__module__ or "torch"
            if module == "_operator":
                return name == "setitem" or (name[0] == "i" and hasattr(operator, f"__{name[1:]}__"))
            # `inplace` may be given by position.
            return name.endswith("_") or True in node.args or module.split(".")[0] not in ("torch", "builtins", "math")
        return False


def fuse(model: nn.Module, graph: fx.Graph) -> tuple[Fusion, ...]:
    """Leave out of `graph` the sums and the ReLUs that go into the batch normalizations before them.

    A batch normalization that is fused with a sum gets the other summand as its second argument.

    Returns:
        What became of each batch normalization, in the order of `model.named_modules()`.
    """
    matcher = _Matcher(model, graph)
    fusions: dict[str, Fusion] = {}
    matches: dict[fx.Node, _Match] = {}
    for name, layer in _norms(model):
        fusions[name] = Fusion(name)
        try:
            match = matcher.match(layer)
        except _NotFusedError as reason:
            fusions[name] = Fusion(name, reason=str(reason))
            continue
        rival = matches.setdefault(match.relu, match)
        if rival is not match:
            # Two of them are summed. The main branch is what is written first, by convention.
            kept, left = sorted((rival, match), key=lambda m: m.add.all_input_nodes.index(m.norm))
            matches[match.relu] = kept
            fusions[left.norm.target] = Fusion(left.norm.target, reason=f"it is the residual of {kept.norm.target!r}")

    for match in matches.values():
        arguments = [match.norm.all_input_nodes[0]]
        if match.add is not None:
            arguments += [node for node in match.add.all_input_nodes if node is not match.norm]
            fusions[match.norm.target] = Fusion(match.norm.target, residual=True)
        with graph.inserting_before(match.add or match.norm):
            fused = graph.call_module(match.norm.target, tuple(arguments))
        fused.meta = match.norm.meta
        match.relu.replace_all_uses_with(fused)
        for node in (match.relu, match.add, match.norm):
            if node is not None:
                graph.erase_node(node)
    return tuple(fusions.values())


def assemble(model: nn.Module, graph: fx.Graph, layers: dict[nn.Module, nn.Module]) -> fx.GraphModule:
    """The module that runs `graph`, with the names and the state of `model` and with `layers` in place of its norms.

    Modules without a norm are those of `model`. The others, whose forward the graph has taken over, become containers.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    called = {modules[node.target] for node in graph.find_nodes(op="call_module")}
    built = dict(layers)

    def build(module: nn.Module) -> nn.Module:
        if module in built:
            return built[module]
        if not any(_norms(module)):
            built[module] = nn.Identity() if type(module) is nn.ReLU and module not in called else module
        elif module in called:
            # One of torch's own that holds a norm: a copy that shares its tensors.
            tensors = chain(module.parameters(), module.buffers())
            memo = {id(tensor): tensor for tensor in tensors} | {id(norm): layer for norm, layer in layers.items()}
            built[module] = copy.deepcopy(module, memo)
        else:
            built[module] = _container(module)
            for name, child in module._modules.items():
                built[module]._modules[name] = None if child is None else build(child)
        return built[module]

    root = build(model)
    fused = fx.GraphModule(root, graph, type(model).__name__)
    # GraphModule takes over what the graph names; a state_dict has all, in its order.
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        vars(fused)[name] = vars(root)[name]
    return fused


def _container(module: nn.Module) -> nn.Module:
    """The module's own state, and the way to reach its children, but no forward."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        container = nn.ModuleList()
    else:
        container = nn.ModuleDict() if isinstance(module, nn.ModuleDict) else nn.Module()
    container._parameters.update(module._parameters)
    container._buffers.update(module._buffers)
    container._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    container.training = module.training
    return container
