"""Finding norm -> (+ residual) -> ReLU in the graph of a model, and putting one layer in its place."""

import copy
import operator
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from types import BuiltinFunctionType, FunctionType

import torch
import torch.nn.functional as F
from torch import fx, nn

from .trace import NORMS, has_hooks, in_place, norms

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS = {operator.add, torch.add, "add", "add_"}


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
        if has_hooks(layer):
            raise _NotFusedError("it has hooks, which are to see its own output")
        norm, add = calls[0], None
        user = self._only_user(norm, "its output")
        if self._is_add(user):
            add = user
            self._check_sum(norm, add)
            user = self._only_user(add, "the sum after it")
        if not self._is_relu(user):
            what = "its output" if add is None else "the sum after it"
            raise _NotFusedError(f"{what} goes to {self._describe(user)}, not to a ReLU")
        if user.op == "call_module" and has_hooks(self.modules[user.target]):
            raise _NotFusedError(f"the ReLU {user.target!r} has hooks")
        return _Match(norm, add, user)

    def _only_user(self, node: fx.Node, what: str) -> fx.Node:
        if len(node.users) != 1:
            raise _NotFusedError(f"{what} is used {len(node.users)} times")
        return next(iter(node.users))

    def _is_add(self, node: fx.Node) -> bool:
        if node.target is in_place:
            return node.args[0] == "iadd"
        return node.op != "call_module" and node.target in _ADDS

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.modules[node.target]) is nn.ReLU
        return node.target in _RELUS

    def _describe(self, node: fx.Node) -> str:
        if node.op == "output":
            return "the model's output"
        if node.op == "call_module":
            return f"{type(self.modules[node.target]).__name__} {node.target!r}"
        return node.args[0] if node.target is in_place else getattr(node.target, "__name__", str(node.target))

    def _check_sum(self, norm: fx.Node, add: fx.Node) -> None:
        operands = [*add.args, *(add.kwargs[name] for name in ("input", "other") if name in add.kwargs)]
        if add.target is in_place:
            del operands[0]
        if len(operands) != 2 or add.kwargs.keys() - {"input", "other", "alpha"} or add.kwargs.get("alpha", 1) != 1:
            raise _NotFusedError("the sum after it has more arguments than two tensors")
        residual = operands[operands[0] is norm]
        if residual is norm:
            raise _NotFusedError("it is added to itself")
        if not isinstance(residual, fx.Node):
            raise _NotFusedError(f"it is added to the constant {residual}")
        if residual.op == "get_attr":
            raise _NotFusedError(f"it is added to {residual.target!r}, which is broadcast over the batch")
        overwrites = add.target in (in_place, "add_") and operands[0] is residual
        if overwrites and (len(residual.users) > 1 or not self._is_fresh(residual)):
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
        """True where the call may write into one of its arguments; what is not known as harmless may."""
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
            known = module.split(".")[0] in ("torch", "_operator", "builtins", "math")
            return not known or name.endswith("_")
        return False


def fuse_graph(model: nn.Module, graph: fx.Graph) -> tuple[Fusion, ...]:
    """Leave out of `graph` the sums and the ReLUs that go into the batch normalizations before them.

    A batch normalization that is fused with a sum gets the other summand as its second argument.

    Returns:
        What became of each batch normalization, in the order of `model.named_modules()`.
    """
    matcher = _Matcher(model, graph)
    fusions: dict[str, Fusion] = {}
    matches: dict[fx.Node, _Match] = {}
    for name, layer in norms(model):
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
        if not any(norms(module)):
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
