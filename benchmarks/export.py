"""Export the deterministic policy of a run, from its policy.pt or checkpoint.pt, to ONNX.

    python benchmarks/export.py runs/<run>/policy.pt

This writes runs/<run>/policy.onnx, one file that needs neither torch nor this repository. Its input `observation`,
float32 [batch, O], takes raw observations (Dict observations are flattened in the sorted order of their keys). Its
output `action` is in the environment's units: float32 [batch, A] within its bounds, int64 [batch] for Discrete actions,
[batch, A] for MultiDiscrete ones. For these two the output `scores`, float32 [batch, number of actions], holds each
action's value and, if the data were a table with masks, the input `mask`, bool [batch, number of actions], is True
where an action is allowed. Observations are normalised and actions scaled inside the file. The file is kept only if
onnxruntime computes the same actions from it as torch. Its metadata hold JSON texts: `action_low` and `action_high`
and, if the data were a table, `encoding`, the names, categories and offsets of its columns (see docs/data.md).

A policy of your own copy of a script, with another network, needs --script path/to/copy.py. Its load_policy must return
a policy whose attribute `network` has the buffers and the method `actions` of the original network.

Needs requirements-extra.txt. Exit status: 0 written, 1 cannot be done, 2 a bad command line. An error is one line on
stderr and leaves an older file as it was.
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import DataError, Parser, fail, one_line_errors, open_policy
from torch import Tensor, nn

TOLERANCE = 1e-5  # largest accepted difference from torch, as a share of the action range


class Policy(nn.Module):
    """The outputs of the file for [B, O] and a mask if it takes one: actions, [B, A] or [B] if
    Discrete, and for a network that has `scores` each action's value too."""

    def __init__(self, actor: nn.Module):
        super().__init__()
        self.actor = actor

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self.actor, name)(*inputs) for name in outputs_of(self.actor).values())


def outputs_of(actor: nn.Module) -> dict[str, str]:
    """The outputs of the file, and the network's methods that compute them."""
    return {"action": "actions"} | ({"scores": "scores"} if hasattr(actor, "scores") else {})


def find_network(policy: Callable) -> nn.Module:
    """The torch module of a policy of load_policy. Raises DataError."""
    network = getattr(policy, "network", None)
    if hasattr(network, "frame_stack"):
        raise DataError("the policy takes stacks of frames, and this program writes policies that take vectors")
    needed = ("actions", "observation_mean", "observation_std", "action_low", "action_high")
    if missing := [name for name in needed if not hasattr(network, name)]:
        kind = f"{type(network).__name__}, which lacks {', '.join(missing)}" if network else "missing"
        raise DataError(f"load_policy must return a policy with an attribute network, which is {kind}")
    return network


def example(actor: nn.Module, observations: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The inputs of the file by name: observations [B, O] and, if the data had masks, random ones [B, A]."""
    inputs = {"observation": observations.astype(np.float32)}
    if "masks" in (getattr(actor, "encoding", None) or {}):
        masks = rng.random((len(observations), len(actor.encoding["masks"]))) < 0.5
        masks[~masks.any(axis=1), 0] = True
        inputs["mask"] = masks
    return inputs


def to_onnx(actor: nn.Module) -> bytes:
    """The content of an ONNX file that holds the weights and takes a batch of any size."""
    # A batch of two, since one would be taken for a constant.
    inputs = example(actor, np.zeros((2, len(actor.observation_mean))), np.random.default_rng(0))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # else it says that torchvision is not installed
    with warnings.catch_warnings(action="ignore"):  # torch 2.13 warns about its own code
        program = torch.onnx.export(
            Policy(actor).eval(),
            tuple(map(torch.as_tensor, inputs.values())),
            input_names=[*inputs],
            output_names=[*outputs_of(actor)],
            dynamic_shapes=(({0: "batch"},) * len(inputs),),
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        part.ClearField("metadata_props")  # stack traces, with the folders of this machine
    described = {"encoding": getattr(actor, "encoding", None)}
    described |= {name: getattr(actor, name).tolist() for name in ("action_low", "action_high")}
    for name, value in described.items():
        if value is not None:
            model.metadata_props.add(key=name, value=json.dumps(value))
    return model.SerializeToString()


def largest_difference(model: bytes, actor: nn.Module) -> float:
    """The largest difference between onnxruntime and torch over random observations, as a share of the action range;
    NaN if any action is NaN."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    mean, std, low, high = (
        getattr(actor, name).numpy() for name in ("observation_mean", "observation_std", "action_low", "action_high")
    )
    rng, differences = np.random.default_rng(0), []
    # At 1e8 standard deviations actions lie at the bounds. At far fewer some lie between them and have few exact
    # digits: they come from large sums, which the two round differently.
    for batch_size, scale in ((1, 1), (1000, 1), (1000, 1e8)):
        inputs = example(actor, mean + std * scale * rng.standard_normal((batch_size, mean.size)), rng)
        (actions,) = session.run(["action"], inputs)
        differences.append(np.abs(actions - actor.act(*inputs.values())) / np.where(high > low, high - low, 1))
    return float(np.concatenate(differences).max())


def export(args: argparse.Namespace) -> None:
    """Raises DataError of any script, and OSError."""
    actor = find_network(open_policy(args.policy, args.script)[1])
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            fail(1, f"the package {error.name or name} is missing: pip install -r requirements-extra.txt")
    model = to_onnx(actor)
    difference = largest_difference(model, actor)
    if not difference <= TOLERANCE:  # also where it is NaN
        fail(1, f"onnxruntime and torch differ by {difference:.1e} of the action range: {args.output} is not written")
    temporary = args.output.with_name(args.output.name + ".tmp")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(model)
        os.replace(temporary, args.output)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    inputs = example(actor, np.zeros((1, len(actor.observation_mean))), np.random.default_rng(0))
    with torch.no_grad():
        outputs = dict(zip(outputs_of(actor), Policy(actor)(*map(torch.as_tensor, inputs.values()))))
    shapes = [{name: ["batch", *x.shape[1:]] for name, x in part.items()} for part in (inputs, outputs)]
    sizes = " -> ".join(", ".join(f"{name} {shape}" for name, shape in part.items()) for part in shapes)
    sizes = sizes.replace("'", "")
    print(f"{args.output}: {sizes}, differs from torch by at most {difference:.1e} of the action range")


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("policy", type=Path, metavar="POLICY", help="policy.pt or checkpoint.pt of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: POLICY with .onnx)")
    parser.add_script()
    args = parser.parse_args(argv)
    if not args.policy.name or args.output and not args.output.name:
        parser.error("POLICY and --output must be names of files")
    args.output = args.output or args.policy.with_suffix(".onnx")
    if args.output.resolve() == args.policy.resolve():
        parser.error(f"--output {args.output} is the policy itself")
    if args.output.exists() and not args.output.is_file():  # a device would become a file
        parser.error(f"--output {args.output} is not a regular file")
    try:
        with one_line_errors("interrupted: nothing was written"):
            export(args)
    except OSError as error:
        fail(1, f"--output {args.output} cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
