"""What rules are told about the parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch.nn import Embedding, Module, Parameter

from lomo_ds.rules.param_spec import ParamSpec, Role, role_of
from lomo_ds.zero3._internals import full_shape, shard_spec


def param_roles(model: Module, params: Iterable[Parameter]) -> dict[Parameter, Role]:
    """The role of each parameter.

    Args:
        model: that has them; its output embedding, where it names one, is the head.
        params: cut by ZeRO-3 or not yet cut.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(output, "weight", None)
    tables = {module.weight for module in model.modules() if isinstance(module, Embedding)}
    return {
        param: role_of(full_shape(param), is_embedding=param in tables, is_head=param is head)
        for param in params
    }


def param_specs(model: Module, params: Iterable[Parameter]) -> dict[Parameter, ParamSpec]:
    """Name, role and shard of each parameter.

    Args:
        model: that has them.
        params: cut by ZeRO-3.
    """
    names = {param: name for name, param in reversed(list(model.named_parameters(remove_duplicate=False)))}
    return {
        param: ParamSpec(**vars(shard_spec(param)), name=names.get(param, ""), role=role)
        for param, role in param_roles(model, params).items()
    }
