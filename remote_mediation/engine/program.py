"""The nnsight program that measures a job's potential outcomes, the same source on this machine and on an NDIF server.

One `session` runs a whole job. A *stack* is the prompts of one length, of as many pairs as go together; their *base
run* keeps the keys and values, and the residual stream and the mediators from the first differing token on. A *batch*
then measures many rows (a base prompt of a stack with some mediators overwritten) in one forward pass that does only
the work a row can change:

- tokens before the batch's first written position come from the base run's keys and values, which a layer's rows
  hold only while that layer runs;
- layers below the first written one are skipped, the base run's residual stream is handed over instead;
- a row joins the batch at the layer of its own first write, so the batch grows on its way up (`climb`);
- a mediator can be as it is computed in another row of the batch, so that no run has to bring it back;
- only the answer positions reach the unembedding.

Sequences are packed: prompt, then the teacher-forced tokens of both responses, which see the prompt and themselves but
not each other. Smaller tasks serve what rows cannot: `read` activations and the `routing` to experts, `screen` units by
gradients, `learn` a basis by them, give the norms of their `columns` of weights, `generate` and measure the `drift` of
an answer while units are held, and `sample` what a model says behind overwritten mediators.

Everything here is plain functions over tensors, tuples, dicts and strings, because nnsight ships this
source to the server, where `remote_mediation` is not installed. What the payload holds is written in `plan.py`.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import nnsight
import torch
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, GenerationConfig


def execute(model: Any, payload: dict[str, Any], backend: Any = None) -> list[torch.Tensor]:
    """Run a job in one nnsight session and return its tensors, `opened` by who asked for them.

    A job of contexts gives one tensor `[key, value]` (float32) per context; `measure` has a key for each unpatched
    prompt and then for each row, `sample` one for each row, the other tasks one. A `probe` job gives an empty tensor of
    the model's type. A backend that only hands the job over leaves the list empty.
    """
    values: list[torch.Tensor] = []
    with model.session(backend=backend):
        values = nnsight.save(perform(model, payload))
    return values


def perform(model: Any, payload: dict[str, Any]) -> list[torch.Tensor]:
    """The job's values, then what made them (`weights_sum`, `witness`), then the `checksum` of all that."""
    blocks = payload["blocks"] if payload["task"] == "probe" else payload["model"]["blocks"]
    # Whatever the caller has switched on, products are made in the model's own precision.
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        values = tasked(model, payload)
        made = [*values, weights_sum(model, module_at(model, blocks)), witness(model, payload.get("id", ""))]
        return [*made, checksum(made)]


def tasked(model: Any, payload: dict[str, Any]) -> list[torch.Tensor]:
    """The job's task, context by context, so that one context's activations are held at a time."""
    if payload["task"] == "probe":
        return [probe(model, payload["blocks"])]
    tasks = {
        "measure": measure,
        "direct": direct,
        "read": read,
        "routing": routing,
        "columns": columns,
        "screen": screen,
        "learn": learn,
        "generate": generate,
        "drift": drift,
        "sample": sample,
    }
    task = tasks[payload["task"]]
    return [task(model, payload["model"], context).cpu() for context in payload["contexts"]]


def checksum(values: list[torch.Tensor]) -> torch.Tensor:
    """`[tensor]` int64: the bits of a tensor's numbers, each times the cube of an odd number of its own, and its shape.

    No number can change, and no two can change places, without a change of it. By odd numbers themselves, rows a, b, b,
    a would have the same as b, a, a, b, and such rows there are: a swap may give all that the other prompt gives.
    """
    sums = [bits_sum(value, 3) + shape_sum(value) for value in values]
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.int64)


def fingerprint(numbers: torch.Tensor) -> torch.Tensor:
    """`[1]` int64: the same of weights by odd numbers themselves, as run folders hold it."""
    return (bits_sum(numbers, 1) + shape_sum(numbers)).reshape(1)


def bits_sum(value: torch.Tensor, power: int) -> torch.Tensor:
    """The part of a checksum that numbers make, a stretch at a time: each needs six times its memory meanwhile.

    power: of the odd numbers.
    """
    whole = value if value.dtype == torch.int64 else value.float()
    total, at = torch.zeros((), dtype=torch.int64), 0
    for bits in torch.split(whole.contiguous().view(torch.int32).flatten(), 2**18):
        weights = 2 * torch.arange(at, at + len(bits)) + 1
        total += (bits.long() * weights**power).sum() * 0x1E3779B97F4A7C15
        at += len(bits)
    return total


def shape_sum(value: torch.Tensor) -> int:
    """The part of a checksum that the shape makes."""
    return sum(size * 7919 ** (axis + 1) for axis, size in enumerate(value.shape))


def weights_sum(model: Any, blocks: Any) -> torch.Tensor:
    """`[1]` int64: fingerprint of some of the weights (`first_numbers`).

    0 where a server does not show its weights, or they are only fetched while their layer runs.
    """
    if sandboxed(model) or any(parameter.is_meta for parameter in some_parameters(model, blocks)):
        return torch.zeros(1, dtype=torch.int64)
    return fingerprint(first_numbers(model, blocks))


def some_parameters(model: Any, blocks: Any) -> list[torch.Tensor]:
    """The unembedding, and the parameters of three blocks."""
    parameters = [model.lm_head.weight]
    for layer in sorted({0, len(blocks) // 2, len(blocks) - 1}):
        parameters += list(blocks[layer]._module.parameters())
    return parameters


def first_numbers(model: Any, blocks: Any) -> torch.Tensor:
    """The first numbers of each of these parameters, in float32."""
    return torch.cat(
        [parameter.detach().reshape(-1)[:64].float().cpu() for parameter in some_parameters(model, blocks)]
    )


def witness(model: Any, job: str) -> torch.Tensor:
    """What ran a job, as the bytes of lines of a name and a value."""
    facts = {
        "job": job,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "nnsight": metadata.version("nnsight"),
        "revision": getattr(model.config, "_commit_hash", None) or "",
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "device": "" if sandboxed(model) else model.lm_head.weight.device.type,
    }
    text = "\n".join(f"{name} {value}" for name, value in facts.items())
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def opened(found: list[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, str]]:
    """What `perform` returned: the values, and what made them by name.

    Raises:
        ValueError: it is not what was returned.
    """
    *made, sums = found or [torch.empty(0)]
    if sums.dtype != torch.int64 or not torch.equal(checksum(made), sums):
        raise ValueError("values that are not those that were made there: their checksum is another one")
    try:
        *values, weights, text = made
        lines = bytes(text.tolist()).decode().splitlines()
        named = {name: value for name, _, value in (line.partition(" ") for line in lines)}
        return values, {"job": named.pop("job"), **named, "weights": hexadecimal(int(weights))}
    except (ValueError, TypeError, RuntimeError, KeyError, OverflowError) as error:
        raise ValueError("values and nothing of what made them") from error


def hexadecimal(total: int) -> str:
    """A checksum as it is written; nothing for 0."""
    return f"{total % 2**64:016x}" if total else ""


def probe(model: Any, blocks: str) -> torch.Tensor:
    """An empty tensor of the type in which the residual stream is held."""
    with model.trace(input_ids=torch.tensor([[0]])):
        kind = module_at(model, blocks)[0].input.dtype
    return torch.empty(0, dtype=kind)


def measure(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """The base runs of all prompts of a context, stack by stack, then all its batches."""
    bases = [base_run(model, spec, stack, context["capture"]) for stack in context["stacks"]]
    values = [base["values"] for base in bases]
    for batch in context["batches"]:
        values.append(batch_run(model, spec, context["stacks"][batch["stack"]], batch, bases))
    return torch.cat(values)


def base_run(model: Any, spec: dict[str, Any], stack: dict[str, Any], components: tuple[str, ...]) -> dict[str, Any]:
    """The unpatched prompts of a stack: answer values `[prompt, read]`; stream and mediators from token `first` on."""
    spec = laid_out(spec, stack)
    arguments = {"input_ids": unfold(spec, torch.tensor(stack["ids"])), **forward_arguments(spec, stack, 0)}
    past = None if "paths" in spec else DynamicCache()
    with model.trace(past_key_values=past, **arguments):
        captured = capture(model, spec, stack, components)
        values = answer_values(model, spec, stack, range(len(stack["ids"])))
        cache = model.output.past_key_values
    if past is None:
        return {"values": values, "captured": captured, "keyvalues": []}
    if not cache.layers:  # a sandboxed server hands a block whose input is read a copy of the cache
        if spec["sliding"] and max(stack["positions"]) >= spec["window"]:
            raise RuntimeError("a sandboxed server cannot run prompts longer than the model's sliding window")
        with model.trace(past_key_values=DynamicCache(), **arguments):
            cache = model.output.past_key_values
    keyvalues = [(layer.keys, layer.values) for layer in cache.layers]
    return {"values": values, "captured": captured, "keyvalues": keyvalues}


def batch_run(
    model: Any, spec: dict[str, Any], stack: dict[str, Any], batch: dict[str, Any], bases: list[dict[str, Any]]
) -> torch.Tensor:
    """Answer values `[row, read]` of the rows of one batch, in the order in which they join."""
    spec = laid_out(spec, stack)
    arguments, keyvalues = forward_arguments(spec, stack, batch["start"]), bases[batch["stack"]]["keyvalues"]
    past = None if "paths" in spec else prefix_cache(keyvalues, batch["start"])
    joined = sum(batch["joining"], ())
    rows = placed(joined, bases[batch["stack"]]["captured"]["stream"][0].device)
    if past is not None and sandboxed(model):  # it copies the cache where the run begins
        for layer in range(batch["low"], spec["layers"]):
            show_prefix(past, layer, keyvalues, rows[: joined_at(batch, layer)], batch["start"])
    ids = unfold(spec, torch.tensor([stack["ids"][0][batch["start"] :]]))
    with model.trace(input_ids=ids, past_key_values=past, **arguments):
        climb(model, spec, stack, batch, bases, past, rows)
        values = answer_values(model, spec, stack, joined)
    return values


def joined_at(batch: dict[str, Any], layer: int) -> int:
    """How many rows have joined up to a layer."""
    return sum(len(joining) for joining in batch["joining"][: layer + 1 - batch["low"]])


def placed(numbers: Any, device: torch.device) -> torch.Tensor:
    """Numbers where they are used; with indices from the host torch would wait for all that runs on a GPU."""
    return torch.as_tensor(numbers).to(device, non_blocking=device.type == "cuda")


def forward_arguments(spec: dict[str, Any], stack: dict[str, Any], start: int) -> dict[str, Any]:
    """Arguments of a forward pass over the packed tokens from `start` on: mask, positions and the answer positions."""
    if "paths" in spec:
        places, first = len(spec["paths"][0]), stack["answers"][0]
        positions, read = torch.arange(places)[None], torch.arange(first, places)
        return {"position_ids": positions, "logits_to_keep": read, "use_cache": False}
    return {
        "attention_mask": additive_mask(stack, start, None, spec["dtype"]),
        "position_ids": torch.tensor([stack["positions"][start:]]),
        "logits_to_keep": torch.tensor(stack["answers"]) - start,
        "use_cache": True,
    }


def laid_out(spec: dict[str, Any], stack: dict[str, Any]) -> dict[str, Any]:
    """The model's entry, and how a stack's packed sequences are taken apart where the model needs that."""
    return {**spec, "paths": stack["paths"], "folds": stack["folds"]} if "paths" in stack else spec


def unfold(spec: dict[str, Any], packed: torch.Tensor) -> torch.Tensor:
    """`[(row, sequence), token, ...]` of packed rows `[row, token, ...]`, where they are taken apart."""
    return packed[:, torch.tensor(spec["paths"])].flatten(0, 1) if "paths" in spec else packed


def fold(spec: dict[str, Any], tensor: torch.Tensor, first: int = 0) -> torch.Tensor:
    """`[row, token, ...]` packed again of `[(row, sequence), token, ...]`, both from token `first` on.

    Sequences of a row are alike where they have a token in common; the first one's is taken.
    """
    if "paths" not in spec:
        return tensor
    sequence, place = (torch.tensor(one[first:]) for one in spec["folds"])
    rows = tensor.reshape(-1, len(spec["paths"]), *tensor.shape[1:])
    return rows[:, sequence, place - first]


def additive_mask(stack: dict[str, Any], start: int, window: int | None, dtype: str) -> torch.Tensor:
    """`[1, 1, token, key]`: 0 where a packed token sees another, the dtype's minimum where it does not."""
    position = torch.tensor(stack["positions"])
    distance = position[start:, None] - position[None, :]
    seen = visible(stack)[start:]
    if window is not None:
        seen = seen & (distance < window)
    kind = getattr(torch, dtype)
    return torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)[None, None]


def visible(stack: dict[str, Any]) -> torch.Tensor:
    """`[token, key]`: prompt tokens see those before them; answer tokens the prompt and what they go on from."""
    position = torch.tensor(stack["positions"])
    before = position[:, None] >= position[None, :]
    if "parents" not in stack:
        segment = torch.tensor(stack["segments"])
        return before & ((segment[None, :] == segment[:, None]) | (segment[None, :] == 0))
    length = len(position) - len(stack["parents"])
    seen = before & (torch.arange(len(position)) < length)
    for node, parent in enumerate(stack["parents"], length):
        seen[node] = seen[parent]
        seen[node, node] = True
    return seen


def capture(model: Any, spec: dict[str, Any], stack: dict[str, Any], components: tuple[str, ...]) -> dict[str, Any]:
    """What rows may need of a stack's base run: by component a list over layers of `[prompt, token, width]`."""
    found: dict[str, Any] = {name: [] for name in ("stream", *components)}
    for layer in range(spec["layers"]):
        block = module_at(model, spec["blocks"])[layer]
        bound_window(spec, stack, 0, block, layer)
        stream = fold(spec, block.input)
        found["stream"].append(stream[:, stack["first"] :].clone())  # a view would hold the whole prompt
        for name in components:
            found[name].append(kept(spec, block, name, layer, stack["first"]))
    return found


def kept(spec: dict[str, Any], block: Any, name: str, layer: int, first: int) -> Any:
    """A component of a layer from token `first` on; of experts what they are given, None where it has none."""
    if layer in spec["lacking"][name]:
        return None
    if name == "expert_output":
        hidden, routing = expert_inputs(spec, block)
        return hidden[:, first:].clone(), routing[:, first:].clone()
    return tensor_of(spec, block, name)[:, first:].clone()


def climb(
    model: Any,
    spec: dict[str, Any],
    stack: dict[str, Any],
    batch: dict[str, Any],
    bases: list[dict[str, Any]],
    past: DynamicCache | None,
    rows: torch.Tensor,
) -> None:
    """Lead the batch's base prompts `[row]` through the layers: skip those below the first write, join, write."""
    blocks, base, low = module_at(model, spec["blocks"]), bases[batch["stack"]], batch["low"]
    stream, offset, before = base["captured"]["stream"], batch["start"] - stack["first"], joined_at(batch, low)
    entering = unfold(spec, stream[low][rows[:before].to(stream[low].device), offset:])
    skip_layers(spec, blocks, low, entering)
    if past is not None:
        show_prefix(past, low, base["keyvalues"], rows[:before], batch["start"])
    for layer in range(low, spec["layers"]):
        after = joined_at(batch, layer)
        bound_window(spec, stack, batch["start"], blocks[layer], layer)
        below = blocks[layer].input
        if layer == low:
            blocks[layer].input = entering
        elif after > before:
            joining = rows[before:after].to(stream[layer].device)
            blocks[layer].input = torch.cat([below, unfold(spec, stream[layer][joining, offset:])])
        before = after
        if past is not None and layer > low:
            past.layers[layer - 1].keys = past.layers[layer - 1].values = None  # this layer is done
        if past is not None and layer + 1 < spec["layers"]:
            joined = joined_at(batch, layer + 1)
            show_prefix(past, layer + 1, base["keyvalues"], rows[:joined], batch["start"])
        for name, writes in batch["writes"].get(layer, ()):
            if name == "expert_output":
                sources = [one["captured"].get(name, {layer: None})[layer] for one in bases]
                write_experts(model, spec, blocks[layer], writes, sources)
            else:
                write(spec, blocks[layer], name, layer, writes, bases)


def write(
    spec: dict[str, Any], block: Any, name: str, layer: int, writes: tuple[Any, ...], bases: list[dict[str, Any]]
) -> None:
    """Overwrite a component of one layer, row by row; places and columns are ranges where contiguous."""
    target, factor = module_tensor(spec, block, name), spec["factors"].get(name, 1.0)
    for row, places, columns, kind, value in writes:
        where = grid(places, columns, target.device)
        if kind in ("source", "projected"):
            stack, prompt, source_places, *subspace = value
            source = bases[stack]["captured"][name][layer][prompt]
            new = source[grid(source_places, columns, source.device)] / factor
            new = projected(target[row][where], new, *subspace) if subspace else new
        elif kind == "reached":  # of another row of the batch
            new = target[value][where]
        elif kind == "scale":
            new = target[row][where] * value
        else:  # numbers, or a tensor that a gradient is asked for
            new = torch.as_tensor(value) / factor
        target[row][where] = new.to(target.device, target.dtype)
    replace_tensor(spec, block, name, target)


def projected(own: torch.Tensor, other: torch.Tensor, read: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """`own` plus what a basis reads of the change to `other`, written along a basis: `[..., width]` in float32."""
    change = other.to(own.device).float() - own.float()
    return own.float() + change @ placed(read, own.device).T @ placed(along, own.device)


def grid(places: Any, columns: Any, device: torch.device) -> tuple[Any, Any]:
    """Index of `places` by `columns` in a `[token, width]` tensor on a device; no columns means all of them."""
    rows = slice(places.start, places.stop) if isinstance(places, range) else placed(places, device)
    if not columns:
        return rows, slice(None)
    if isinstance(columns, range):
        return rows, slice(columns.start, columns.stop)
    return (rows if isinstance(rows, slice) else rows[:, None]), placed(columns, device)


def tensor_of(spec: dict[str, Any], block: Any, name: str) -> torch.Tensor:
    """A component's tensor `[row, token, width]`; a contribution as it is added to the stream."""
    tensor, factor = module_tensor(spec, block, name), spec["factors"].get(name, 1.0)
    return tensor if factor == 1.0 else tensor * factor


def module_tensor(spec: dict[str, Any], block: Any, name: str) -> torch.Tensor:
    """The live tensor `[row, token, width]` of a component's module: a contribution before the family's multiplier."""
    if name == "router":
        return routing_of(spec, block)
    path, side, index = hook_of(spec, block, name)
    module = module_at(block, path)
    value: Any = module.input if side == "input" else module.output
    tensor: torch.Tensor = value if index is None or alone(value) else value[index]
    if name in spec["columns"]:
        tensor = columns_within(spec, name, tensor).flatten(-2)
    return fold(spec, tensor)


def columns_within(spec: dict[str, Any], name: str, whole: torch.Tensor) -> torch.Tensor:
    """What a component has of a tensor that holds others too: `[..., group, column]`, a view."""
    groups, stride, first, width = spec["columns"][name]
    return whole.view(*whole.shape[:-1], groups, stride)[..., first : first + width]


def hook_of(spec: dict[str, Any], block: Any, name: str) -> tuple[str, str, int | None]:
    """A component's module, side and item; in a layer without softmax attention those of what stands in its place."""
    path, side, index = spec["components"][name]
    if name == "attention_output" and spec["mixer"] and not hasattr(block, path):
        path, side, index = spec["mixer"]
    return path, side, index


def replace_tensor(spec: dict[str, Any], block: Any, name: str, value: torch.Tensor) -> None:
    """Hand a module's written tensor (`module_tensor`) back to the forward pass."""
    if name == "router":
        route(spec, block, value)
        return
    path, side, index = hook_of(spec, block, name)
    module, value = module_at(block, path), unfold(spec, value)
    if name in spec["columns"]:
        whole = module.output.clone()
        part = columns_within(spec, name, whole)
        part.copy_(value.reshape(part.shape))
        value = whole
    if side == "input":
        module.input = value
    elif index is None or alone(module.output):
        module.output = value
    else:
        module.output = (*module.output[:index], value, *module.output[index + 1 :])


def alone(value: Any) -> bool:
    """Whether a module gives a tensor and no tuple of them, as GPT-J's blocks do from transformers 5.24 on."""
    return isinstance(value, torch.Tensor)


def experts_of(spec: dict[str, Any], block: Any) -> Any:
    """The module of a block's routed experts: of hidden states, numbers of experts and weights it gives their sum."""
    return module_at(block, spec["mixture"]["module"])


def routing_of(spec: dict[str, Any], block: Any) -> torch.Tensor:
    """`[row, token, expert]`: the weight with which each expert enters the sum; 0 where it was not chosen.

    nnsight gives a value as often as one asks until a later one is asked for: here the shape is the MLP's input's.
    """
    mlp = module_at(block, spec["components"]["mlp_output"][0])
    shape = mlp.input.shape[:2]
    (_, chosen, weights), _ = experts_of(spec, block).inputs
    return fold(spec, spread_out(spec, chosen, weights).reshape(*shape, -1))


def expert_inputs(spec: dict[str, Any], block: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the experts are given: hidden states `[row, token, width]` and routing weights `[row, token, expert]`.

    The shape is the MLP's output's, so that the routing can be asked for before.
    """
    (hidden, chosen, weights), _ = experts_of(spec, block).inputs
    path, _, index = spec["components"]["mlp_output"]
    output = module_at(block, path).output
    shape = (output if index is None else output[index]).shape[:2]
    routing = spread_out(spec, chosen, weights)
    return fold(spec, hidden.reshape(*shape, -1)), fold(spec, routing.reshape(*shape, -1))


def inputs_to_call(model: Any, spec: dict[str, Any], block: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts' inputs, where they can be called with them."""
    if sandboxed(model):
        raise RuntimeError("this server runs blocks in a sandbox, where experts cannot be called")
    return expert_inputs(spec, block)


def spread_out(spec: dict[str, Any], chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`[token, expert]` of the numbers and weights `[token, choice]` of chosen experts."""
    return weights.new_zeros(len(weights), spec["mixture"]["experts"]).scatter(1, chosen, weights)


def choice_of(routing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and weights `[token, choice]` of the experts with a weight in `[token, expert]`.

    As many as the token with most has; where another has fewer, experts of weight 0 fill up and add nothing.
    """
    most = max(int((routing != 0).sum(-1).max()), 1)
    chosen = routing.abs().topk(most, -1).indices
    return chosen, routing.gather(-1, chosen)


def route(spec: dict[str, Any], block: Any, routing: torch.Tensor) -> None:
    """Let the experts run with these weights `[row, token, expert]`."""
    experts = experts_of(spec, block)
    (hidden, _, _), settings = experts.inputs
    experts.inputs = ((hidden, *choice_of(unfold(spec, routing).flatten(0, 1))), settings)


def contribution(spec: dict[str, Any], block: Any, given: list[torch.Tensor], experts: Any) -> torch.Tensor:
    """What some experts together add `[..., width]`, before the family's multiplier: they are asked once more.

    Their module is called out of turn with the weights of all others at 0, whichever way it holds its
    parameters; so what all routed experts and the shared one add is what their MLP adds. given: the
    `expert_inputs` of some tokens. experts: their numbers, none for all of them, or "shared".
    """
    hidden, routing = given
    if experts == "shared":
        return shared_contribution(spec, block, hidden)
    wanted = torch.tensor(experts or range(routing.shape[-1])).to(routing.device)
    routing = torch.zeros_like(routing).index_copy(-1, wanted, routing[..., wanted])
    if not routing.any():
        return torch.zeros_like(hidden)
    chosen, weights = choice_of(routing.flatten(0, -2))
    found: torch.Tensor = experts_of(spec, block)(hidden.flatten(0, -2), chosen, weights)
    return found.reshape(hidden.shape)


def shared_contribution(spec: dict[str, Any], block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What the expert that always runs adds `[..., width]`, before the family's multiplier."""
    added: torch.Tensor = module_at(block, spec["mixture"]["shared"])(hidden)
    if spec["mixture"]["gate"]:
        added = torch.sigmoid(module_at(block, spec["mixture"]["gate"])(hidden)) * added
    return added


def activations(spec: dict[str, Any], block: Any, given: list[torch.Tensor], neurons: dict[int, Any]) -> torch.Tensor:
    """`[..., neuron]`: neurons by expert, each times the weight of its expert, which is 0 where that was not chosen.

    The experts' class says how it holds its matrices, and makes neurons of what comes out of the first
    (transformers, `use_experts_implementation`).
    """
    (hidden, routing), experts, found = given, experts_at_hand(spec, block), []
    for number, places in neurons.items():
        weight = routing[..., number, None]
        if not weight.any():
            found.append(hidden.new_zeros(*hidden.shape[:-1], len(places)))
            continue
        inner = hidden @ matrix(experts, "gate_up_proj", number)
        inner = inner + experts.gate_up_proj_bias[number] if experts.has_bias else inner
        where, _ = grid(places, (), hidden.device)
        found.append(experts._apply_gate(inner)[..., where] * weight)
    return torch.cat(found, -1)


def matrix(experts: Any, name: str, number: int) -> torch.Tensor:
    """One expert's weights `[input, output]`, a view."""
    weights: torch.Tensor = getattr(experts, name)[number]
    return weights if experts.is_transposed else weights.T


def experts_at_hand(spec: dict[str, Any], block: Any) -> Any:
    """The experts' own module, whose weights are numbers in memory."""
    experts = experts_of(spec, block)._module
    weights = getattr(experts, "down_proj", None)
    if not isinstance(weights, torch.Tensor) or weights.is_meta or weights.dtype != getattr(torch, spec["dtype"]):
        raise RuntimeError("the experts' weights are packed, or fetched only while they run: ask for expert_output")
    return experts


def part_of(spec: dict[str, Any], block: Any, given: list[torch.Tensor], part: Any) -> torch.Tensor:
    """What is read or written of experts: the `contribution` of some, or the `activations` of neurons by expert."""
    return activations(spec, block, given, part) if isinstance(part, dict) else contribution(spec, block, given, part)


def factor_of(spec: dict[str, Any], part: Any) -> float:
    """What a value of `part_of` is multiplied by on its way out: a contribution by the family's multiplier."""
    factor: float = spec["factors"]["mlp_output"]
    return 1.0 if isinstance(part, dict) else factor


def added_by(spec: dict[str, Any], block: Any, value: torch.Tensor, part: Any) -> torch.Tensor:
    """What a value of `part_of` adds to the MLP's sum, in float32: each neuron its column of weights so many times."""
    if not isinstance(part, dict):
        return value.float()
    experts, total = experts_at_hand(spec, block), torch.zeros((), device=value.device)
    by_expert = torch.split(value, [len(places) for places in part.values()], -1)
    for (number, places), active in zip(part.items(), by_expert, strict=True):
        if active.any():
            where, _ = grid(places, (), value.device)
            total = total + active.float() @ matrix(experts, "down_proj", number)[where].float()
    return total


def of_one_stack(writes: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Writes of a generation, whose prompts stand all together, as those of a batch, which say in which stack."""
    return [(*where, kind, (0, *value) if kind in ("source", "projected") else value) for *where, kind, value in writes]


def write_experts(
    model: Any, spec: dict[str, Any], block: Any, writes: Any, sources: list[Any], samples: int = 1
) -> None:
    """Overwrite what experts of one layer add: their MLP's sum changes by as much, which is the same for a sum.

    sources: what `kept` holds of the layer for each stack. samples: sequences of a row, which get the same.
    """
    inputs, target = inputs_to_call(model, spec, block), module_tensor(spec, block, "mlp_output")
    for row, places, part, kind, value in writes:
        where = (slice(row * samples, (row + 1) * samples), *grid(places, (), target.device))
        own = part_of(spec, block, [one[where] for one in inputs], part)
        if kind in ("source", "projected"):
            stack, prompt, source_places, *subspace = value
            taken = [one[prompt][grid(source_places, (), one.device)].to(own.device) for one in sources[stack]]
            new = part_of(spec, block, taken, part)
            new = projected(own, new, *subspace) if subspace else new
        elif kind == "scale":
            new = own * value
        else:
            new = torch.tensor(value).to(own.device) / factor_of(spec, part)
        new, own = (added_by(spec, block, one, part) for one in (new, own))
        target[where] = (target[where].float() + new - own).to(target.dtype)
    replace_tensor(spec, block, "mlp_output", target)


def bound_window(spec: dict[str, Any], stack: dict[str, Any], start: int, block: Any, layer: int) -> None:
    """Give a sliding-window layer its own mask where the packed sequence is longer than the window."""
    if layer in spec["sliding"] and max(stack["positions"]) >= spec["window"]:
        args, kwargs = block.inputs
        mask = additive_mask(stack, start, spec["window"], spec["dtype"]).to(kwargs["attention_mask"].device)
        block.inputs = (args, {**kwargs, "attention_mask": mask})


def prefix_cache(keyvalues: list[Any], start: int) -> DynamicCache:
    """A cache of the right length: the first prompt's keys and values before `start` (views, no copy)."""
    return DynamicCache([(keys[:1, :, :start], values[:1, :, :start]) for keys, values in keyvalues])


def show_prefix(past: DynamicCache, layer: int, keyvalues: list[Any], rows: torch.Tensor, start: int) -> None:
    """Let the rows of a layer see their own prompts' keys and values before `start`."""
    index = rows.to(keyvalues[layer][0].device)
    past.layers[layer].keys, past.layers[layer].values = (kept[index, :, :start] for kept in keyvalues[layer])


def answer_values(model: Any, spec: dict[str, Any], stack: dict[str, Any], rows: Any) -> torch.Tensor:
    """`[row, read]` float32: the logit, or with `normalise` the log-probability in nats, of each token that is read."""
    tokens, head = torch.tensor([stack["tokens"][prompt] for prompt in rows]), model.lm_head
    if not spec["normalise"] and at_hand(spec, head):
        wanted, tokens = torch.unique(tokens, return_inverse=True)
        head.skip(rows_of(head, head.input, wanted))  # a few rows of the unembedding in place of the vocabulary
    logits = fold(spec, model.output.logits.float(), stack["answers"][0])
    queries, tokens = placed(stack["queries"], logits.device), placed(tokens, logits.device)
    places = torch.arange(len(rows), device=logits.device)[:, None]
    values: torch.Tensor = logits[places, queries, tokens]
    return values - torch.logsumexp(logits, -1)[places, queries] if spec["normalise"] else values


def sandboxed(model: Any) -> bool:
    """Whether a server runs the model's blocks in a sandbox; it does not show its weights then.

    On this machine they are hidden too where accelerate fetches them while their module runs, and a hook tells it.
    """
    return bool(model.lm_head.weight.is_meta) and not hasattr(model.lm_head, "_hf_hook")


def at_hand(spec: dict[str, Any], module: Any) -> bool:
    """Whether a module's weights are numbers in memory: not packed by a quantiser, nor fetched only while it runs."""
    return not module.weight.is_meta and module.weight.dtype == getattr(torch, spec["dtype"])


def rows_of(linear: Any, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some outputs of a linear module."""
    rows = placed(rows, linear.weight.device)
    bias = None if linear.bias is None else linear.bias[rows]
    return torch.nn.functional.linear(value, linear.weight[rows], bias)


def direct(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """What sets of contributions do to the answer by the residual stream alone: `[1, (row, read)]`.

    Rows: every prompt as it is; then, prompt by prompt, each set as on each of its `others`. The final stream is a sum
    of what layers add. So no layer is run: the base stream, plus the difference between the other prompt's
    contributions and its own, goes through all that follows the last block, which no prompt differs in.
    """
    names = ("attention_output", "mlp_output", "layer_output")
    bases = [base_run(model, spec, stack, names) for stack in context["stacks"]]
    streams = [
        held_stream(base["captured"], bases[other]["captured"], sites)
        for base, others in zip(bases, context["others"], strict=True)
        for other in others
        for sites in context["sets"]
    ]
    found = [base["values"] for base in bases]
    for first in range(0, len(streams), context["rows"]):
        part = torch.stack(streams[first : first + context["rows"]])
        found.append(answer_of(model, spec, context["stacks"][0], bases[0]["keyvalues"], part))
    return torch.cat(found).flatten()[None]


def held_stream(own: dict[str, Any], other: dict[str, Any], sites: tuple[Any, ...]) -> torch.Tensor:
    """`[token, width]` float32: the final stream with some contributions as on the other prompt."""
    stream: torch.Tensor = own["layer_output"][-1][0].float()
    for name, layer in sites:
        new, old = (side[name][layer][0].float().to(stream.device) for side in (other, own))
        stream = stream + new - old
    return stream


def answer_of(
    model: Any, spec: dict[str, Any], stack: dict[str, Any], keyvalues: list[Any], streams: torch.Tensor
) -> torch.Tensor:
    """Answer values `[row, read]` of final streams `[row, token, width]`, with the answers of a stack behind them."""
    start, blocks = stack["first"], module_at(model, spec["blocks"])
    past, arguments = prefix_cache(keyvalues, start), forward_arguments(spec, stack, start)
    entering = streams.to(getattr(torch, spec["dtype"]))
    with model.trace(input_ids=torch.tensor([stack["ids"][0][start:]]), past_key_values=past, **arguments):
        skip_layers(spec, blocks, spec["layers"], entering)
        values = answer_values(model, spec, stack, (0,) * len(streams))
    return values


def skip_layers(spec: dict[str, Any], blocks: Any, layers: int, stream: torch.Tensor) -> None:
    """Run none of the first layers; the stream is what the last of them hands on."""
    for layer in range(layers):
        blocks[layer].skip(stream if spec["components"]["layer_output"][2] is None else (stream, None))


def read(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """Activations of one prompt, one after the other: each read is a component's columns, averaged over its places."""
    found = []
    with model.trace(input_ids=torch.tensor([context["ids"]]), logits_to_keep=1):
        for layer, reads in context["reads"].items():
            block = module_at(model, spec["blocks"])[layer]
            inputs: tuple[torch.Tensor, ...] = ()
            for name, places, columns in reads:
                if name == "expert_output":
                    inputs = inputs or inputs_to_call(model, spec, block)
                    given = [one[0][grid(places, (), one.device)] for one in inputs]
                    values = part_of(spec, block, given, columns) * factor_of(spec, columns)
                else:
                    tensor = block.input if name == "layer_input" else tensor_of(spec, block, name)
                    values = tensor[0][grid(places, columns, tensor.device)]
                found.append(values.float().mean(0))
    return torch.cat([value.to(found[0].device) for value in found])[None]


def routing(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """Mean weight of each expert over places of two prompts: `[1, (side, layer, expert)]`, of layers with experts."""
    found = []
    for stack, places in zip(context["stacks"], context["places"], strict=True):
        weights = base_run(model, spec, stack, ("router",))["captured"]["router"]
        where = grid(places, (), weights[spec["mixture"]["layers"][0]].device)
        found += [weights[layer][0][where].float().mean(0).cpu() for layer in spec["mixture"]["layers"]]
    return torch.cat(found)[None]


def columns(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """Norm of the weights by which each unit of a component's input is written to the stream: `[1, (layer, unit)]`.

    Times the change of a unit's activity it is the size of what the unit adds, but for a norm behind the module and the
    family's multiplier, which all units of a layer share.
    """
    if sandboxed(model):
        raise RuntimeError("this server runs blocks in a sandbox and shows no weights")
    path, norms = spec["components"][context["component"]][0], []
    for layer in range(spec["layers"]):
        module = module_at(module_at(model, spec["blocks"])[layer], path)
        norms.append(column_norms(module) if at_hand(spec, module) else image_norms(spec, module))
    return torch.cat([norm.to(norms[0].device) for norm in norms])[None]


def column_norms(module: Any) -> torch.Tensor:
    """Norm `[unit]` of the weights of each input of a linear module."""
    inputs_first = hasattr(module, "nf")  # GPT-2's Conv1D; a Linear has its outputs first
    norms: torch.Tensor = module.weight.float().norm(dim=1 if inputs_first else 0)
    return norms


def image_norms(spec: dict[str, Any], module: Any) -> torch.Tensor:
    """The same of a module whose weights are not at hand: of what it makes of each unit alone, less its bias."""
    width, norms = module.nx if hasattr(module, "nx") else module.in_features, []
    for first in range(0, width, 512):
        numbers = torch.arange(first, min(first + 512, width), device=working_device(module))
        alone = torch.nn.functional.one_hot(numbers, width).to(getattr(torch, spec["dtype"]))
        norms.append((module(alone) - module(torch.zeros_like(alone))).float().norm(dim=1))
    return torch.cat(norms)


def working_device(module: Any) -> torch.device:
    """Where a module takes its inputs; accelerate moves those of one whose weights are elsewhere."""
    device: torch.device = module.weight.device
    return torch.device("cpu") if module.weight.is_meta else device


def screen(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """Estimates of NIE, then TIE, of every unit of one component, summed over pairs.

    Each is the change of the activation times a gradient of Y. `[1, (base, variant, layer, unit)]`, in the unit of Y.

    - Attribution patching (AtP): the gradient of the base run. GradDrop, a second variant where `cuts` asks for it,
      averages its size over backward passes in which one layer at a time passes on nothing but the residual stream
      (Kramar et al. 2024, arXiv 2403.00745, sections 3.1 and 3.2).
    - Relevance patching, where there is `relp`: the gradient of a base run through a linear model (`relevance`).
    - Integrated gradients, where there is a `line`: the gradient averaged on the way to the other prompt's value.
    """
    if sandboxed(model):
        raise RuntimeError("this server runs blocks in a sandbox and gives no gradients")
    total = torch.zeros(())
    for pair in context["pairs"]:
        total = total + attributions(model, spec, pair, context)
    return total.flatten()[None]


def attributions(model: Any, spec: dict[str, Any], pair: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """One pair's estimates `[(base, variant), layer, unit]` at its written places."""
    name, stacks = context["component"], pair["stacks"]
    bases = [base_run(model, spec, stack, (name,)) for stack in stacks]
    held = [
        [layer[0][grid(places, (), layer.device)].float() for layer in base["captured"][name]]
        for base, places in zip(bases, pair["places"], strict=True)
    ]
    change = [one - zero for zero, one in zip(*held, strict=True)]
    scores = []
    for side in (0, 1):
        if "line" in context:
            scores.append(integrated(model, spec, pair, side, context, bases, held))
            continue
        places = pair["places"][side]
        products = []  # of the change and the gradient, `[layer, unit]` each: as it is, then with a layer cut off
        for first in range(0, context["cuts"], context["rows"]):
            cuts = range(first, min(first + context["rows"], context["cuts"]))
            asked = (model, spec, pair, side, name, bases[side]["keyvalues"], cuts)
            gradients = relevance(context["relp"], *asked) if "relp" in context else gradients_of(*asked)
            by_layer = []
            for layer, gradient in enumerate(gradients):
                where, _ = grid(places, (), gradient.device)
                by_layer.append((change[layer] * gradient[:, where]).sum(1))
            products.append(torch.stack([product.cpu() for product in by_layer], 1))
        by_cut = torch.cat(products)
        scores.append(by_cut[0])
        if len(by_cut) > 1:
            scores.append(by_cut[1:].abs().sum(0) / (spec["layers"] - 1))
    return torch.stack(scores)


def integrated(
    model: Any,
    spec: dict[str, Any],
    pair: dict[str, Any],
    side: int,
    context: dict[str, Any],
    bases: list[dict[str, Any]],
    held: list[list[torch.Tensor]],
) -> torch.Tensor:
    """Integrated gradients `[layer, unit]` (Sundararajan et al. 2017, arXiv 1703.01365), layer by layer.

    The component of one layer goes on a straight line from its own to the other prompt's value, while the rest of the
    model answers to it; so over all units they add up to the effect of swapping the component of that layer alone.
    line: points on the way, in [0, 1], and the weights of the mean over them. held: values `[place, width]` of both
    sides, by layer.
    """
    points, weights = (torch.tensor(one)[:, None, None] for one in context["line"])
    at_once, found = max(1, context["rows"] // len(points)), []
    for low in range(0, spec["layers"], at_once):
        ways = []  # of a few layers, `[point, place, width]`
        for zero, one in zip(*(values[low : low + at_once] for values in held), strict=True):
            own, other = (zero, one) if side == 0 else (one, zero)
            ways.append((own + points.to(own) * (other - own)).requires_grad_())
        with torch.enable_grad():
            batch = on_lines(pair, side, context["component"], low, spec["layers"], ways)
            answers = batch_run(model, spec, pair["stacks"][side], batch, bases)
            gradients = torch.autograd.grad(outcomes_of(answers, pair).sum(), ways)
        for layer, gradient in enumerate(gradients, low):
            change, mean = held[1][layer] - held[0][layer], (weights.to(gradient) * gradient).sum(0)
            found.append((change * mean).sum(0).cpu())
    return torch.stack(found)


def on_lines(
    pair: dict[str, Any], side: int, component: str, low: int, layers: int, ways: list[torch.Tensor]
) -> dict[str, Any]:
    """A batch of rows of one prompt: of each layer from `low` on, its component at points `[point, place, width]`."""
    places, writes = pair["places"][side], {}
    joining: list[tuple[int, ...]] = [()] * (layers - low)
    for number, points in enumerate(ways):
        rows = range(number * len(points), (number + 1) * len(points))
        values = zip(rows, points, strict=True)
        joining[number] = (0,) * len(points)
        writes[low + number] = ((component, tuple((row, places, (), "constant", value) for row, value in values)),)
    return {"stack": side, "start": pair["start"], "low": low, "joining": tuple(joining), "writes": writes}


def gradients_of(
    model: Any, spec: dict[str, Any], pair: dict[str, Any], side: int, component: str, keyvalues: list[Any], cuts: range
) -> list[torch.Tensor]:
    """By layer the gradient `[row, token, width]` of Y; a row of cut c > 0 ignores what layer c - 1 adds."""
    stack, start, live, rows = pair["stacks"][side], pair["start"], [], (0,) * len(cuts)
    spec = laid_out(spec, stack)
    past = None if "paths" in spec else prefix_cache(keyvalues, start)
    if past is not None:
        index = placed(rows, keyvalues[0][0].device)
        for layer in range(spec["layers"]):
            show_prefix(past, layer, keyvalues, index, start)
    ids = unfold(spec, torch.tensor([stack["ids"][0][start:]]).expand(len(cuts), -1))
    with (
        torch.enable_grad(),
        model.trace(input_ids=ids, past_key_values=past, **forward_arguments(spec, stack, start)),
    ):
        for layer in range(spec["layers"]):
            block = module_at(model, spec["blocks"])[layer]
            bound_window(spec, stack, start, block, layer)
            if layer == 0:
                block.input = block.input.detach().requires_grad_()
            for name in spec["components"]:
                if name == component:
                    live.append(module_tensor(spec, block, name))
                    replace_tensor(spec, block, name, live[-1])
                if name in ("attention_output", "mlp_output") and layer + 1 in cuts:
                    cut = cut_off(module_tensor(spec, block, name), cuts.index(layer + 1))
                    replace_tensor(spec, block, name, cut)
        values = answer_values(model, spec, stack, rows)
        found = torch.autograd.grad(outcomes_of(values, pair).sum(), live)
    return [gradient.float() / spec["factors"].get(component, 1.0) for gradient in found]


def relevance(gated: bool, model: Any, spec: dict[str, Any], *asked: Any) -> Any:
    """`gradients_of`, as through a linear model, while values are the model's own.

    The rules of relevance patching (RelP, Jafari et al. 2025, arXiv 2508.21258, table 1): a norm's denominator and
    attention's pattern are constants (`Frozen`), an activation is its value over its input times its input, and the
    two factors of a gated product get half of its relevance each. gated: whether MLPs have such a product.
    """
    hooks = linear_hooks(module_at(model, spec["blocks"])._module, spec, gated)
    try:
        with Frozen():
            return gradients_of(model, spec, *asked)
    finally:
        for hook in hooks:
            hook.remove()


def linear_hooks(blocks: Any, spec: dict[str, Any], gated: bool) -> list[Any]:
    """Hooks on activations and on what gated products are projected by. blocks: as torch has them."""
    hooks = []
    for block in blocks:
        for module in block.modules():
            if type(module).__module__ in ACTIVATIONS:
                hooks.append(module.register_forward_hook(by_ratio))
        if gated:
            product = block.get_submodule(spec["components"]["mlp_neurons"][0])
            hooks.append(product.register_forward_pre_hook(halved))
    return hooks


class Frozen(TorchFunctionMode):
    """While it is on, no gradient flows through the denominators of norms and the patterns of softmax attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of a function of torch."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "scaled_dot_product_attention":
            query, key, *others = args
            return func(query.detach(), key.detach(), *others, **kwargs)
        if name == "layer_norm":
            return frozen_layer_norm(*args, **kwargs)
        found = func(*args, **kwargs)
        return found.detach() if name in ("rsqrt", "softmax") else found  # of an RMS norm, and of attention


# Where the classes of activation functions stand that transformers' `ACT2FN` names.
ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


def by_ratio(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """An activation function's output, as the constant output / input times its input."""
    value = inputs[0]
    with torch.no_grad():
        away = torch.where(value == 0, torch.finfo(value.dtype).eps, value)  # at 0 the ratio is the slope
        ratio = type(module).forward(module, away) / away  # the module's own call is one that a trace counts
    found: torch.Tensor = value * ratio
    return found


def halved(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The same input of a module; half of the gradient flows on from it."""
    value = inputs[0]
    return (value.detach() + (value - value.detach()) / 2, *inputs[1:])


def frozen_layer_norm(
    value: torch.Tensor,
    shape: Any,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm` over the last dimension, with a constant for the deviation it divides by."""
    whole = value.float()
    centred = whole - whole.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps).detach()
    normed = normed if weight is None else normed * weight
    normed = normed if bias is None else normed + bias
    return normed.to(value.dtype)


def outcomes_of(values: torch.Tensor, pair: dict[str, Any]) -> torch.Tensor:
    """`[row]`: Y of values `[row, read]`: a weighted sum, or log-probabilities of two sides' openings."""
    if "sides" not in pair:
        return (values * torch.tensor(pair["weights"]).to(values.device)).sum(1)
    compliant, refusing = [side_logprob(values, openings) for openings in pair["sides"]]
    return compliant - refusing


def side_logprob(values: torch.Tensor, openings: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """`[row]`: log of the summed probability of openings, each the sum of the reads along it (nats)."""
    return torch.logsumexp(torch.stack([values[:, list(reads)].sum(1) for reads in openings], 1), 1)


def cut_off(tensor: torch.Tensor, row: int) -> torch.Tensor:
    """The same values; no gradient flows back through one row."""
    return torch.cat([tensor[:row], tensor[row : row + 1].detach(), tensor[row + 1 :]])


def learn(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """A basis whose swapped projection gives Y its targets: `[1, (direction, width), then (step)]`, numbers and losses.

    Distributed alignment search (DAS, Geiger et al. 2023, arXiv 2303.02536): the rows are those of `measure`, whose
    `targets` a target of Y is given for; what they project onto is learnt by gradient. The loss is the mean of
    ((Y - target) / scale)^2. It depends on what the basis spans and on nothing else, so each step turns that subspace
    along the steepest descent on the Grassmann manifold (Edelman, Arias & Smith 1998, SIAM J. Matrix Anal. 20), by an
    angle that falls evenly from `angle` (radians) to 0. The last loss is that of the basis that comes back.
    """
    if sandboxed(model):
        raise RuntimeError("this server runs blocks in a sandbox and gives no gradients")
    bases = [[base_run(model, spec, stack, part["capture"]) for stack in part["stacks"]] for part in context["parts"]]
    basis, losses, steps = torch.tensor(context["start"]), [], context["steps"]
    for step in range(steps + 1):
        loss, slope = loss_of(model, spec, context, bases, basis)
        losses.append(loss)
        if step < steps:
            basis = turned(basis, slope, context["angle"] * (1 - step / steps))
    return torch.cat([basis.flatten(), torch.stack(losses)])[None]


def loss_of(
    model: Any, spec: dict[str, Any], context: dict[str, Any], bases: list[list[dict[str, Any]]], basis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a basis and its slope `[direction, width]`, batch by batch, so that one batch's graph is held."""
    loss, slope = torch.zeros(()), torch.zeros_like(basis)
    for part, own in zip(context["parts"], bases, strict=True):
        for batch, targets in zip(part["batches"], part["targets"], strict=True):
            live, stack = basis.clone().requires_grad_(), part["stacks"][batch["stack"]]
            with torch.enable_grad():
                values = batch_run(model, spec, stack, onto(batch, live), own)
                missed = outcomes_of(values, part) - torch.tensor(targets, dtype=values.dtype).to(values.device)
                error = (missed / context["scale"]).square().sum() / context["rows"]
                (gradient,) = torch.autograd.grad(error, live)
            loss, slope = loss + error.detach().cpu(), slope + gradient
    return loss, slope


def onto(batch: dict[str, Any], basis: torch.Tensor) -> dict[str, Any]:
    """A batch all of whose projections are onto one basis."""
    writes = {
        layer: tuple(
            (name, tuple((*where, (*value[:3], basis, basis)) for *where, value in entries)) for name, entries in parts
        )
        for layer, parts in batch["writes"].items()
    }
    return {**batch, "writes": writes}


def turned(basis: torch.Tensor, slope: torch.Tensor, angle: float) -> torch.Tensor:
    """An orthonormal basis `[direction, width]` of a subspace that is turned by about an angle against a slope."""
    tangent = slope - slope @ basis.T @ basis
    length = tangent.norm()
    moved = basis - angle * tangent / length if length else basis
    orthogonal: torch.Tensor = torch.linalg.qr(moved.T).Q
    return orthogonal.T


def generate(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """Greedy continuations `[1, (prompt, token)]` of prompts, with units held from their last token on, or steered.

    Every answer has all its tokens, whatever follows its end; NaN is one whose largest logit is no number.
    """
    ids, mask = left_padded(context["prompts"])
    largest = []
    with model.generate(input_ids=ids, attention_mask=mask, **every_step(spec, context["tokens"])) as tracer:
        for _ in tracer.iter[: context["tokens"]]:
            intervene(model, spec, context, 1)
            largest.append(model.output.logits[:, -1].amax(-1))
        found = tracer.result
    new: torch.Tensor = found[:, ids.shape[1] :].float()
    new[~torch.stack(largest, -1).isfinite().to(new.device)] = torch.nan
    return new.reshape(1, -1)


def sample(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """Answers to prompts whose mediators are overwritten: `[row, (quantity, sample, token)]` of token ids and logits.

    Generation goes on from the keys and values that the writes leave; where they are held, `later` writes hold them at
    each new token. A token is drawn by the inverse of the cumulative distribution, tokens in the order of their ids, at
    uniform numbers that all rows of one seed share; at temperature 0 it is the likeliest. Every answer has all its
    tokens, whatever follows its end.
    """
    taken, samples = taken_values(model, spec, context), context["samples"]
    ids, mask = left_padded(context["prompts"])
    prompts = torch.tensor(context["rows"]).repeat_interleave(samples)
    draws = torch.cat([uniform(seed, context["tokens"], samples) for seed in context["seeds"]], 1)
    said = []
    with model.generate(
        input_ids=ids[prompts], attention_mask=mask[prompts], **every_step(spec, context["tokens"])
    ) as tracer:
        for step in tracer.iter[: context["tokens"]]:
            writes = context["later"] if step else context["writes"]
            for layer, components in writes.items():
                block = module_at(model, spec["blocks"])[layer]
                for name, parts in components:
                    if name == "expert_output":
                        sources = [taken.get(layer, {}).get(name)]
                        write_experts(model, spec, block, of_one_stack(parts), sources, samples)
                    else:
                        write_samples(spec, block, name, parts, taken.get(layer), samples)
            said.append(next_tokens(model.output.logits[:, -1], draws[step], context["temperature"]))
    found = torch.stack(said, -1).reshape(2, len(context["rows"]), -1)
    return found.transpose(0, 1).flatten(1)


def taken_values(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What writes take from plain runs of the prompts: by layer and component `[prompt, token, width]`, left-padded."""
    taken: dict[int, dict[str, Any]] = {}
    if context["taken"]:
        ids, mask = left_padded(context["prompts"])
        with model.generate(input_ids=ids, attention_mask=mask, **every_step(spec, 1)):
            for layer, names in context["taken"].items():
                block = module_at(model, spec["blocks"])[layer]
                taken[layer] = {name: kept(spec, block, name, layer, 0) for name in names}
    return taken


def left_padded(prompts: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `[prompt, token]` of prompts that end together."""
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[0] * (width - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    return ids, mask


def every_step(spec: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Arguments of a greedy generation that no token ends, so that every step runs."""
    return {**greedy(), "max_new_tokens": tokens, "eos_token_id": spec["vocab"]}


def uniform(seed: int, tokens: int, samples: int) -> torch.Tensor:
    """Numbers `[step, sample]` in [0, 1) that a seed alone decides."""
    return torch.rand((tokens, samples), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def write_samples(
    spec: dict[str, Any], block: Any, name: str, writes: tuple[Any, ...], taken: Any, samples: int
) -> None:
    """Overwrite a component of one layer, row by row; all samples of a row stand together and get the same."""
    target, factor = module_tensor(spec, block, name), spec["factors"].get(name, 1.0)
    for row, places, columns, kind, value in writes:
        where = (slice(row * samples, (row + 1) * samples), *grid(places, columns, target.device))
        if kind in ("source", "projected"):
            prompt, source_places, *subspace = value
            source = taken[name][prompt]
            new = source[grid(source_places, columns, source.device)] / factor
            new = projected(target[where], new, *subspace) if subspace else new
        elif kind == "scale":
            new = target[where] * value
        else:
            new = torch.tensor(value) / factor
        target[where] = new.to(target.device, target.dtype)
    replace_tensor(spec, block, name, target)


def next_tokens(logits: torch.Tensor, draws: torch.Tensor, temperature: float) -> torch.Tensor:
    """Ids and logits `[quantity, sequence]` of the tokens that are drawn from logits `[sequence, vocab]`.

    The drawn tokens' logits are then raised, in place, so that greedy generation takes them.
    """
    if temperature:
        cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
        heights = draws.to(logits.device)[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, heights, right=True)
    else:
        chosen = logits.argmax(-1, keepdim=True)
    found = torch.cat([chosen.float(), logits.gather(1, chosen).float()], 1).T
    logits.scatter_(1, chosen, torch.inf)
    return found


def greedy() -> dict[str, Any]:
    """Every setting of generation, so that none is left to the checkpoint's own generation_config.

    What is not given as an argument, transformers takes from there; `None` counts as given.
    """
    neutral = {**dict.fromkeys(vars(GenerationConfig())), **GenerationConfig._get_default_generation_params()}
    for name in ("max_length", "transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash"):
        neutral.pop(name, None)
    ours = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True, "pad_token_id": 0}
    return {**neutral, **ours}


def drift(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """What an intervention changes along an answer: `[1, (quantity, token)]` of KL(plain || held) and both losses."""
    answer, tokens = torch.tensor(context["answer"]), len(context["answer"])
    ids = torch.tensor([context["ids"] + context["answer"][:-1]])
    with model.trace(input_ids=ids, logits_to_keep=tokens):
        plain = torch.log_softmax(model.output.logits[0].float(), -1)
    with model.trace(input_ids=ids, logits_to_keep=tokens):
        intervene(model, spec, context, tokens)
        held = torch.log_softmax(model.output.logits[0].float(), -1)
    divergence = (plain.exp() * (plain - held)).sum(-1)
    losses = [-scores[torch.arange(tokens), answer] for scores in (plain, held)]
    return torch.cat([divergence, *losses])[None]


def intervene(model: Any, spec: dict[str, Any], context: dict[str, Any], tokens: int) -> None:
    """Hold units at the last `tokens` tokens of what runs, or steer the stream at all of them."""
    if "ablated" in context:
        ablate(model, spec, **context["ablated"])
    if "added" in context:
        add(model, spec, **context["added"])
    hold(model, spec, context["held"], tokens)


def ablate(model: Any, spec: dict[str, Any], embeddings: tuple[str, ...], basis: tuple[tuple[float, ...], ...]) -> None:
    """Take orthonormal directions out of the stream, in every row and at every token that runs.

    Where embeddings and contributions have nothing of a direction, the input of no block has; after each layer it is
    taken out once more, as what rounding leaves of it adds up.
    """
    rows = torch.tensor(basis)
    for path in embeddings:
        module = module_at(model, path)
        module.output = without(module.output, rows)
    for layer in range(spec["layers"]):
        block = module_at(model, spec["blocks"])[layer]
        for name in ("attention_output", "mlp_output", "layer_output"):
            replace_tensor(spec, block, name, without(module_tensor(spec, block, name), rows))


def add(model: Any, spec: dict[str, Any], layer: int, vector: tuple[float, ...]) -> None:
    """Add a vector to the stream after a layer, in every row and at every token that runs."""
    block = module_at(model, spec["blocks"])[layer]
    stream = module_tensor(spec, block, "layer_output")
    raised = stream.float() + torch.tensor(vector).to(stream.device)
    replace_tensor(spec, block, "layer_output", raised.to(stream.dtype))


def without(tensor: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """A tensor `[..., width]` without its part along orthonormal directions `[direction, width]`."""
    whole, rows = tensor.float(), basis.to(tensor.device)
    return (whole - whole @ rows.T @ rows).to(tensor.dtype)


def hold(model: Any, spec: dict[str, Any], held: dict[int, Any], tokens: int) -> None:
    """Set units of layers, in every row and at the last `tokens` tokens of what runs."""
    for layer, parts in held.items():
        block = module_at(model, spec["blocks"])[layer]
        for name, columns, kind, value in parts:
            target, factor = module_tensor(spec, block, name), spec["factors"].get(name, 1.0)
            where = (slice(None), slice(-tokens, None), placed(columns, target.device))
            new = target[where] * value if kind == "scale" else torch.tensor(value) / factor
            target[where] = new.to(target.device, target.dtype)
            replace_tensor(spec, block, name, target)


def module_at(root: Any, path: str) -> Any:
    """Follow a dotted path of attribute names; the empty path is the root itself."""
    for name in path.split(".") if path else ():
        root = getattr(root, name)
    return root
