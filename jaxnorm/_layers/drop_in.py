"""Flax's own five layers: how their fields follow the specs. linen and nnx have the same fields."""

from __future__ import annotations

from typing import Any

from .._core.channels import canonicalize_group_count
from .._core.messages import shown, to_python
from .._norms.batch import BatchNorm
from .._norms.group import GroupNorm
from .._norms.instance import InstanceNorm
from .._norms.layer import LayerNorm
from .._norms.rms import RMSNorm
from . import flax_rules
from .derive import Form


def check_groups(num_groups: int | None, group_size: int | None) -> None:
    """Flax's default of 32 groups stands in the way of a group size that is given alone."""
    if num_groups is not None and group_size is not None:
        raise ValueError(
            "GroupNorm: give one of num_groups, which is 32 by default, and group_size; got "
            f"num_groups={shown(num_groups)} and group_size={shown(group_size)}. "
            f"Write num_groups=None, group_size={shown(group_size)}, or num_groups={shown(num_groups)} alone."
        )


def _check_group_norm(layer, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    if hasattr(layer, "num_features"):  # nnx has made the number and the size of groups of one of them
        flax_rules.check_width(layer, "num_features", (layer.num_features,), shape, axes)
    else:
        check_groups(layer.num_groups, layer.group_size)


def _settle_groups(options: dict[str, Any]) -> None:
    """Of a number and a size of groups that agree, the number says it all."""
    if options["num_groups"] is not None:
        options["group_size"] = None


def _build_group_norm(given: dict[str, Any]) -> None:
    """nnx's layer holds both the number of groups and their size."""
    check_groups(given["num_groups"], given["group_size"])
    features = to_python(given["num_features"])
    if not isinstance(features, int):
        raise ValueError(
            f"GroupNorm: num_features must be an int, got {shown(features)}. "
            "Write GroupNorm(64, num_groups=32, rngs=nnx.Rngs(0))."
        )
    groups = canonicalize_group_count("GroupNorm", features, given["num_groups"], given["group_size"])
    given.update(num_features=features, num_groups=groups, group_size=features // groups)


def _check_instance_norm(layer, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    if 0 in axes:
        raise ValueError(
            f"InstanceNorm: the feature axes {axes} include the batch axis 0; every example is normalized on its own. "
            "Write feature_axes=-1."
        )


LAYER_NORM = Form(LayerNorm, {"axis": "reduction_axes"}, features="feature_axes")
RMS_NORM = Form(RMSNorm, {"axis": "reduction_axes"}, features="feature_axes")
GROUP_NORM = Form(GroupNorm, rank=2, check=_check_group_norm, build=_build_group_norm, settle=_settle_groups)
INSTANCE_NORM = Form(
    InstanceNorm, {"axis": "feature_axes"}, aliases={"feature_axes": "axis"}, check=_check_instance_norm
)
BATCH_NORM = Form(BatchNorm)
