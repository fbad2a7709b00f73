"""torch still does what zest_fast takes for granted of its private parts, and one file of the package uses them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from zest_fast.foundation import torch_private as private

PACKAGE = Path(private.__file__).parents[1]


def leaf(*shape: int) -> Tensor:
    return torch.ones(*shape, requires_grad=True)


def test_a_torch_that_lacks_a_part_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    private.refuse_a_torch_without(private.NEEDED)
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    monkeypatch.delattr(torch, "_neg_view")
    message = rf"torch {re.escape(torch.__version__)} has no torch._C._current_graph_task_id, torch._neg_view, which"
    with pytest.raises(ImportError, match=message):
        private.refuse_a_torch_without(private.NEEDED)


def test_what_is_asked_for_by_name_is_needed() -> None:
    """An attribute of torch._C that the file uses is in the list, but for those that only some torch has."""
    optional = {"_C._storage_Use_Count", "_C._ConvBackend", "_C._select_conv_backend"}
    used = {
        ast.unparse(node).removeprefix("torch.")
        for node in ast.walk(ast.parse(Path(private.__file__).read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._C.")
    }
    assert used - optional - {"_C._autograd", "_C._functorch", "_C._nn"} <= set(private.NEEDED)


def test_current_task_is_known_in_backward_only() -> None:
    seen: list[int] = []
    x = leaf(2)
    x.register_hook(lambda g: seen.append(private.current_task()))
    assert private.current_task() == -1
    for _ in range(2):
        x.sum().backward()
    assert private.current_task() == -1
    assert min(seen) >= 0 and len(set(seen)) == 2


def test_steps_around_are_those_of_base_classes_and_of_optimizers_that_step_others() -> None:
    class Derived(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            return derived.step(closure)

    seen: list[list[torch.optim.Optimizer]] = []
    torch.optim.SGD([leaf(2)], lr=0.1)  # the first of a class lets its step run hooks
    derived, outer = Derived([leaf(2)], lr=0.1), Outer([leaf(2)], lr=0.1)
    derived.register_step_pre_hook(lambda *_: seen.append(private.steps_around()))
    derived.step()
    outer.step()
    assert seen == [[derived], [derived, derived], [derived, outer], [derived, derived, outer]]
    assert private.steps_around() == []


def test_run_first_decides_in_which_order_the_engine_calls_hooks() -> None:
    seen: list[str] = []
    p = leaf(2)
    handles = [p.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name)) for name in "abc"]
    private.run_first(private.post_accumulate_hooks(p), handles[2].id)
    p.sum().backward()
    assert seen == ["c", "a", "b"]


def test_regions_of_checkpointing_have_hooks_of_their_own() -> None:
    seen: list[object] = [private.saved_tensors_hooks()]

    def look(x: Tensor) -> Tensor:
        seen.append(private.saved_tensors_hooks())
        return x.sin()

    checkpoint(look, checkpoint(look, leaf(2), use_reentrant=False), use_reentrant=False)
    assert seen[0] is None and None not in seen[1:] and len(set(seen)) == 3


def test_current_node_is_the_one_that_runs() -> None:
    seen: list[object] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(private.current_node())
            return func(*args, **(kwargs or {}))

    y = leaf(2).sin()
    assert private.current_node() is None
    with Spy():
        y.backward(torch.ones(2))
    assert {node.name() for node in seen if node is not None} >= {"SinBackward0"}


def test_nodes_are_numbered_in_the_order_in_which_they_are_made() -> None:
    x = leaf(2)
    expected = private.next_sequence_number()
    y = x.sin()
    assert private.sequence_number(y.grad_fn) == expected
    assert private.next_sequence_number() == expected + 1


def test_every_pass_from_python_ends_in_run_backward() -> None:
    original = private.run_backward()
    seen: list[tuple[bool, int]] = []

    def spy(*arguments, **options):
        seen.append((options["accumulate_grad"], len(arguments[4]) if len(arguments) > 4 else -1))
        return original(*arguments, **options)

    private.set_run_backward(spy)
    try:
        x = leaf(2)
        x.sum().backward()
        torch.autograd.backward(x.sum())
        torch.autograd.grad(x.sum(), [x])
    finally:
        private.set_run_backward(original)
    assert [accumulates for accumulates, _ in seen] == [True, True, False]
    assert seen[2][1] == 1
    assert private.run_backward() is original


def test_saved_tensors_are_moved_where_hooks_are() -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert private.saved_tensors_are_moved()
    assert not private.saved_tensors_are_moved()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_reentrant_checkpointing_is_seen_with_its_inputs(requires_grad: bool) -> None:
    seen = []

    def block(x: Tensor) -> Tensor:
        seen.append(private.inputs_of_checkpoint())
        return x * 2

    checkpoint(block, torch.ones(2, requires_grad=requires_grad), use_reentrant=True)
    checkpoint(block, leaf(2), use_reentrant=False)
    assert seen[0] is not None and any(seen[0]) == requires_grad
    assert seen[1] is None


def test_transforms_are_seen() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(
            (
                private.transforms_are_active(),
                private.innermost_transform() is not None,
                private.is_transform_wrapper(x),
                private.is_transformed(x),
            )
        )
        return x * 2

    function(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    torch.func.grad(lambda x: function(x).sum())(torch.ones(2))
    assert seen == [(False,) * 4, (True,) * 4, (True,) * 4]


def test_forward_mode_is_seen() -> None:
    assert not private.forward_mode_is_on()
    with forward_ad.dual_level():
        assert private.forward_mode_is_on()
        assert private.is_transformed(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
        assert not private.is_transformed(torch.ones(2))
    assert not private.forward_mode_is_on()


def test_autocast_of_any_device_is_seen() -> None:
    assert not private.is_any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert private.is_any_autocast_enabled()


def test_a_subclass_is_not_asked_without_torch_function() -> None:
    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise RuntimeError("asked")

    x = torch.ones(2).as_subclass(Own)
    with pytest.raises(RuntimeError, match="asked"):
        x.sum()
    with private.without_torch_function():
        assert x.sum().item() == 2


def test_modes_of_others_and_hooks_on_all_modules_alter_a_pass() -> None:
    class OfFunctions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class OfOperators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with torch.device("cpu"), private.FakeTensorMode():
        assert not private.is_altered()
    for mode in (OfFunctions, OfOperators):
        with mode():
            assert private.is_altered()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert private.is_altered()
    handle.remove()
    assert not private.is_altered()


def test_compilation_is_seen() -> None:
    model = nn.Linear(2, 2)
    assert not private.is_compiled_in_place(model)
    model.compile(backend="eager")
    assert private.is_compiled_in_place(model)
    assert private.compiler_is_loaded()


def test_hooks_of_modules_are_seen() -> None:
    model = nn.Linear(2, 2)
    assert not private.forward_hooks(model) and not private.forward_pre_hooks(model)
    first, second = (model.register_forward_hook(lambda *_: None) for _ in range(2))
    assert list(private.forward_hooks(model)) == [first.id, second.id]
    before = model.register_forward_pre_hook(lambda *_: None)
    assert list(private.forward_pre_hooks(model)) == [before.id]
    for register in (model.register_full_backward_hook, model.register_full_backward_pre_hook):
        assert not private.has_backward_hooks(model)
        handle = register(lambda *_: None)
        assert private.has_backward_hooks(model)
        handle.remove()


def test_hooks_of_tensors_are_seen() -> None:
    x = leaf(2)
    assert not private.gradient_hooks(x) and private.post_accumulate_hooks(x) is None
    x.register_hook(lambda g: g)
    assert len(private.gradient_hooks(x) or ()) == 1
    seen = []
    x.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    hooks = private.post_accumulate_hooks(x)
    assert hooks is not None and len(hooks) == 1
    private.set_post_accumulate_hooks(x, None)
    x.sum().backward()
    assert not seen
    private.set_post_accumulate_hooks(x, hooks)
    x.sum().backward()
    assert len(seen) == 1


def test_keys_tell_tensors_and_storages_apart() -> None:
    x, y = torch.ones(4), torch.ones(4)
    assert private.tensor_key(x) != private.tensor_key(y)
    assert private.storage_key(x.untyped_storage()) == private.storage_key(x[1:].untyped_storage())
    assert private.storage_key(x.untyped_storage()) != private.storage_key(y.untyped_storage())
    with private.FakeTensorMode():
        a, b = torch.ones(4), torch.ones(4)
    assert private.storage_key(a.untyped_storage()) != private.storage_key(b.untyped_storage())


def test_a_weak_reference_to_a_storage_ends_with_it() -> None:
    x = torch.ones(4)
    reference = private.StorageWeakRef(x.untyped_storage())
    assert not reference.expired()
    del x
    assert reference.expired()


def test_use_counts_tell_who_else_holds_a_tensor() -> None:
    assert private.use_counts_are_told, "plans count a copy too many of gradients that are added in place"
    x = torch.ones(4)
    alone = private.use_counts(x)
    view = x[1:]
    assert private.use_counts(x)[1] > alone[1]
    del view
    assert private.use_counts(x) == alone


def test_bits_and_wrappers() -> None:
    x = torch.tensor([1.0, -2.0])
    assert private.neg_view(x).data_ptr() == x.data_ptr() and private.neg_view(x).tolist() == [-1, 2]
    assert not private.is_functional(x)
    assert private.is_functional(torch._to_functional_tensor(x))


def test_tensors_are_flattened_by_a_copy() -> None:
    tensors = [torch.tensor(3.0), torch.arange(6.0).view(2, 3).t(), torch.ones(1).expand(2), torch.empty(0)]
    found = private.flattened(tensors)
    assert found.tolist() == [3, 0, 3, 1, 4, 2, 5, 1, 1]
    tensors[0].zero_()
    assert found[0] == 3


def test_views_wrappers_and_jagged_rows() -> None:
    x = torch.ones(4, 2)
    assert private.is_view(x[1:]) and not private.is_view(x)
    jagged = torch.nested.nested_tensor([x, x[1:]], layout=torch.jagged)
    assert private.ragged_dimension(jagged) == 1

    class Wrapper(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    wrapper = private.make_wrapper_subclass(Wrapper, (2, 3), dtype=torch.bfloat16)
    assert type(wrapper) is Wrapper and wrapper.shape == (2, 3)


def test_functions_in_python_are_known_by_their_nodes() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

    assert private.python_function(Own.apply(leaf(2)).grad_fn) is Own
    assert private.python_function(leaf(2).sin().grad_fn) is None


def test_convolutions_say_how_they_run() -> None:
    (mkldnn,) = private.conv_backends("Mkldnn", "none of this name")
    assert private.select_conv_backend is not None
    x, weight = torch.ones(2, 16, 8, 8), torch.ones(16, 16, 3, 3)
    found = private.select_conv_backend(x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, None)
    if torch.backends.mkldnn.is_available():
        assert found == mkldnn


def test_formulas_are_called_with_tensors() -> None:
    seen = []

    def formula(a, b, *, out_val, **_):
        seen.append(type(a))
        return 7

    operator = torch.ops.aten.mm
    with FlopCounterMode(display=False, custom_mapping={operator: private.called_with_tensors(formula)}) as counter:
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    assert counter.get_total_flops() == 7 and seen == [Tensor]


def test_fake_tensors_refuse_to_be_looked_at() -> None:
    with private.FakeTensorMode():
        x = torch.ones(4)
        assert isinstance(x, private.FakeTensor)
        with pytest.raises(private.DataDependentOutputException):
            x.sum().item()
        with pytest.raises(private.DynamicOutputShapeException):
            x.nonzero()


# Nobody else

PUBLIC_BY_USE = {  # attributes and modules that begin with an underscore, and that code outside of torch relies on
    "_modules": "of nn.Module: how every library walks over modules without calling what they override",
    "_parameters": "of nn.Module: the same for parameters",
    "_buffers": "of nn.Module: the same for buffers",
    "_non_persistent_buffers_set": "of nn.Module: which buffers a state_dict leaves out",
    "_version": "of Tensor: explained in torch's notes on autograd",
    "_base": "of Tensor: the same, of views",
    "_apply": "of nn.Module: what modules override to follow .to()",
    "_orig_mod": "of torch.compile: explained in its FAQ",
    "_schema": "of OpOverload: explained in the notes on custom operators",
    "_overloadpacket": "of OpOverload: what torch's own examples of dispatch modes ask",
    "_pytree": "torch.utils._pytree: what torch's own examples of dispatch modes import",
    "_python_dispatch": "torch.utils._python_dispatch: the documented home of TorchDispatchMode",
    "_grouped_mm": "an operator's name",
    "_BatchNorm": "of torch.nn.modules.batchnorm: what is an instance of it is a batch norm of whatever dimension",
    "_NormBase": "the same of all that normalise by batch or instance",
    "_SpectralNorm": "of torch.nn.utils.parametrizations: what a parametrization is recognised by",
    "_is_hf_initialized": "of transformers",
    "_name_or_path": "of transformers: where from_pretrained found a model, which its own save_pretrained reads",
    "_prepare_inputs": "of transformers: what trainers override, those of TRL among them",
    "_keys_to_ignore_on_load_unexpected": "of transformers: what its models declare",
    "_init_weights": "of transformers: what its models override",
    "_loss_function": "of transformers",
    "_hf_hook": "of accelerate",
}


def underscored(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names of torch and of others that begin with one underscore, and where they stand; own attributes left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from ((node.lineno, part) for part in (node.module or "").split("."))
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, part) for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            yield from (
                (node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and type(a.value) is str
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("torch._"):
            yield node.lineno, node.value.removeprefix("torch.")


def defined(tree: ast.AST) -> Iterator[str]:
    """Attributes, functions and classes that a file makes itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_no_other_file_uses_private_parts_of_torch() -> None:
    trees = {p: ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py") if p.name != "torch_private.py"}
    own = {name for tree in trees.values() for name in defined(tree)}
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in underscored(tree)
        if name.startswith("_") and not name.startswith("__") and name not in own and name not in PUBLIC_BY_USE
    ]
    assert not found, "move to foundation/torch_private.py, with the reason and a test: " + ", ".join(sorted(found))


@pytest.mark.parametrize("name", sorted(PUBLIC_BY_USE))
def test_what_stays_is_used(name: str) -> None:
    assert any(name in path.read_text() for path in PACKAGE.rglob("*.py"))


@pytest.fixture
def one_process() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_store_of_the_process_group_takes_messages(one_process: None) -> None:
    store = private.default_store()
    store.set("zest_fast/test", b"1")
    assert private.default_store() is store and store.check(["zest_fast/test"])
    assert store.delete_key("zest_fast/test") and not store.check(["zest_fast/test"])


def test_ddp_tells_that_it_waits_for_gradients_once_it_has_some(one_process: None) -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    assert not private.ddp_is_interrupted(model)
    model(torch.ones(1, 3))
    model.module.weight.sum().backward()
    assert private.ddp_is_interrupted(model)
    private.reset_ddp(model)
    assert not private.ddp_is_interrupted(model)
    model(torch.ones(1, 3)).sum().backward()
    assert not private.ddp_is_interrupted(model)


def test_fsdp_keeps_its_books_as_it_did(one_process: None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(nn.Linear(3, 2).requires_grad_(False), mp_policy=policy)
    (group,) = private.fsdp_groups(model)
    private.start_fsdp(model)
    frozen = private.fsdp_dtypes(group)
    shards = private.fsdp_parameters(group)
    assert {id(p) for p in shards} == {id(p) for p in model.parameters()} and not private.is_gathered(group)
    model.requires_grad_(True)
    private.set_fsdp_dtypes(group, None)
    trained = private.fsdp_dtypes(group)
    assert trained["_reduce_dtype"] == trained.get("_orig_dtype", torch.float32) == torch.float32
    with torch.no_grad():
        model(torch.ones(1, 3))
    assert private.is_gathered(group)
    (weight, bias), shards_of = model.parameters(), private.fsdp_shards(group)
    assert [id(shards_of[id(p)]) for p in (weight, bias)] == [id(p) for p in shards]
    assert [(id(a), id(b)) for a, b in private.fsdp_whole(group)] == list(zip(map(id, shards), shards_of, strict=True))
    assert [id(p) for p in private.fsdp_gathered(group)] == [id(p) for p in model.parameters()]
    assert private.fsdp_divides_by(group) is None and not private.fsdp_takes_unused(group)
    model.set_gradient_divide_factor(3.0)
    assert private.fsdp_divides_by(group) == 3.0
    if hasattr(model, "set_reduce_scatter_unused_params"):  # not in torch 2.8, which cannot be asked for it
        model.set_reduce_scatter_unused_params(True)
        assert private.fsdp_takes_unused(group)
    assert not private.fsdp_accumulates(group)
    model.set_requires_gradient_sync(False)
    assert "set_requires_gradient_sync" in private.fsdp_accumulates(group)
    model(torch.ones(1, 3)).float().sum().backward()
    model.set_requires_gradient_sync(True)
    assert "were not reduced" in private.fsdp_accumulates(group)
    assert [gradient.shape for gradient in private.fsdp_unreduced(group)] == [(2, 3), (2,)]
    private.settle_fsdp(model, [group])
    assert not private.fsdp_accumulates(group) and not private.is_gathered(group)
    assert private.fsdp_unreduced(group) == []
    private.set_fsdp_dtypes(group, frozen)
    assert private.fsdp_dtypes(group) == frozen
