"""A GGUF file turned into an ordinary Hugging Face folder, one tensor at a time.

transformers reads GGUF but refuses to save what it read, and holds several copies of the weights
meanwhile. Here each tensor is dequantised, named and cast on its own, so that memory stays near the
size of the saved model. Names, and what llama.cpp changed in the weights (the order of rotary
dimensions, offsets of norms), come from transformers' own tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remote_mediation.saving import save_model

if TYPE_CHECKING:
    from torch import Tensor

# What GGUF calls the unembedding and the embedding.
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


def save_dequantised(
    source: Path,
    target: Path,
    dtype: str,
    ends: tuple[str, ...],
    tick: Callable[[int], None],
) -> None:
    """Write config, weights, tokenizer and generation config of a GGUF file into a folder.

    The model is saved tied. Where the file holds a head beside the embedding, both were one matrix
    before they were quantised, the head more finely: it serves as both.

    Args:
        source: the GGUF file of a decoder whose embedding and head are tied.
        target: the folder; made when it is not there.
        dtype: of the saved weights, float32 or bfloat16.
        ends: tokens that end an answer; none: the file's own end of sequence.
        tick: told the size of each tensor in the file, in bytes, once it is converted.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    reader = GGUFReader(source)
    config: Any = AutoConfig.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    config.tie_word_embeddings = True
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    tokenizer = _tokenizer(source, reader, config.model_type)  # before the weights, whose progress is told
    weights = dict(_weights(reader, model, tick))
    missing = set(dict(model.named_parameters())) - set(weights)
    if missing:
        raise ValueError(f"{source.name} lacks {', '.join(sorted(missing))}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if ends:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(ends))
    save_model(model, tokenizer, target)


def _weights(reader: Any, model: Any, tick: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
    """Each weight of a GGUF file under the model's own name, in the model's dtype."""
    import torch
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    kind = TENSOR_PROCESSORS.get(_field(reader, "general.architecture"), TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    has_head = any(tensor.name == HEAD for tensor in reader.tensors)
    for tensor in reader.tensors:
        name = EMBEDDING if tensor.name == HEAD else tensor.name
        if name in names and not (tensor.name == EMBEDDING and has_head):
            values = dequantize(tensor.data, tensor.tensor_type)
            changed = processor.process(values, tensor.name).weights
            yield names[name], torch.from_numpy(np.array(changed)).to(model.dtype)
        tick(int(tensor.n_bytes))


def _tokenizer(source: Path, reader: Any, model_type: str) -> Any:
    """The file's tokenizer; it begins texts with the token that the file says they begin with."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    # Where its kind is given, transformers does not read the whole header once more to find it: ten seconds.
    kind = model_type if model_type in TOKENIZER_MAPPING_NAMES else None
    tokenizer: Any = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, tokenizer_type=kind, trust_remote_code=False
    )
    first = tokenizer.bos_token
    if _field(reader, "tokenizer.ggml.add_bos_token") and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first}:1 $B:1",
            special_tokens=[(first, tokenizer.bos_token_id)],
        )
    return tokenizer


def _field(reader: Any, name: str) -> Any:
    """A value of the file's header, None where it has none."""
    field = reader.fields.get(name)
    return field.contents() if field is not None else None
